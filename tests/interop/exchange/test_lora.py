import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from leaves import loha_leaves
from lora_folders import PREFIX, dense
from peft_samples import NAMES, Sample
from safetensors.numpy import load_file

import loha_jax
from loha_jax import LoHaConfig, LycorisConfig, interop
from loha_jax.interop.formats.adapter_file import AdapterModule
from loha_jax.interop.formats.lora_config import exact_targets
from loha_jax.targets.matching import Match, match_target


def adapted(sample):
    return interop.load_peft(
        sample.adapter, sample.params(), layouts=sample.layouts, model_type="llama"
    )


def deltas(params, adapter_name=None):
    """ΔW of each module from PEFT's own tensors, by name and in float64: `[out, columns]`."""
    state = interop.to_peft_state_dict(params, adapter_name)
    result = {}
    for leaf in loha_leaves(params):
        (factors,) = leaf.adapters.values()
        for name, r, alpha in zip(leaf.names, factors.ranks, factors.alphas, strict=True):
            own = {k: state[f"{PREFIX}{name}.{k}"] for k in factors.tensors}
            module = AdapterModule(name, "loha", r, alpha, own)
            rows = own["hada_w1_a"].shape[1 if "hada_t1" in own else 0]
            result[name] = dense(module, (rows, -1))
    return result


def lora_deltas(lora):
    """The same of LoRA's tensors, as PEFT scales them."""
    result = {}
    for key, a in lora.tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            b = lora.tensors[f"{PREFIX}{name}.lora_B.weight"].astype(np.float64)
            r = lora.config["rank_pattern"].get(
                f"^{name.replace('.', chr(92) + '.')}", lora.config["r"]
            )
            alpha = lora.config["alpha_pattern"].get(
                f"^{name.replace('.', chr(92) + '.')}", lora.config["lora_alpha"]
            )
            assert a.shape[0] == r == alpha
            result[name] = b.reshape(b.shape[0], -1) @ a.reshape(r, -1).astype(np.float64)
    return result


@pytest.mark.parametrize(
    "name", [name for name in NAMES if "bin" not in name and "grouped" not in name]
)
def test_the_samples_of_peft(name):
    sample = Sample(name)
    params = adapted(sample)
    lora, want = interop.to_lora(params), deltas(params)
    got = lora_deltas(lora)
    assert got.keys() == want.keys() == lora.errors.keys()
    for module in want:
        np.testing.assert_allclose(
            got[module], want[module], rtol=0, atol=1e-6 * np.abs(want[module]).max()
        )
    others = {k for k in interop.to_peft_state_dict(params) if "hada_" not in k}
    assert others == {k for k in lora.tensors if ".lora_" not in k}
    targets = LoHaConfig(target_modules=lora.config["target_modules"])
    assert {m for m in sample.meta["layers"] if match_target(m, targets) is Match.TARGETED} == set(
        want
    )


SCANNED = {
    "embed": {"embedding": jnp.ones((5, 4))},
    "layers": {
        "q": {"kernel": jnp.zeros((3, 4, 6)), "bias": jnp.zeros((3, 6))},
        "k": {"kernel": jnp.zeros((3, 4, 6))},
    },
    "head": {"kernel": jnp.zeros((6, 2)), "bias": jnp.zeros(2)},
}


LAYOUTS = {r"layers\.[qk]": "sio"}


def scanned(key=0, **kwargs):
    kwargs = {"r": 2, "alpha": 3, "target_modules": ["q"], "init_weights": False} | kwargs
    return loha_jax.inject(SCANNED, LoHaConfig(**kwargs), key=jax.random.key(key), layouts=LAYOUTS)


def test_a_stack_gives_one_lora_per_layer_with_its_own_rank(tmp_path):
    params = scanned(
        rank_pattern={"layers.1.q": 1}, layers_to_transform=[1, 2], layers_pattern="layers"
    )
    lora = interop.save_lora(tmp_path, params)
    assert list(lora.errors) == ["layers.1.q", "layers.2.q"]
    assert lora.config["target_modules"] == ["1.q", "2.q"]
    assert (lora.config["r"], lora.config["lora_alpha"]) == (4, 4)
    assert lora.config["rank_pattern"] == lora.config["alpha_pattern"] == {r"^layers\.1\.q": 1}
    back = interop.load_lora(tmp_path, SCANNED, layouts=LAYOUTS)
    assert back["layers"]["q"]["kernel"].adapters["default"].ranks == (0, 1, 4)
    merged, want = (loha_jax.merge(tree)["layers"]["q"]["kernel"] for tree in (back, params))
    np.testing.assert_allclose(merged, want, atol=1e-6)
    assert np.abs(want).max() > 0.01


