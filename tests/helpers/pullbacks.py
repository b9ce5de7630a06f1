"""An adapted function beside the merged one in float64: its result, and cotangents of the factors and x."""

import jax
import jax.numpy as jnp
import numpy as np

import loha_jax

BOUNDS = {"float64": 1e-11, "float32": 1e-5, "bfloat16": 2**-6}


def value_and_pullback(fn, params, x, sign=lambda x: x):
    """The result, and cotangents of the factors and x."""
    trainable, frozen = loha_jax.partition(params)

    @jax.jit
    def run(trainable, x):
        out, pull_back = jax.vjp(lambda t, x: fn(loha_jax.combine(t, frozen), x), trainable, x)
        cotangent = (jnp.arange(out.size) % 7 - 3).reshape(out.shape)  # exact in every dtype
        return out, pull_back(sign(cotangent).astype(out.dtype))

    return run(trainable, x)


def assert_equals_merged_in_float64(fn, params, x, dtype, strategy):
    """Compare within `BOUNDS[dtype]` of the size of what is added up."""
    wide = jax.tree.map(lambda a: a.astype(jnp.float64), (params, x))
    want = value_and_pullback(lambda p, x: fn(loha_jax.merge(p), x), *wide)
    got = value_and_pullback(loha_jax.adapt(fn, strategy=strategy), params, x)
    sizes = want
    if dtype == "bfloat16":
        positive = jax.tree.map(jnp.abs, wide)
        sizes = value_and_pullback(lambda p, x: fn(loha_jax.merge(p), x), *positive, sign=jnp.abs)
    for g, w, size in zip(*map(jax.tree.leaves, (got, want, sizes)), strict=True):
        atol = BOUNDS[dtype] * max(np.abs(size).max(), 1e-6)
        np.testing.assert_allclose(np.asarray(g, float), w, rtol=0, atol=atol)
    assert not loha_jax.explain(fn, params, x, strategy="factored").dense
