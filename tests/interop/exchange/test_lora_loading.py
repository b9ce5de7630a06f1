import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lora_folders import PREFIX
from safetensors.numpy import load_file, save_file

import loha_jax
from loha_jax import LoHaConfig, interop
from loha_jax.interop.formats.lora_files import read_lora
from loha_jax.interop.formats.read_adapter import read_adapter
from loha_jax.runtime.untrusted import FileError

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
    state = {
        PREFIX + name: random.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    for name, tensor in tensors.items():
        if tensor is None:
            del state[PREFIX + name]
        else:
            state[PREFIX + name] = tensor
    values = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q", "conv"],
        "bias": "none",
    }
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
        delta = (
            (b.reshape(b.shape[0], r) @ a.reshape(r, -1)) * alpha / (math.sqrt(r) if rslora else r)
        )
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
    assert {
        name: lora.tensors[f"{PREFIX}{name}.lora_A.weight"].shape[0] for name in ("q", "conv")
    } == {
        "q": 2,
        "conv": 3,
    }


def test_gradients_with_and_without_a_key(tmp_path):
    """With a key the second pair gets gradients and without it the first column alone."""
    write_lora(tmp_path)

    def gradients(key):
        trainable, frozen = loha_jax.partition(interop.load_lora(tmp_path, BASE, key=key))
        target = jnp.linspace(0, 1, 20).reshape(5, 4)

        def loss(trainable):
            return jnp.sum(
                (jnp.asarray(loha_jax.combine(trainable, frozen)["q"]["kernel"]) - target) ** 2
            )

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
    write_lora(
        tmp_path,
        {"modules_to_save": ["head"]},
        **{"other.weight": np.ones(3), "head.weight": np.ones((2, 5))},
    )
    base = {
        **BASE,
        "q": {"kernel": jnp.ones((6, 4))},
        "a": {"conv": {"kernel": jnp.ones((3, 3, 2, 3))}},
    }
    layouts = {r"(a\.)?conv": "kkio"}
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        interop.load_lora(tmp_path, base, layouts=layouts)
    message = str(error.value)
    assert str(tmp_path) in message
    assert f"unexpected keys (1): {PREFIX}other.weight" in message
    assert (
        f"missing keys (2): {PREFIX}a.conv.lora_A.weight, {PREFIX}a.conv.lora_B.weight" in message
    )
    assert f"{PREFIX}q.lora_A.weight: [2, 5] in the file, [2, 6] in the model" in message
    assert f"{PREFIX}head.weight: [2, 5] in the file, [2, 4] in the model" in message


ONE = np.ones((2, 2), np.float32)


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"bias": "all"}, {}, "bias='all': trained biases have no place"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            {},
            "init_lora_weights='pissa_niter_4' changes the base weights",
        ),
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
        (
            {},
            {"e.lora_embedding_A": ONE},
            r"e\.lora_embedding_A \(lora_embedding_A\) belongs to a variant",
        ),
        ({}, {"q.lora_B.bias": ONE}, r"q\.lora_B\.bias \(lora_B\) belongs to a variant"),
        (
            {},
            {"q.lora_A.weight": np.ones((3, 5))},
            r"q do not fit each other: lora_A \[3, 5\], lora_B \[4, 2\]",
        ),
        (
            {},
            {"q.lora_A.weight": np.ones((4, 5))},
            "q do not fit each other",
        ),  # two groups of a Linear
        ({}, {"q.lora_A.weight": np.ones((0, 5))}, "q do not fit each other"),
        ({}, {"q.lora_A.weight": np.ones((2, 5), np.int32)}, "q.lora_A is int32"),
        (
            {},
            {"conv.lora_A.weight": np.ones((6, 2, 3, 3))},
            "conv do not fit each other",
        ),  # 2 groups, 3 outs
        ({"rank_pattern": {}}, {}, r"conv have rank 3 .*adapter_config\.json says 2"),
        ({}, {"q.lora_magnitude_vector": np.ones(4)}, "does not say use_dora"),
        ({"use_dora": True}, {}, "(q|conv) lacks lora_magnitude_vector"),
        (
            {"use_dora": True},
            {f"{n}.lora_magnitude_vector": np.ones(7) for n in ("q", "conv")},
            "does not fit its",
        ),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_name(config, tensors, message, tmp_path):
    write_lora(tmp_path, config, **tensors)
    with pytest.raises(FileError, match=message) as error:
        read_lora(tmp_path)
    assert str(tmp_path) in str(error.value)
    with pytest.raises(ValueError, match=message):
        interop.load_lora(tmp_path, BASE)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "{}", '{"peft_type": "LORA", "target_modules": 3}']
)
def test_broken_configs_are_named(text, tmp_path):
    write_lora(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(FileError, match=r"adapter_config\.json"):
        read_lora(tmp_path)


def test_a_convolution_in_groups_loads(tmp_path):
    """A convolution in groups loads where it reads its own channels alone."""
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
    with pytest.raises(
        ValueError, match="conv is a convolution in 3 groups, and lora_A of group 0 reads channels"
    ):
        interop.load_lora(tmp_path, base)


def test_read_adapter_reads_lora_folders(tmp_path):
    """`read_adapter` reads LoRA folders and the keys of a model's state dict."""
    state = write_lora(
        tmp_path,
        {"use_rslora": True, "modules_to_save": ["head"]},
        **{"head.weight": np.ones((2, 4))},
    )
    file = read_adapter(tmp_path)
    assert (file.form, set(file.modules), set(file.others)) == (
        "lora",
        {"q", "conv"},
        {"head.weight"},
    )
    assert file.modules["conv"].r == 3
    assert file.modules["conv"].alpha == pytest.approx(4 * math.sqrt(3))
    np.testing.assert_array_equal(file.modules["q"].tensors["lora_A"], state["q.lora_A.weight"])
    path = tmp_path / "adapter_model.safetensors"
    named = {
        k.replace("lora_A.", "lora_A.style.").replace("lora_B.", "lora_B.style."): v
        for k, v in load_file(path).items()
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
