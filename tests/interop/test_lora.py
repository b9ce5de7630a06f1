"""LoHa as LoRA and back: the mathematics against dense float64, the files, and what is refused."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from loha_jax.interop.disk.tensor_files import FileError
from loha_jax.interop.formats.adapter_file import AdapterModule
from loha_jax.interop.formats.lora_config import exact_targets
from loha_jax.interop.formats.lora_files import read_lora
from loha_jax.interop.formats.read_adapter import read_adapter
from loha_jax.interop.updates.lora_conversion import loha_of, lora_of
from peft_samples import NAMES, Sample
from safetensors.numpy import load_file, save_file

import loha_jax
from loha_jax import LoHaConfig, LycorisConfig, interop
from loha_jax.targets.matching import match_target
from loha_jax.tree.leaves import LoHaWeight, is_adapted

PREFIX = "base_model.model."


def loha(shape, r, cp=False, seed=0, alpha=3.0, dtype=np.float32):
    """A module with random factors for a weight `[out, in/groups, *spatial]`."""
    random = np.random.default_rng(seed)
    out, in_, *spatial = shape
    if cp:
        core = (r, r, *spatial, *((1,) if len(spatial) == 1 else ()))
        shapes = {"w1_a": (r, out), "w1_b": (r, in_), "w2_a": (r, out), "w2_b": (r, in_), "t1": core, "t2": core}
    else:
        a, b = (out, r), (r, in_ * math.prod(spatial))
        shapes = {"w1_a": a, "w1_b": b, "w2_a": a, "w2_b": b}
    tensors = {f"hada_{part}": random.standard_normal(s).astype(dtype) for part, s in shapes.items()}
    return AdapterModule("m", "loha", r, alpha, tensors)


def dense(module, shape):
    """ΔW by the definition, in float64."""
    t = {part: tensor.astype(np.float64) for part, tensor in module.tensors.items()}
    if "hada_t1" in t:
        halves = [np.einsum("ij...,jr,ip->pr...", t[f"hada_t{n}"], t[f"hada_w{n}_b"], t[f"hada_w{n}_a"]) for n in "12"]
    else:
        halves = [t[f"hada_w{n}_a"] @ t[f"hada_w{n}_b"] for n in "12"]
    return (halves[0] * halves[1]).reshape(shape) * module.alpha / module.r


def over_all_channels(weight, groups):
    """A grouped convolution's weight as the one of a convolution without groups, `[out, in, *spatial]`."""
    out, in_ = weight.shape[:2]
    whole = np.zeros((out, groups * in_, *weight.shape[2:]))
    for row in range(out):
        group = row // (out // groups)
        whole[row, group * in_ : (group + 1) * in_] = weight[row]
    return whole