def test_the_table_of_errors_and_a_rank(tmp_path):
    params = scanned(modules_to_save=["head"])
    lora = interop.save_lora(tmp_path, params, rank=2)
    rows = str(lora).splitlines()
    assert rows[0].split() == ["module", "rank", "relative", "error"]
    assert [row.split()[:2] for row in rows[1:]] == [[f"layers.{n}.q", "2"] for n in range(3)]
    want, got = deltas(params), lora_deltas(lora)
    for name, error in lora.errors.items():
        measured = np.linalg.norm(got[name] - want[name]) / np.linalg.norm(want[name])
        assert error == pytest.approx(measured, rel=1e-4)
    assert lora.config["modules_to_save"] == ["head"]
    assert {k for k in load_file(tmp_path / "adapter_model.safetensors") if "head" in k} == {
        f"{PREFIX}head.weight",
        f"{PREFIX}head.bias",
    }
    assert lora.config == json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_the_scaling_that_the_adapter_has_now_is_in_the_factors():
    params = scanned()
    half = interop.to_lora(loha_jax.scale(params, {"default": 0.5}))
    for name, want in lora_deltas(interop.to_lora(params)).items():
        np.testing.assert_allclose(lora_deltas(half)[name], want / 2, atol=1e-7)


def test_a_weighted_sum_of_adapters_is_one_lora():
    both = loha_jax.inject(
        scanned(),
        LoHaConfig(r=1, target_modules=["q"], init_weights=False),
        key=jax.random.key(1),
        adapter_name="other",
        layouts=LAYOUTS,
    )
    mixed = loha_jax.add_weighted_adapter(both, ["default", "other"], [0.5, 2.0], "mix")
    with pytest.raises(ValueError, match="Say which adapter: the tree has default, mix, other"):
        interop.to_lora(mixed)
    one, two = (lora_deltas(interop.to_lora(mixed, name)) for name in ("default", "other"))
    lora = interop.to_lora(mixed, "mix")
    assert lora.config["r"] == 4  # of 2² + 1², no more than the weight's own
    for name, got in lora_deltas(lora).items():
        np.testing.assert_allclose(got, 0.5 * one[name] + 2 * two[name], atol=1e-6)


def test_lycoris_options_are_folded():
    base = {"q": {"kernel": jnp.ones((5, 4))}}
    config = LycorisConfig(r=2, alpha=3, target_modules=["q"], rs_lora=True, use_scalar=True)
    params = loha_jax.inject(base, config, key=jax.random.key(0))
    leaf = params["q"]["kernel"]
    factors = dataclasses.replace(leaf.adapters["default"], scalar=jnp.array(0.7))
    params = {"q": {"kernel": dataclasses.replace(leaf, adapters={"default": factors})}}
    (got,) = lora_deltas(interop.to_lora(params)).values()
    want = np.asarray(loha_jax.merge(params)["q"]["kernel"] - base["q"]["kernel"]).T
    assert np.abs(want).max() > 0.01
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize(
    ("adapted", "others", "want"),
    [
        (["a.q", "b.q"], ["a.k", "a", "b"], ["q"]),
        (["a.q"], ["b.q", "a", "b"], ["a.q"]),
        (["a.0.q", "a.1.q"], ["a.2.q", "a.0", "a.1", "a.2", "a"], ["0.q", "1.q"]),
        (["net.0", "net.3"], ["net"], ["net.0", "net.3"]),  # net.1 may be an activation
        (["out.0", "to_out.0"], [], ["out.0", "to_out.0"]),
        (["q"], ["a.q", "a"], "(q)"),
    ],
)
def test_target_modules_are_the_shortest_endings(adapted, others, want):
    assert exact_targets(set(adapted), set(others)) == want


@given(
    st.lists(
        st.lists(st.sampled_from(["a", "b", "q", "0", "1"]), min_size=1, max_size=4).map(".".join),
        unique=True,
        min_size=1,
    ),
    st.data(),
)
def test_written_target_modules_match_in_peft(names, data):
    """Target modules match the adapted modules and no other by PEFT's rules."""
    adapted = set(data.draw(st.lists(st.sampled_from(names), min_size=1)))
    targets = exact_targets(adapted, set(names))
    config = LoHaConfig(target_modules=targets)
    assert {name for name in names if match_target(name, config) is Match.TARGETED} == adapted


