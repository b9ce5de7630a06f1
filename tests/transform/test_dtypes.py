"""Which dtype the factors, the update and the merged weight have.

PEFT's rules, for every base that JAX has.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_arrays import normal_array

import loha_jax
from loha_jax import LoHaConfig

CONFIG = LoHaConfig(r=3, alpha=6, target_modules=["q"], init_weights=False)
BASES = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")


def adapted(dtype):
    kernel = normal_array(1, (16, 8), jnp.float32).astype(dtype)
    params = loha_jax.inject({"q": {"kernel": kernel}}, CONFIG, key=jax.random.key(0))
    mask, random = loha_jax.trainable_mask(params), np.random.default_rng(0)
    return jax.tree.map(
        lambda x, m: jnp.asarray(random.normal(0, 0.5, x.shape), x.dtype) if m else x, params, mask
    )


def update(leaf):
    f = leaf.adapters["default"]
    a1, b1, a2, b2 = (
        np.asarray(x, np.float64) for x in (f.hada_w1_a, f.hada_w1_b, f.hada_w2_a, f.hada_w2_b)
    )
    return ((a1 @ b1) * (a2 @ b2)).T * 2


@pytest.mark.filterwarnings("ignore:Rounding the merged weight of q to float8")
@pytest.mark.parametrize("dtype", BASES)
def test_dtypes_of_factors_and_merged_weights(dtype, x64):
    """Factors are float32 or better and the merged weight is rounded once."""
    leaf = adapted(dtype)["q"]["kernel"]
    wide = jnp.float64 if dtype == "float64" else jnp.float32
    assert {x.dtype for x in leaf.adapters["default"].tensors.values()} == {jnp.dtype(wide)}
    merged = loha_jax.merge({"q": leaf})["q"]
    assert merged.dtype == leaf.dtype == jnp.dtype(dtype)
    exact = np.asarray(leaf.kernel, np.float64) + update(leaf)
    # PEFT: round(W + ΔW) in W's dtype: half a step of it, beside the rounding of ΔW's own sums in
    # the wide dtype.
    step, fine = (float(jnp.finfo(t).eps) for t in (dtype, wide))
    subnormal = float(jnp.finfo(dtype).smallest_subnormal)
    error = np.abs(np.asarray(merged, np.float64) - exact)
    assert (error <= np.abs(exact) * step / 2 + 8 * fine * size(leaf) + subnormal / 2).all()


def size(leaf):
    """|W + ΔW| without cancellation."""
    f = leaf.adapters["default"]
    a1, b1, a2, b2 = (
        np.abs(np.asarray(x, np.float64))
        for x in (f.hada_w1_a, f.hada_w1_b, f.hada_w2_a, f.hada_w2_b)
    )
    return np.abs(np.asarray(leaf.kernel, np.float64)) + ((a1 @ b1) * (a2 @ b2)).T * 2


@pytest.mark.parametrize("strategy", ["factored", "fused", "dense"])
@pytest.mark.parametrize("dtype", BASES)
def test_outputs_have_the_dtype_of_the_models_own_product(dtype, strategy, x64):
    params = adapted(dtype)
    compute = (
        jnp.dtype(dtype) if "float8" not in dtype else jnp.dtype("bfloat16")
    )  # a float8 kernel is cast for use
    x = normal_array(2, (5, 16), jnp.float32).astype(compute)

    def fn(params, x):
        return x @ jnp.asarray(params["q"]["kernel"]).astype(compute)

    got = jax.jit(loha_jax.adapt(fn, strategy=strategy))(params, x)
    assert got.dtype == compute == jax.jit(fn)(loha_jax.unload(params), x).dtype
    leaf = params["q"]["kernel"]
    weight = np.asarray(leaf.kernel, np.float64) + update(leaf)
    want = np.asarray(x, np.float64) @ weight
    # Sums without cancellation, each term rounded a few times in the compute dtype (W + ΔW where it
    # is formed).
    whole = np.abs(np.asarray(x, np.float64)) @ size(leaf)
    bound = {"float64": 1e-13, "float32": 1e-6, "float16": 2**-9, "bfloat16": 2**-6}[str(compute)]
    assert (np.abs(np.asarray(got, np.float64) - want) <= bound * whole).all()


def test_integer_kernels_are_refused_by_name():
    with pytest.raises(ValueError, match=r"q\.kernel int8"):
        loha_jax.inject(
            {"q": {"kernel": jnp.ones((3, 4), jnp.int8)}}, CONFIG, key=jax.random.key(0)
        )
