"""Factored products on one TPU, whose second step is a part of the base product.

They are run on CPU. For the rules it is a TPU.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from pullbacks import adapted, assert_equals_merged_in_float64
from random_arrays import normal_array

import loha_jax
from loha_jax.transform import joined_product

IN, OUT, R = 33, 17, 3
X = (2, 5, IN)


@pytest.fixture(autouse=True)
def on_a_tpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(joined_product, "FEWEST_ROWS", 1)


def in_rows(p, x):
    return lax.dot_general(p["m"], x[0], (((0,), (1,)), ((), ())))


# layout of the kernel, its shape, function
JOINED = {
    "linear": ("io", (IN, OUT), lambda p, x: x @ p["m"]),
    "one batch": ("io", (IN, OUT), lambda p, x: x[0] @ p["m"]),
    "as torch stores it": ("oi", (OUT, IN), lambda p, x: x @ p["m"].T),
    "out axis contracted": ("io", (OUT, IN), lambda p, x: x @ p["m"].T),
    "of torch, out axis contracted": ("oi", (IN, OUT), lambda p, x: x @ p["m"]),
    "kernel first": ("io", (IN, OUT), in_rows),
    "joined heads": ("ioo", (IN, 4, 5), lambda p, x: x @ p["m"].reshape(IN, 20)),
    "recomputed": ("io", (IN, OUT), jax.checkpoint(lambda p, x: jax.nn.gelu(2 * x) @ p["m"])),
}


def case(name, dtype="bfloat16"):
    layout, shape, fn = JOINED[name]
    params = adapted({"m": normal_array(0, shape, dtype)}, {"m": layout}, ["m"], R)
    return fn, params, normal_array(1, X, dtype)


def is_joined(fn, params, x, adapters=1, **options):
    """Whether the input's features and R are contracted together."""
    apply = loha_jax.adapt(fn, strategy="factored", **options)
    return f"{IN + adapters * R**2}] = concatenate" in str(jax.make_jaxpr(apply)(params, x))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", JOINED)
def test_values_and_gradients_are_those_of_the_merged_weight(name):
    fn, params, x = case(name)
    assert is_joined(fn, params, x)
    assert_equals_merged_in_float64(fn, params, x, "bfloat16", "factored")


def test_few_rows_and_inference_are_not_joined(monkeypatch):
    """By the compiler for v5e they take more cycles joined: benchmarks/README.md."""
    fn, params, x = case("linear")
    assert not is_joined(fn, params, x, training=False)
    monkeypatch.setattr(joined_product, "FEWEST_ROWS", 1024)
    assert not is_joined(fn, params, x)
    many = jax.ShapeDtypeStruct((2, 512, IN), jnp.bfloat16)
    assert is_joined(fn, params, many)


@pytest.mark.usefixtures("x64")
def test_several_adapters_are_joined_together():
    fn, params, x = case("linear")
    config = loha_jax.LoHaConfig(r=R, alpha=3, target_modules=["m"], init_weights=False)
    params = loha_jax.inject(params, config, key=jax.random.key(1), adapter_name="other")
    params = loha_jax.set_adapter(params, ["default", "other"])
    assert is_joined(fn, params, x, adapters=2)
    assert_equals_merged_in_float64(fn, params, x, "bfloat16", "factored")


def test_second_derivatives_are_those_of_the_products_apart(monkeypatch):
    fn, params, x = case("linear")

    def curvature(backend):
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        apply = loha_jax.adapt(fn, strategy="factored", compute_dtype="input")

        def loss(x):
            return jnp.sum(apply(params, x).astype(jnp.float32) ** 2)

        return np.asarray(jax.grad(lambda x: jnp.sum(jax.grad(loss)(x) ** 2))(x), np.float32)

    apart = curvature("gpu")
    np.testing.assert_allclose(curvature("tpu"), apart, rtol=0, atol=0.05 * np.abs(apart).max())


def scanned(p, x):
    return lax.scan(lambda x, _: (jnp.tanh(x @ p["m"] @ p["m"].T), None), x, None, length=2)[0]


def of_layers(p, x):
    """The caller's own scan over layers, with `adapt` in it."""
    layer = loha_jax.adapt(lambda p, x: x @ p["m"])
    return lax.scan(lambda x, p: (jnp.tanh(layer(p, x)), None), x, p)[0]


def test_a_slice_of_the_callers_loop_is_computed_apart():
    params = adapted({"m": normal_array(0, (3, IN, IN), "bfloat16")}, {"m": "sio"}, ["m"], R)
    x = normal_array(1, X, "bfloat16")
    assert f"{IN + R**2}] = concatenate" not in str(jax.make_jaxpr(of_layers)(params, x))


def test_rows_with_adapters_of_their_own_share_one_weight():
    fn, params, x = case("linear")
    apply = loha_jax.adapt(fn, adapter_index=[0, -1])
    shapes = {eqn.aval.shape for eqn in all_results(jax.make_jaxpr(apply)(params, x).jaxpr)}
    assert not {shape for shape in shapes if shape[-2:] in ((IN, OUT), (IN + R**2, OUT))} - {
        (IN, OUT)
    }


def all_results(jaxpr):
    """The variables that a jaxpr and those in it compute."""
    for eqn in jaxpr.eqns:
        yield from eqn.outvars
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from all_results(inner)


def looped(p, x):
    return lax.fori_loop(0, 2, lambda _, x: jnp.tanh(x @ p["m"] @ p["m"].T), x)


@pytest.mark.parametrize(
    ("fn", "options", "dtype"),
    [
        (scanned, {}, "bfloat16"),
        (looped, {}, "bfloat16"),
        (JOINED["linear"][2], {"forward_mode": True}, "bfloat16"),
        (JOINED["linear"][2], {}, "float32"),
        (lambda p, x: x[0, :2] @ p["m"], {}, "bfloat16"),
    ],
    ids=["scan", "loop", "forward_mode", "float32", "fewer rows than ranks"],
)
def test_others_are_computed_apart(fn, options, dtype):
    _, params, x = case("linear", dtype)
    assert not is_joined(fn, params, x, **options)


@pytest.mark.parametrize(("backend", "devices"), [("cpu", 1), ("gpu", 1), ("tpu", 2)])
def test_it_is_for_one_tpu(backend, devices, monkeypatch):
    fn, params, x = case("linear")
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    assert not is_joined(fn, params, x, compute_dtype="input")