def dense_lora(module):
    """What PEFT's lora_A and the grouped lora_B compute, as one convolution over all channels."""
    a, b = (module.tensors[part].astype(np.float64) for part in ("lora_A", "lora_B"))
    out, slots = b.shape[:2]
    groups = a.shape[0] // slots
    rows = []
    for row in range(out):
        own = a[(row // (out // groups)) * slots :][:slots]
        rows.append(np.tensordot(b[row].reshape(-1), own, 1))
    return np.stack(rows) * module.alpha / module.r


LINEAR, WIDE, CONV1D, CONV2D, CONV3D = (9, 7), (4, 30), (6, 4, 3), (6, 4, 3, 2), (5, 3, 2, 1, 3)
CASES = [
    pytest.param(shape, r, cp, groups, id=f"{'x'.join(map(str, shape))}-r{r}{'-cp' * cp}{f'-g{groups}' * (groups > 1)}")
    for shape, r, cp, groups in [
        (LINEAR, 1, False, 1),
        (LINEAR, 2, False, 1),
        (LINEAR, 3, False, 1),  # r² larger than both axes
        (WIDE, 3, False, 1),  # r² larger than out
        (CONV1D, 2, False, 1),
        (CONV1D, 2, True, 1),
        (CONV2D, 2, False, 1),
        (CONV2D, 2, True, 1),
        ((6, 4, 1, 1), 2, False, 1),
        (CONV3D, 2, False, 1),
        (CONV3D, 2, True, 1),
        (CONV2D, 1, False, 2),
        (CONV2D, 2, False, 3),
        (CONV2D, 2, True, 2),
        ((6, 1, 3, 3), 2, False, 6),  # depthwise
        ((8, 2, 3), 2, True, 4),
    ]
]


@pytest.mark.parametrize(("shape", "r", "cp", "groups"), CASES)
def test_the_exact_lora(shape, r, cp, groups):
    module = loha(shape, r, cp, dtype=np.float64)
    lora, error = lora_of(module, shape=shape, groups=groups)
    want = dense(module, shape)
    np.testing.assert_allclose(
        dense_lora(lora), over_all_channels(want, groups), rtol=0, atol=1e-12 * np.abs(want).max()
    )
    assert error == 0
    per_group = min(r * r, shape[0] // groups, math.prod(shape[1:]))
    assert lora.r == lora.alpha == groups * per_group
    assert lora.tensors["lora_A"].shape == (lora.r, groups * shape[1], *shape[2:])
    assert lora.tensors["lora_B"].shape == (shape[0], per_group, *(1,) * (len(shape) - 2))


def singular_values(weight, groups):
    """Squares of a dense weight's, group by group: `[groups, n]`."""
    blocks = weight.reshape(groups, weight.shape[0] // groups, -1)
    return np.linalg.svd(blocks, compute_uv=False) ** 2


@pytest.mark.parametrize(("shape", "r", "cp", "groups"), CASES)
def test_a_smaller_rank_is_the_best_one_and_its_error_the_measured_one(shape, r, cp, groups):
    module = loha(shape, r, cp, dtype=np.float64)
    want = dense(module, shape)
    squares = singular_values(want, groups)
    exact, _ = lora_of(module, shape=shape, groups=groups)
    for rank in range(1, exact.r + 3):
        lora, error = lora_of(module, rank, shape=shape, groups=groups)
        slots = min(math.ceil(rank / groups), exact.r // groups)
        assert lora.r == slots * groups
        difference = dense_lora(lora) - over_all_channels(want, groups)
        measured = np.linalg.norm(difference) / np.linalg.norm(want)
        best = math.sqrt(squares[:, slots:].sum() / squares.sum())  # Eckart and Young
        assert measured == pytest.approx(best, abs=1e-7)
        assert error == pytest.approx(measured, abs=1e-7)


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    r=st.integers(1, 3),
    energy=st.floats(0.01, 1),
    seed=st.integers(0, 99),
)
def test_an_energy_threshold_keeps_the_fewest_singular_values_that_reach_it(shape, r, energy, seed):
    module = loha(shape, r, seed=seed, dtype=np.float64)
    squares = singular_values(dense(module, shape), 1)[0]
    lora, error = lora_of(module, energy=energy)
    kept = squares[: lora.r].sum() / squares.sum()
    before = squares[: lora.r - 1].sum() / squares.sum()
    assert before - 1e-12 < energy <= kept + 1e-12
    assert 1 - error**2 == pytest.approx(kept, abs=1e-9)


def test_an_energy_of_all_groups_counts_together():
    module = loha((8, 2, 3, 3), 2, dtype=np.float64)
    squares = singular_values(dense(module, (8, 2, 3, 3)), 2)
    lora, error = lora_of(module, energy=0.8, shape=(8, 2, 3, 3), groups=2)
    slots = lora.r // 2
    assert squares[:, : slots - 1].sum() < 0.8 * squares.sum() <= squares[:, :slots].sum()
    assert error == pytest.approx(math.sqrt(squares[:, slots:].sum() / squares.sum()))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("limit", [{}, {"rank": 3}, {"energy": 0.5}, {"energy": 1.0}])
def test_no_update_is_rank_one_of_zeros(limit, groups):
    module = loha((4, 3), 2)
    module.tensors["hada_w2_b"][:] = 0
    lora, error = lora_of(module, **limit, shape=(4, 3, 1), groups=groups)
    assert (lora.r, error) == (groups, 0)
    assert not lora.tensors["lora_A"].any()
    assert not lora.tensors["lora_B"].any()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_low_precision_is_computed_in_float64_and_given_in_float32(dtype):
    module = loha((40, 30), 3, dtype=dtype)
    want = dense(module, (40, 30))
    for rank, slack in ((None, 0), (5, np.sqrt(singular_values(want, 1)[0][5:].sum()))):
        lora, _ = lora_of(module, rank)
        assert {t.dtype for t in lora.tensors.values()} == {np.dtype(np.float32)}
        assert np.linalg.norm(dense_lora(lora) - want) <= slack + 1e-6 * np.linalg.norm(want)


def test_a_lora_can_be_lowered_in_rank_too():
    module = loha((9, 7), 2, dtype=np.float64)
    lora, _ = lora_of(module)
    direct, twice = lora_of(module, 2), lora_of(lora, 2)
    assert twice[1] == pytest.approx(direct[1])
    np.testing.assert_allclose(dense_lora(twice[0]), dense_lora(direct[0]), atol=1e-12)


@pytest.mark.parametrize(
    ("change", "kwargs", "message"),
    [
        ({}, {"rank": 1, "energy": 0.5}, "`rank` or `energy`, not both"),
        ({}, {"rank": 0}, "`rank` should be a positive integer"),
        ({}, {"rank": True}, "`rank` should be a positive integer"),
        ({}, {"rank": 0.5}, "`rank` should be a positive integer"),
        ({}, {"energy": 0.0}, r"`energy` should be a share in \(0, 1\]"),
        ({}, {"energy": 1.5}, r"`energy` should be a share in \(0, 1\]"),
        ({}, {"energy": float("nan")}, r"`energy` should be a share in \(0, 1\]"),
        ({}, {"shape": (4, 5)}, r"m has 4 rows and 6 columns; the weight's shape \[4, 5\]"),
        ({}, {"shape": (4, 2, 3), "groups": 3}, "m has 4 out channels, which 3 groups do not divide"),
        ({}, {"shape": (4, 2, 3), "groups": 0}, "The groups of m should be a positive integer value but are 0"),
        ({"dora_scale": np.ones((1, 6))}, {}, r"m has norms per input feature \[1, 6\]"),
        ({"dora_scale": np.ones((4, 1, 1))}, {"shape": (4, 2, 3), "groups": 2}, "m is a convolution in 2 groups with"),
    ],
)
def test_what_lora_of_refuses(change, kwargs, message):
    module = dataclasses.replace(loha((4, 6), 2), **change)
    with pytest.raises(ValueError, match=message):
        lora_of(module, **kwargs)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_factors_that_are_not_finite_are_named(value):
    module = loha((4, 6), 2)
    module.tensors["hada_w2_a"][1, 1] = value
    with pytest.raises(ValueError, match=r"m\.hada_w2_a has values that are not finite"):
        lora_of(module, 1)


@pytest.mark.parametrize(("shape", "groups"), [((5, 4), 1), ((6, 4, 3), 1), ((6, 2, 3, 3), 2), ((6, 1, 2), 6)])
@pytest.mark.parametrize("random", [False, True])
def test_a_lora_is_exactly_a_loha_and_back(shape, groups, random):
    lora, _ = lora_of(loha(shape, 2), shape=shape, groups=groups)
    spare = np.random.default_rng(1).standard_normal((shape[0], lora.r)) if random else None
    back = loha_of(dataclasses.replace(lora, alpha=0.5), spare)
    assert (back.kind, back.r, back.alpha) == ("loha", lora.r, 0.5)
    got = over_all_channels(dense(back, shape), groups)
    np.testing.assert_allclose(got, dense_lora(lora) * 0.5 / lora.r, atol=1e-12)
    again, error = lora_of(back, shape=shape, groups=groups)
    # the columns that are zero do not count: the rank is LoRA's own, but for the blocks of groups
    assert again.r <= lora.r
    assert error == 0
    np.testing.assert_allclose(dense_lora(again), got, atol=1e-6)


# --- trees and folders ------------------------------------------------------------------------------------------------


def adapted(sample):
    return interop.load_peft(sample.adapter, sample.params(), layouts=sample.layouts, model_type="llama")


def deltas(params, adapter_name=None):
    """ΔW of each module from PEFT's own tensors, by name and in float64: `[out, columns]`."""
    state = interop.to_peft_state_dict(params, adapter_name)
    result = {}
    for leaf in jax.tree.leaves(params, is_leaf=is_adapted):
        if isinstance(leaf, LoHaWeight):
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
            r = lora.config["rank_pattern"].get(f"^{name.replace('.', chr(92) + '.')}", lora.config["r"])
            alpha = lora.config["alpha_pattern"].get(f"^{name.replace('.', chr(92) + '.')}", lora.config["lora_alpha"])
            assert a.shape[0] == r == alpha
            result[name] = b.reshape(b.shape[0], -1) @ a.reshape(r, -1).astype(np.float64)
    return result


@pytest.mark.parametrize("name", [name for name in NAMES if "bin" not in name and "grouped" not in name])
def test_the_samples_of_peft(name):
    sample = Sample(name)
    params = adapted(sample)
    lora, want = interop.to_lora(params), deltas(params)
    got = lora_deltas(lora)
    assert got.keys() == want.keys() == lora.errors.keys()
    for module in want:
        np.testing.assert_allclose(got[module], want[module], rtol=0, atol=1e-6 * np.abs(want[module]).max())
    others = {k for k in interop.to_peft_state_dict(params) if "hada_" not in k}
    assert others == {k for k in lora.tensors if ".lora_" not in k}
    targets = LoHaConfig(target_modules=lora.config["target_modules"])
    assert {m for m in sample.meta["layers"] if match_target(m, targets) is True} == set(want)


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
    params = scanned(rank_pattern={"layers.1.q": 1}, layers_to_transform=[1, 2], layers_pattern="layers")
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
def test_target_modules_match_the_adapted_modules_and_no_other_by_pefts_rules(names, data):
    adapted = set(data.draw(st.lists(st.sampled_from(names), min_size=1)))
    targets = exact_targets(adapted, set(names))
    config = LoHaConfig(target_modules=targets)
    assert {name for name in names if match_target(name, config) is True} == adapted


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
        return loha_jax.inject(base, cls(r=1, target_modules=[target], **kwargs), key=jax.random.key(0))

    decomposed = inject("q", LycorisConfig, weight_decompose=True)
    cases = [
        (inject("e"), {}, "e is an embedding table"),
        (inject("q"), {"groups": {"q": 2}}, r"groups\['q'\] names q, which is no convolution"),
        (inject("q"), {"groups": {"conv": 2}}, r"groups=\['conv'\] match no adapted module; these are q"),
        (inject("q"), {"adapter_name": "other"}, "Adapter other not found"),
        (inject("q"), {"rank": -1}, "`rank` should be a positive integer"),
        (inject("q"), {"dtype": "int8"}, "`dtype` should be one of floating-point numbers"),
        (inject("q", LycorisConfig, weight_decompose=True, wd_on_out=False), {}, "q has norms per input feature"),
        (loha_jax.scale(decomposed, {"default": 0.5}), {}, "q has a weight decomposition scaled by 0.5"),
    ]
    for params, kwargs, message in cases:
        with pytest.raises(ValueError, match=message):
            interop.save_lora(tmp_path / "folder", params, **kwargs)
    assert not (tmp_path / "folder").exists()
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="save_lora writes a folder"):
        interop.save_lora(tmp_path / "file", inject("q"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_another_dtype(dtype, tmp_path):
    params = scanned(modules_to_save=["head"])
    interop.save_lora(tmp_path, params, dtype=dtype)
    state, exact = load_file(tmp_path / "adapter_model.safetensors"), interop.to_lora(params).tensors
    assert {str(t.dtype) for k, t in state.items() if ".lora_" in k} == {dtype}
    assert {str(t.dtype) for k, t in state.items() if "head" in k} == {"float32"}
    for key, tensor in exact.items():
        np.testing.assert_array_equal(state[key], tensor.astype(state[key].dtype))


def test_values_too_large_for_the_dtype_are_an_error_and_nothing_is_written(tmp_path):
    params = jax.tree.map(lambda x: x * 1e4, scanned())
    with pytest.raises(ValueError, match=r"layers\.0\.q\.lora_.\.weight has values up to .*, too large for float16"):
        interop.save_lora(tmp_path / "folder", params, dtype="float16")
    assert not (tmp_path / "folder").exists()


# --- the way in -------------------------------------------------------------------------------------------------------

BASE = {
    "q": {"kernel": jnp.linspace(-1, 1, 20).reshape(5, 4), "bias": jnp.zeros(4)},
    "conv": {"kernel": jnp.linspace(-1, 1, 54).reshape(3, 3, 2, 3)},
    "head": {"kernel": jnp.ones((4, 2))},
}


def write_lora(folder, config=None, **tensors):
    """A LoRA folder as PEFT writes it: `q` of rank 2 and `conv` of rank 3."""
    random = np.random.default_rng(0)
    shapes = {
        "q.lora_A.weight": (2, 5),
        "q.lora_B.weight": (4, 2),
        "conv.lora_A.weight": (3, 2, 3, 3),
        "conv.lora_B.weight": (3, 3, 1, 1),
    }
    state = {PREFIX + name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        if tensor is None:
            del state[PREFIX + name]
        else:
            state[PREFIX + name] = tensor
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q", "conv"], "bias": "none"}
    values |= {"rank_pattern": {"conv": 3}, "alpha_pattern": {"q": 5}} | (config or {})
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return {name: state.get(PREFIX + name) for name in shapes}


@pytest.mark.parametrize("key", [None, jax.random.key(3)])
@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_and_rank_stabilisation(key, rslora, tmp_path):
    state = write_lora(tmp_path, {"use_rslora": rslora})
    params = interop.load_lora(tmp_path, BASE, key=key)
    merged = loha_jax.merge(params)
    for name, r, alpha in (("q", 2, 5), ("conv", 3, 4)):
        a, b = (state[f"{name}.lora_{part}.weight"].astype(np.float64) for part in "AB")
        delta = (b.reshape(b.shape[0], r) @ a.reshape(r, -1)) * alpha / (math.sqrt(r) if rslora else r)
        want = np.moveaxis(delta.reshape(b.shape[0], *a.shape[1:]), (0, 1), (-1, -2))
        np.testing.assert_allclose(merged[name]["kernel"] - BASE[name]["kernel"], want, atol=1e-5)
        factors = params[name]["kernel"].adapters["default"]
        np.testing.assert_array_equal(factors.hada_w1_a, b.reshape(b.shape[0], r))
        np.testing.assert_array_equal(factors.hada_w1_b, a.reshape(r, -1))
        assert bool(np.asarray(factors.hada_w2_a)[:, 1:].any()) == (key is not None)
    interop.save_peft(tmp_path / "loha", params)
    again = loha_jax.merge(interop.load_peft(tmp_path / "loha", BASE))
    for name in ("q", "conv"):
        np.testing.assert_allclose(again[name]["kernel"], merged[name]["kernel"], atol=1e-6)
    lora = interop.to_lora(params)
    assert {name: lora.tensors[f"{PREFIX}{name}.lora_A.weight"].shape[0] for name in ("q", "conv")} == {
        "q": 2,
        "conv": 3,
    }


def test_with_a_key_the_second_pair_gets_gradients_and_without_it_the_first_column_alone(tmp_path):
    write_lora(tmp_path)

    def gradients(key):
        trainable, frozen = loha_jax.partition(interop.load_lora(tmp_path, BASE, key=key))
        target = jnp.linspace(0, 1, 20).reshape(5, 4)

        def loss(trainable):
            return jnp.sum((jnp.asarray(loha_jax.combine(trainable, frozen)["q"]["kernel"]) - target) ** 2)

        return jax.grad(loss)(trainable)["q"]["kernel"].adapters["default"]

    with_key, without = gradients(jax.random.key(0)), gradients(None)
    assert np.abs(with_key.hada_w2_b).min() > 0
    assert np.abs(with_key.hada_w2_a[:, 0]).min() > 0
    assert not np.any(without.hada_w2_b[1:])
    assert not np.any(without.hada_w2_a[:, 1:])
    assert np.abs(without.hada_w2_b[0]).min() > 0


def test_an_adapted_tree_gets_one_more_adapter(tmp_path):
    write_lora(tmp_path)
    one = loha_jax.inject(BASE, LoHaConfig(r=1, target_modules=["q"]), key=jax.random.key(0))
    both = interop.load_lora(tmp_path, one, adapter_name="style")
    assert loha_jax.adapter_names(both) == ("default", "style")
    assert both["q"]["kernel"].active == ("style",)
    assert both["q"]["kernel"].kernel is BASE["q"]["kernel"]
    with pytest.raises(ValueError, match="already exists"):
        interop.load_lora(tmp_path, both, adapter_name="style")


def test_everything_that_does_not_fit_is_in_one_error(tmp_path):
    write_lora(tmp_path, {"modules_to_save": ["head"]}, **{"other.weight": np.ones(3), "head.weight": np.ones((2, 5))})
    base = {**BASE, "q": {"kernel": jnp.ones((6, 4))}, "a": {"conv": {"kernel": jnp.ones((3, 3, 2, 3))}}}
    layouts = {r"(a\.)?conv": "kkio"}
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        interop.load_lora(tmp_path, base, layouts=layouts)
    message = str(error.value)
    assert str(tmp_path) in message
    assert f"unexpected keys (1): {PREFIX}other.weight" in message
    assert f"missing keys (2): {PREFIX}a.conv.lora_A.weight, {PREFIX}a.conv.lora_B.weight" in message
    assert f"{PREFIX}q.lora_A.weight: [2, 5] in the file, [2, 6] in the model" in message
    assert f"{PREFIX}head.weight: [2, 5] in the file, [2, 4] in the model" in message


ONE = np.ones((2, 2), np.float32)


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"bias": "all"}, {}, "bias='all': trained biases have no place"),
        ({"init_lora_weights": "pissa_niter_4"}, {}, "init_lora_weights='pissa_niter_4' changes the base weights"),
        ({"init_lora_weights": "loftq"}, {}, "path_initial_model_for_weight_conversion"),
        ({"use_qalora": True}, {}, "use_qalora=True: loha_jax knows no LoHa"),
        ({"alora_invocation_tokens": [1]}, {}, r"alora_invocation_tokens=\[1\]"),
        ({"layer_replication": [[0, 2]]}, {}, "layer_replication"),
        ({"trainable_token_indices": [0]}, {}, "trainable_token_indices"),
        ({"use_a_variant_of_2030": {"size": 2}}, {}, "use_a_variant_of_2030"),
        ({"lora_bias": True}, {}, "lora_bias=True"),
        ({"peft_type": "LOHA"}, {}, "of a 'LOHA' adapter, not of a 'LORA' one"),
        ({"r": 0}, {}, "`r` should be a positive integer"),
        ({"lora_alpha": "x"}, {}, "`alpha` should be a finite number"),
        ({"use_dora": 1}, {}, "`use_dora` should be true or false"),
        ({}, {"q.lora_A.weight": None}, "q lacks lora_A; it has lora_B"),
        ({}, {"e.lora_embedding_A": ONE}, r"e\.lora_embedding_A \(lora_embedding_A\) belongs to a variant"),
        ({}, {"q.lora_B.bias": ONE}, r"q\.lora_B\.bias \(lora_B\) belongs to a variant"),
        ({}, {"q.lora_A.weight": np.ones((3, 5))}, r"q do not fit each other: lora_A \[3, 5\], lora_B \[4, 2\]"),
        ({}, {"q.lora_A.weight": np.ones((4, 5))}, "q do not fit each other"),  # two groups of a Linear
        ({}, {"q.lora_A.weight": np.ones((0, 5))}, "q do not fit each other"),
        ({}, {"q.lora_A.weight": np.ones((2, 5), np.int32)}, "q.lora_A is int32"),
        ({}, {"conv.lora_A.weight": np.ones((6, 2, 3, 3))}, "conv do not fit each other"),  # 2 groups, 3 outs
        ({"rank_pattern": {}}, {}, r"conv have rank 3 .*adapter_config\.json says 2"),
        ({}, {"q.lora_magnitude_vector": np.ones(4)}, "does not say use_dora"),
        ({"use_dora": True}, {}, "(q|conv) lacks lora_magnitude_vector"),
        ({"use_dora": True}, {f"{n}.lora_magnitude_vector": np.ones(7) for n in ("q", "conv")}, "does not fit its"),
    ],
)  # fmt: skip
def test_what_is_no_plain_lora_is_refused_by_name(config, tensors, message, tmp_path):
    write_lora(tmp_path, config, **tensors)
    with pytest.raises(FileError, match=message) as error:
        read_lora(tmp_path)
    assert str(tmp_path) in str(error.value)
    with pytest.raises(ValueError, match=message):
        interop.load_lora(tmp_path, BASE)


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", '{"peft_type": "LORA", "target_modules": 3}'])
def test_broken_configs_are_named(text, tmp_path):
    write_lora(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(FileError, match=r"adapter_config\.json"):
        read_lora(tmp_path)


def test_a_convolution_in_groups_loads_where_it_reads_its_own_channels_alone(tmp_path):
    base = {"conv": {"kernel": jnp.zeros((3, 3, 2, 6)), "bias": jnp.zeros(6)}}
    params = loha_jax.inject(
        base, LoHaConfig(r=2, target_modules=["conv"], init_weights=False), key=jax.random.key(0)
    )  # fmt: skip
    interop.save_lora(tmp_path, params, groups={"conv": 3})
    back = interop.load_lora(tmp_path, base)
    merged, want = (loha_jax.merge(tree)["conv"]["kernel"] for tree in (back, params))
    np.testing.assert_allclose(merged, want, atol=1e-6)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    state[f"{PREFIX}conv.lora_A.weight"][0, 5] = 1
    save_file(state, path)
    with pytest.raises(ValueError, match="conv is a convolution in 3 groups, and lora_A of group 0 reads channels"):
        interop.load_lora(tmp_path, base)


def test_read_adapter_reads_lora_folders_and_the_keys_of_a_models_state_dict(tmp_path):
    state = write_lora(tmp_path, {"use_rslora": True, "modules_to_save": ["head"]}, **{"head.weight": np.ones((2, 4))})
    file = read_adapter(tmp_path)
    assert (file.form, set(file.modules), set(file.others)) == ("lora", {"q", "conv"}, {"head.weight"})
    assert file.modules["conv"].r == 3
    assert file.modules["conv"].alpha == pytest.approx(4 * math.sqrt(3))
    np.testing.assert_array_equal(file.modules["q"].tensors["lora_A"], state["q.lora_A.weight"])
    path = tmp_path / "adapter_model.safetensors"
    named = {
        k.replace("lora_A.", "lora_A.style.").replace("lora_B.", "lora_B.style."): v for k, v in load_file(path).items()
    }
    save_file(named, path)
    for name, module in read_adapter(tmp_path).modules.items():
        for part, tensor in module.tensors.items():
            np.testing.assert_array_equal(tensor, file.modules[name].tensors[part])


def test_nnx_models(tmp_path):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.q = nnx.Linear(5, 4, rngs=rngs)

    model = Model(nnx.Rngs(0))
    x, base = jnp.ones((2, 5)), Model(nnx.Rngs(0))
    config = LoHaConfig(r=2, target_modules=["q"], init_weights=False)
    loha_jax.inject(model, config, key=jax.random.key(0))
    interop.save_lora(tmp_path, model)
    assert np.abs(model.q(x) - base.q(x)).max() > 0.01
    interop.load_lora(tmp_path, base)
    np.testing.assert_allclose(base.q(x), model.q(x), atol=1e-5)
