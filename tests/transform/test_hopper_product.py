"""The kernel for NVIDIA's Hopper, run by JAX's interpreter; on a Hopper, by that.

`tests/accelerators` compiles it. Shapes are looped over: on the newest
JAX, which alone has the interpreter, each test has one case.
"""

import jax
import jax.numpy as jnp
import pytest
from one_pass_kernels import assert_equals_the_products
from pullbacks import adapted, assert_equals_merged_in_float64
from random_arrays import normal_array

import loha_jax
from loha_jax.runtime._compat import HAS_MOSAIC_GPU
from loha_jax.transform import one_pass_product
from loha_jax.transform.hopper_product import HopperProduct

needs_its_interpreter = pytest.mark.skipif(not HAS_MOSAIC_GPU, reason="JAX before 0.12")

# stack, rows, into, out, R: fewer and more steps than stages, one and two columns of tiles
SHAPES = [(1, 128, 128, 128, 64), (2, 256, 128, 256, 128), (1, 128, 384, 384, 64)]


def interpreted():
    return getattr(jax.devices()[0], "compute_capability", "") != "9.0"


def product(stack, rows, into, out, rank, *, transposed=False, dtype="bfloat16"):
    sizes = (stack, rows, into, out, rank)
    return HopperProduct(
        *sizes, transposed, jnp.dtype(dtype), highest=False, interpret=interpreted()
    )


@needs_its_interpreter
def test_equals_the_products_in_float64():
    for shape, transposed, dtype in (
        *((shape, False, "bfloat16") for shape in SHAPES),
        (SHAPES[1], True, "bfloat16"),
        (SHAPES[0], True, "float16"),
    ):
        kernel = product(*shape, transposed=transposed, dtype=dtype)
        assert_equals_the_products(kernel, 2**-7)


def case(features=(128, 256), rows=128, dtype=jnp.bfloat16, r=3):
    into, out = features
    base = {"m": normal_array(0, (into, out), dtype)}
    x = normal_array(1, (2, rows // 2, into), dtype)
    return lambda p, x: x @ p["m"], adapted(base, {"m": "io"}, ["m"], r), x


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(one_pass_product, "INTERPRET", interpreted())
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


@needs_its_interpreter
@pytest.mark.usefixtures("on_a_gpu", "x64")
def test_values_and_gradients_are_those_of_the_merged_weight():
    fn, params, x = case()
    (use,) = loha_jax.explain(fn, params, x, strategy="pallas").uses
    assert use.strategy == "pallas"
    assert_equals_merged_in_float64(fn, params, x, "bfloat16", "pallas", x64=False)
    turned = {"m": normal_array(0, (256, 128), jnp.bfloat16)}
    fn, params = lambda p, x: x @ p["m"].T, adapted(turned, {"m": "oi"}, ["m"], 3)
    assert_equals_merged_in_float64(fn, params, x, "bfloat16", "pallas", x64=False)


@needs_its_interpreter
@pytest.mark.usefixtures("on_a_gpu")
def test_what_does_not_fit_is_factored_and_explain_says_why():
    for options, reason in (
        ({"features": (128, 192)}, "multiple of 128"),
        ({"rows": 64}, "multiple of 128"),
        ({"dtype": jnp.float32}, "does not take float32"),
    ):
        (use,) = loha_jax.explain(*case(**options), strategy="pallas").uses
        assert (use.strategy, reason in use.note) == ("factored", True), use.note


def test_it_counts_its_work():
    """By hand: 2 x 2 tiles of 128 x 256, each of 128 x (64 + 64) and (64 + 64) x 256 in 2 steps."""
    kernel = product(1, 256, 64, 512, 64)
    assert kernel.tiles == (2, 2)
    assert kernel.flops() == 2 * 256 * 512 * (64 + 64)
    assert kernel.moved_bytes() == 2 * (4 * (128 * 128 + 128 * 256) + 256 * 512)
