"""The strategy "pallas": which products become one kernel, and that these are right.

Kernels are run by JAX's interpreter. For the rules it is a TPU.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from pullbacks import KEY, adapted, assert_equals_merged_in_float64
from quantised_kernels import quantised
from random_arrays import normal_array

import loha_jax
from loha_jax.runtime._compat import HAS_MOSAIC_GPU
from loha_jax.transform import one_pass_product


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(one_pass_product, "INTERPRET", True)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")


def of_layers(p, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["m"])[0]


def in_rows(p, x):
    return lax.dot_general(p["m"], x, (((0,), (1,)), ((), ())))


# shape of the kernel, its layout, shape of x, function
CASES = {
    "linear": ((33, 17), "io", (5, 33), lambda p, x: x @ p["m"]),
    "batch and length": ((33, 17), "io", (2, 5, 33), lambda p, x: x @ p["m"]),
    "as torch stores it": ((17, 33), "oi", (5, 33), lambda p, x: x @ p["m"].T),
    "out axis contracted": ((17, 33), "io", (5, 33), lambda p, x: x @ p["m"].T),
    "of torch, out axis contracted": ((33, 17), "oi", (5, 33), lambda p, x: x @ p["m"]),
    "stack": ((2, 33, 17), "sio", (2, 5, 33), lambda p, x: jnp.einsum("bni,bio->bno", x, p["m"])),
    "stack by vmap": ((2, 33, 17), "sio", (2, 5, 33), lambda p, x: jax.vmap(jnp.dot)(x, p["m"])),
    "scan": ((3, 17, 17), "sio", (5, 17), of_layers),
    "kernel first": ((33, 17), "io", (5, 33), in_rows),
    "joined heads": ((33, 4, 5), "ioo", (5, 33), lambda p, x: x @ p["m"].reshape(33, 20)),
    "computed input": ((33, 17), "io", (5, 33), lambda p, x: jax.nn.gelu(2 * x) @ p["m"]),
}


def case(name, dtype="float32", r=3):
    shape, layout, x, fn = CASES[name]
    base = {"m": normal_array(0, shape, dtype)}
    return fn, adapted(base, {"m": layout}, ["m"], r), normal_array(1, x, dtype)


def strategies(fn, params, x, **options):
    return [
        use.strategy for use in loha_jax.explain(fn, params, x, strategy="pallas", **options).uses
    ]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "dtype"),
    # Of bfloat16, the products that XLA:CPU has in the interpreter's loops.
    [*((name, "float32") for name in CASES), ("linear", "bfloat16"), ("stack", "bfloat16")],
)
def test_values_and_gradients_are_those_of_the_merged_weight(name, dtype):
    fn, params, x = case(name, dtype)
    assert strategies(fn, params, x) == ["pallas"]
    assert_equals_merged_in_float64(fn, params, x, dtype, "pallas")


@pytest.mark.usefixtures("x64")
@pytest.mark.filterwarnings("ignore:r = .* allows updates of rank")
@pytest.mark.parametrize("r", [1, 16, 40])
def test_ranks(r):
    fn, params, _ = case("linear", r=r)
    x = normal_array(1, (r + 1, 33), jnp.float32)
    assert strategies(fn, params, x) == ["pallas"]
    assert_equals_merged_in_float64(fn, params, x, "float32", "pallas")


@pytest.mark.usefixtures("x64")
def test_several_adapters_are_one_product():
    fn, params, x = case("linear")
    config = loha_jax.LoHaConfig(r=2, alpha=3, target_modules=["m"], init_weights=False)
    params = loha_jax.inject(params, config, key=jax.random.key(1), adapter_name="other")
    params = loha_jax.set_adapter(params, ["default", "other"])
    assert strategies(fn, params, x) == ["pallas"]
    assert_equals_merged_in_float64(fn, params, x, "float32", "pallas")


def test_rows_through_their_own_adapters():
    fn, params, x = case("batch and length")
    one = loha_jax.adapt(fn, strategy="pallas", adapter_index=[0, -1])(params, x)
    two = loha_jax.adapt(fn, strategy="factored", adapter_index=[0, -1])(params, x)
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


def refused(name, changed=lambda params, x: (params, x), options=None, fn=None, reason=""):
    return pytest.param(name, changed, options or {}, fn, reason, id=reason)


def injected(kernel, config=loha_jax.LoHaConfig, **options):
    options = {"r": 3, "target_modules": ["m"]} | options
    return loha_jax.inject({"m": kernel}, config(**options), key=KEY, layouts={"m": "io"})


def of_int8(params, x):
    return injected(quantised(params["m"].kernel, "scaled_int8")), x


def with_norms(params, x):
    return injected(params["m"].kernel, loha_jax.LycorisConfig, weight_decompose=True), x


def slid(p, x):
    return lax.conv_general_dilated(
        x[:, None], p["m"][None], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )


@pytest.mark.parametrize(
    ("name", "changed", "options", "fn", "reason"),
    [
        refused("linear", options={"forward_mode": True}, reason="forward_mode"),
        refused("linear", of_int8, reason="quantised"),
        refused("linear", with_norms, reason="a weight decomposition"),
        refused("linear", fn=slid, reason="no matrix product"),
        refused("linear", lambda p, x: (p, x[:2]), reason="fewer rows than ranks"),
        refused("linear", lambda p, x: (p, x.astype(jnp.bfloat16)), reason="not all bfloat16"),
        refused(
            "linear",
            fn=lambda p, x: jnp.dot(x, p["m"], precision=lax.Precision.HIGH),
            reason="the precision",
        ),
        refused(
            "linear",
            fn=lambda p, x: jnp.einsum("io,in->no", p["m"], x.T),
            reason="in another order than stack, rows, features",
        ),
        refused(
            "joined heads",
            fn=lambda p, x: jnp.einsum("ni,ihk->nhk", x, p["m"]),
            reason="other axes than a stack, in and out",
        ),
        refused(
            "batch and length",
            fn=lambda p, x: jax.vmap(jnp.dot)(x, jnp.broadcast_to(p["m"], (2, 33, 17))),
            reason="not the factors'",
        ),
        refused(
            "linear",
            fn=lambda p, x: (
                x[:, :32] @ p["m"][:32].reshape(4, 8, 17).swapaxes(0, 1).reshape(32, 17)
            ),
            reason="not the factors'",
        ),
        refused(
            "stack",
            fn=lambda p, x: jnp.einsum("ni,bio->bno", x[0], p["m"]),
            reason="other axes than a stack, in and out",
        ),
    ],
)
def test_other_products_are_factored_and_explain_says_why(name, changed, options, fn, reason):
    own, params, x = case(name)
    params, x = changed(params, x)
    (use,) = loha_jax.explain(fn or own, params, x, strategy="pallas", **options).uses
    assert use.strategy == "factored"
    assert use.note.startswith("not pallas: ")
    assert reason in use.note
    got, want = (
        loha_jax.adapt(fn or own, strategy=strategy, **options)(params, x)
        for strategy in ("pallas", "factored")
    )
    np.testing.assert_array_equal(got, want)


def test_it_is_for_one_tpu_or_hopper(monkeypatch):
    fn, params, x = case("linear")
    monkeypatch.setattr(one_pass_product, "INTERPRET", False)
    of_gpus = "compute capability 9.0" if HAS_MOSAIC_GPU else "JAX 0.12"
    for backend, devices, reason in (
        ("cpu", 1, "TPUs and GPUs"),
        ("gpu", 1, of_gpus),
        ("tpu", 2, "devices"),
    ):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        monkeypatch.setattr(jax, "device_count", lambda devices=devices: devices)
        (use,) = loha_jax.explain(fn, params, x, strategy="pallas").uses
        assert use.strategy == "factored"
        assert reason in use.note


def test_it_is_for_tpus_from_v5_on(monkeypatch):
    fn, params, x = case("linear")
    found = {}
    for kind in ("TPU v3", "TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite"):
        device = types.SimpleNamespace(device_kind=kind)
        monkeypatch.setattr(jax, "devices", lambda device=device: [device])
        found[kind] = strategies(fn, params, x)[0]
    assert list(found.values()) == ["factored", "factored", "pallas", "pallas", "pallas"]


def test_a_rank_too_large_for_the_chip_is_factored():
    shape = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    config = loha_jax.LoHaConfig(r=128, target_modules=["m"])
    params = jax.eval_shape(
        lambda p: loha_jax.inject(p, config, key=jax.random.key(0)), {"m": shape}
    )
    (use,) = loha_jax.explain(lambda p, x: x @ p["m"], params, shape, strategy="pallas").uses
    assert (use.strategy, "memory" in use.note) == ("factored", True)


def test_auto_never_takes_it_and_patterns_do():
    fn, params, x = case("linear")
    assert {u.strategy for u in loha_jax.explain(fn, params, x).uses} <= {"factored", "fused"}
    (use,) = loha_jax.explain(fn, params, x, strategy={"m": "pallas"}).uses
    assert use.strategy == "pallas"
