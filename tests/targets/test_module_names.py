import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

from loha_jax.targets.module_names import module_name, path_parts, stack_names, torch_parameter


@pytest.mark.parametrize(
    ("parts", "name", "parameter"),
    [
        (("params", "encoder", "layer", "0", "query", "kernel"), "encoder.layer.0.query", "weight"),
        (("encoder", "query", "bias"), "encoder.query", "bias"),
        (("linear/~/sub", "w"), "linear.sub", "weight"),
        (("bn", "scale"), "bn", "weight"),
        (("batch_stats", "bn", "mean"), "bn", "running_mean"),
        (("embed", "embedding"), "embed", "weight"),
        (("wq",), "wq", "wq"),
        (("kernel",), "kernel", "weight"),
        (("params", "kernel"), "kernel", "weight"),
    ],
)
def test_module_names_and_parameters(parts, name, parameter):
    assert module_name(parts) == name
    assert torch_parameter(parts) == parameter


def paths(tree):
    return {".".join(path_parts(path)) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]}


def test_boxes_and_variables_do_not_show_in_paths():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, kernel_init=nn.with_partitioning(nn.initializers.ones, ("a", "b")))(
                x
            )

    assert paths(Net().init(jax.random.key(0), jnp.ones((1, 3)))) == {
        "params.Dense_0.kernel",
        "params.Dense_0.bias",
    }
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    assert paths(state) == {"kernel", "bias"}
    assert paths({"value": jnp.ones(2)}) == {"value"}
    assert paths({"q.weight.data": 1, "q.bias.data": 1, "k": {"kernel": {"value": 1}}}) == {
        "q.weight",
        "q.bias",
        "k.kernel",
    }
    assert paths({"attn": {"value": {"kernel": 1}}, "data": 1}) == {"attn.value.kernel", "data"}


@pytest.mark.parametrize(
    ("name", "stack", "names", "expected"),
    [
        ("a.q", (), None, ("a.q",)),
        (
            "decoder.layers.attn.q",
            (2,),
            None,
            ("decoder.layers.0.attn.q", "decoder.layers.1.attn.q"),
        ),
        ("ScanBlock_0.q", (2,), None, ("ScanBlock_0.0.q", "ScanBlock_0.1.q")),
        ("enc.q", (2,), None, ("enc.0.q", "enc.1.q")),
        ("q", (2,), None, ("0.q", "1.q")),
        ("a.q", (), {"b.*": "x"}, ("a.q",)),
        ("a.q", (), {r"(.*)\.q": r"\1.query"}, ("a.query",)),
        (
            "layers.q",
            (2,),
            {r"layers\.(.*)": r"model.layers.{}.\1"},
            ("model.layers.0.q", "model.layers.1.q"),
        ),
        ("h.kv", (2,), {r"(.*)\.kv": [r"\1.k", r"\1.v"]}, ("h.k", "h.v")),
        ("x.w", (2, 2), {r"x\.w": "x.{1}.{0}"}, ("x.0.0", "x.1.0", "x.0.1", "x.1.1")),
        ("a.q", (), lambda name: f"model.{name}", ("model.a.q",)),
    ],
)
def test_stack_names(name, stack, names, expected):
    assert stack_names(name, stack, names) == expected


@pytest.mark.parametrize("template", ["fixed", ["only"], ["same", "same"]])
def test_names_that_do_not_fit_the_stack_are_errors(template):
    with pytest.raises(ValueError, match="one per index of its stack axes"):
        stack_names("a.q", (2,), {".*": template})