def test_names_decide_between_endings_and_full_names():
    names = {r"layers\.(.*)": r"model.layers.{}.\1_proj"}
    config = LoHaConfig(r=1, target_modules=["q_proj"])
    params = loha_jax.inject(SCANNED, config, key=jax.random.key(0), names=names, layouts=LAYOUTS)
    full = [f"model.layers.{n}.q_proj" for n in range(3)]
    assert interop.to_lora(params).config["target_modules"] == full
    assert interop.to_lora(params, names=names).config["target_modules"] == ["q_proj"]


def test_what_a_tree_holds_that_no_lora_can_is_refused(tmp_path):
    base = {"q": {"kernel": jnp.ones((5, 4))}, "e": {"embedding": jnp.ones((5, 4))}}

    def inject(target, cls=LoHaConfig, **kwargs):
        return loha_jax.inject(
            base, cls(r=1, target_modules=[target], **kwargs), key=jax.random.key(0)
        )

    decomposed = inject("q", LycorisConfig, weight_decompose=True)
    cases = [
        (inject("e"), {}, "e is an embedding table"),
        (inject("q"), {"groups": {"q": 2}}, r"groups\['q'\] names q, which is no convolution"),
        (
            inject("q"),
            {"groups": {"conv": 2}},
            r"groups=\['conv'\] match no adapted module; these are q",
        ),
        (inject("q"), {"adapter_name": "other"}, "Adapter other not found"),
        (inject("q"), {"rank": -1}, "`rank` should be a positive integer"),
        (inject("q"), {"dtype": "int8"}, "`dtype` should be one of floating-point numbers"),
        (
            inject("q", LycorisConfig, weight_decompose=True, wd_on_out=False),
            {},
            "q has norms per input feature",
        ),
        (
            loha_jax.scale(decomposed, {"default": 0.5}),
            {},
            "q has a weight decomposition scaled by 0.5",
        ),
    ]
    for params, kwargs, message in cases:
        with pytest.raises(ValueError, match=message):
            interop.save_lora(tmp_path / "folder", params, **kwargs)
    assert not (tmp_path / "folder").exists()
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="save_lora writes a folder"):
        interop.save_lora(tmp_path / "file", inject("q"))
    with pytest.raises(IsADirectoryError, match=r"save_lora writes a file, .*safetensors"):
        interop.save_lora(tmp_path, inject("q"), form="kohya")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_another_dtype(dtype, tmp_path):
    params = scanned(modules_to_save=["head"])
    interop.save_lora(tmp_path, params, dtype=dtype)
    state, exact = (
        load_file(tmp_path / "adapter_model.safetensors"),
        interop.to_lora(params).tensors,
    )
    assert {str(t.dtype) for k, t in state.items() if ".lora_" in k} == {dtype}
    assert {str(t.dtype) for k, t in state.items() if "head" in k} == {"float32"}
    for key, tensor in exact.items():
        np.testing.assert_array_equal(state[key], tensor.astype(state[key].dtype))


def test_values_too_large_for_the_dtype(tmp_path):
    """Values too large for the dtype are an error and nothing is written."""
    params = jax.tree.map(lambda x: x * 1e4, scanned())
    with pytest.raises(
        ValueError, match=r"layers\.0\.q\.lora_.\.weight has values up to .*, too large for float16"
    ):
        interop.save_lora(tmp_path / "folder", params, dtype="float16")
    assert not (tmp_path / "folder").exists()


def test_an_adapter_keeps_the_names_that_it_was_made_with(tmp_path):
    """`names=` of `save_lora` cannot rename: it would be silently left out of the file."""
    base = {"attn": {"query": {"kernel": np.ones((4, 4), np.float32)}}}
    names = {r"attn\.query": "self_attn.q_proj"}
    config = LoHaConfig(r=1, target_modules=["query"], init_weights=False)
    params = loha_jax.inject(base, config, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"attn\.query of this adapter self_attn\.q_proj"):
        interop.save_lora(tmp_path / "lora", params, names=names)
    assert not (tmp_path / "lora").exists()
    config = dataclasses.replace(config, target_modules=["q_proj"])
    params = loha_jax.inject(base, config, key=jax.random.key(0), names=names)
    interop.save_lora(tmp_path / "lora", params, names=names)
    keys = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {key.removeprefix(PREFIX) for key in keys} == {
        f"self_attn.q_proj.lora_{part}.weight" for part in "AB"
    }
