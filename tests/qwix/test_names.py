"""`LoHaProvider(names=...)`: torch names in files, and in the config's targets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import linen as nn
from flax import nnx
from qwix_models import BASES, Attention, LinenModel, Stack, arrays, randomise, tokens
from random_arrays import normal_array

from loha_jax import LoHaConfig, interop
from loha_jax.interop import RowTransform
from loha_jax.qwix import LoHaProvider, linen_tree

NAMES = {
    "query": "encoder.attention.query",
    "out": "encoder.attention.output",
    "mlp": "encoder.mlp",
}


def adapted(model, **fields):
    provider = LoHaProvider(**fields)
    model = qwix.apply_lora_to_model(model, provider, tokens(), rngs=nnx.Rngs(1))
    randomise(model)
    return model


def modules(tree):
    keys = interop.to_peft_state_dict(tree)
    return {key.removeprefix("base_model.model.").rsplit(".", 1)[0] for key in keys}


@pytest.mark.parametrize("base", ["float", "int8", "nf4"])
def test_files_have_torch_names(base, tmp_path):
    """They go into the file, and a model that has the names reads it."""
    rule = {"module_path": ".*", "rank": 2, "alpha": 4.0, **BASES[base]}
    model = adapted(Attention(nnx.Rngs(0)), names=NAMES, **rule)
    assert modules(model) == set(NAMES.values())
    interop.save_peft(tmp_path, model)
    again = qwix.apply_lora_to_model(
        Attention(nnx.Rngs(0)), LoHaProvider(names=NAMES, **rule), tokens(), rngs=nnx.Rngs(2)
    )
    interop.load_peft(tmp_path, again, names=NAMES, adapter_name="read")
    np.testing.assert_array_equal(again(tokens()), model(tokens()))
    float_model = interop.load_peft(tmp_path, Attention(nnx.Rngs(0)), names=NAMES)
    for path, value in arrays(float_model, nnx.LoRAParam).items():
        np.testing.assert_array_equal(value, arrays(model, nnx.LoRAParam)[path])


def test_config_targets_torch_names():
    """Targets and patterns are matched as `loha_jax.nnx.inject(names=...)` matches them."""
    config = LoHaConfig(
        r=2, target_modules=r"encoder\.attention\..*", rank_pattern={"attention.output": 3}
    )
    model = adapted(Attention(nnx.Rngs(0)), config=config, names=NAMES)
    assert modules(model) == {"encoder.attention.query", "encoder.attention.output"}
    assert model.out.kernel_lora_hada_w1_a.get_value().shape == (16, 3)


def test_scanned_stack():
    """One name with a place for the index; without it, the error says so."""
    rule = {"module_path": ".*", "rank": 2, "alpha": 4.0}
    model = adapted(Stack(3, 16, nnx.Rngs(0)), names={"layers": "model.layers.{}.proj"}, **rule)
    assert modules(model) == {f"model.layers.{n}.proj" for n in range(3)}
    model = adapted(Stack(3, 16, nnx.Rngs(0)), names={"layers": "proj"}, **rule)
    with pytest.raises(ValueError, match=r"layers 'proj', but its kernel holds 3 module.*\{\}"):
        modules(model)


@pytest.mark.parametrize(
    "fields",
    [
        {"exclude_modules": ["layers.0"]},
        {"rank_pattern": {"layers.1": 1}},
        {"alpha_pattern": {"layers.2": 8.0}},
    ],
)
def test_single_modules_of_a_scanned_stack(fields):
    """A scan adapts all of its layers at once: what a config says of one is refused."""
    stack = {"names": {"layers": "layers.{}"}}
    config = LoHaConfig(r=2, alpha=4.0, target_modules=r"layers.*", **fields)
    with pytest.raises(ValueError, match=r"not say the same of all modules of the stack.*inject"):
        adapted(Stack(3, 16, nnx.Rngs(0)), config=config, **stack)


def test_linen():
    """The tree of a Linen model has the names."""
    provider = LoHaProvider(
        names={"query": "attention.query", r"layers\.dense": "layer.{}.dense"},
        module_path="query|layers/dense",
        rank=2,
        alpha=4.0,
    )
    new = qwix.apply_lora_to_model(LinenModel(), provider)
    params = nn.unbox(new.init(jax.random.key(1), tokens())["params"])
    want = {"attention.query", *(f"layer.{n}.dense" for n in range(3))}
    assert modules(linen_tree(provider, params)) == want


class Experts(nnx.Module):
    """Two kernels in one array."""

    def __init__(self):
        self.w = nnx.Param(normal_array(0, (2, 16, 8)))

    def __call__(self, x):
        return jnp.einsum("ebti,eio->ebto", jnp.stack([x, -x]), self.w.get_value())


def test_a_stack_that_is_targeted_in_part_is_refused():
    config = LoHaConfig(r=2, target_modules=["first"])
    names = {"w": ["first", "second"]}
    with pytest.raises(ValueError, match="some of first, second, which are one kernel, w"):
        adapted(Experts(), config=config, names=names)
    config = LoHaConfig(r=2, target_modules=["first", "second"])
    assert modules(adapted(Experts(), config=config, names=names)) == {"first", "second"}


ROWS = {"query": RowTransform.rotary(8, scale=4.0)}


def assert_files_have_torchs_rows(tree, plain):
    """One file has the rows of the other, permuted and scaled by 4."""
    got, own = map(interop.to_peft_state_dict, (tree, plain))
    prefix = "base_model.model.encoder.attention.query.hada_"
    for key, array in own.items():
        want = array
        if key.startswith(f"{prefix}w") and key.endswith("_a"):
            heads = array.reshape(2, 8, -1)
            want = np.concatenate([heads[:, ::2], heads[:, 1::2]], 1).reshape(array.shape)
            want = want * 4 if "w1_a" in key else want
        np.testing.assert_array_equal(got[key], want, err_msg=key)


@pytest.mark.parametrize("base", ["float", "int8"])
def test_files_have_torchs_rows(base, tmp_path):
    names = interop.NameMap(NAMES, rows=ROWS)
    rule = {"module_path": ".*", "rank": 2, "alpha": 4.0, **BASES[base]}
    model = adapted(Attention(nnx.Rngs(0)), names=names, **rule)
    assert_files_have_torchs_rows(model, adapted(Attention(nnx.Rngs(0)), names=NAMES, **rule))
    interop.save_peft(tmp_path, model)
    expected = model(tokens())
    interop.load_peft(tmp_path, model, names=names, adapter_name="read")
    np.testing.assert_array_equal(model(tokens()), expected)


def test_files_of_a_linen_model_have_torchs_rows():
    trees = []
    for names in (interop.NameMap(NAMES, rows=ROWS), NAMES):
        provider = LoHaProvider(module_path="query|out", rank=2, alpha=4.0, names=names)
        model = qwix.apply_lora_to_model(LinenModel(), provider)
        params = model.init(jax.random.key(0), tokens())["params"]
        trees.append(linen_tree(provider, params))
    assert_files_have_torchs_rows(*trees)


def test_a_transform_for_no_module_is_an_error():
    names = interop.NameMap(NAMES, rows={"quary": RowTransform([1, 0])})
    with pytest.raises(ValueError, match="'quary', which match no module"):
        adapted(Attention(nnx.Rngs(0)), names=names, module_path="query", rank=2, alpha=4.0)
    names = interop.NameMap(NAMES, rows={"query": RowTransform([1, 0, 2])})
    with pytest.raises(ValueError, match="blocks of 3 rows, and it has 16"):
        adapted(Attention(nnx.Rngs(0)), names=names, module_path="query", rank=2, alpha=4.0)
