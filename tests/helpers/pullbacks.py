"""An adapted function beside the merged one: its values, and gradients of the factors and x."""

import jax
import jax.numpy as jnp
import numpy as np
from random_arrays import normal_array

import loha_jax
from loha_jax import LoHaConfig

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


def assert_equals_merged_in_float64(fn, params, x, dtype, strategy, *, x64=True):
    """Compare within `BOUNDS[dtype]` of the size of what is added up.

    `x64` is of the adapted function: JAX's interpreter of kernels for GPUs fails with it.
    """
    wide = jax.tree.map(lambda a: a.astype(jnp.float64), (params, x))
    want = value_and_pullback(lambda p, x: fn(loha_jax.merge(p), x), *wide)
    with jax.enable_x64(x64):
        got = value_and_pullback(loha_jax.adapt(fn, strategy=strategy), params, x)
    sizes = want
    if dtype == "bfloat16":
        positive = jax.tree.map(jnp.abs, wide)
        sizes = value_and_pullback(lambda p, x: fn(loha_jax.merge(p), x), *positive, sign=jnp.abs)
    for g, w, size in zip(*map(jax.tree.leaves, (got, want, sizes)), strict=True):
        atol = BOUNDS[dtype] * max(np.abs(size).max(), 1e-6)
        np.testing.assert_allclose(np.asarray(g, float), w, rtol=0, atol=atol)
    assert not loha_jax.explain(fn, params, x, strategy="factored").dense


KEY = jax.random.key(0)


def normal(*shape, seed=0, scale=1.0, dtype=jnp.float32):
    return scale * normal_array(seed, shape, dtype)


def adapted(base, layouts=None, targets="all-linear", r=3, **kwargs):
    """`base` with a LoHa whose update is about as large as the weights."""
    config = LoHaConfig(r=r, alpha=2 * r, target_modules=targets, init_weights=True, **kwargs)
    params = loha_jax.inject(base, config, key=KEY, layouts=layouts)
    mask, random = loha_jax.trainable_mask(params), np.random.default_rng(8)

    def draw(x, m):
        return jnp.asarray(0.6 * random.standard_normal(x.shape), x.dtype) if m else x

    return jax.tree.map(draw, params, mask)


def assert_close(got, want, bound):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        w = np.asarray(w, np.float64)
        np.testing.assert_allclose(
            np.asarray(g, np.float64), w, rtol=0, atol=bound * max(np.abs(w).max(), 1e-6)
        )


def check(fn, params, *args, strategies=("factored", "fused"), dense=(), plain=True):
    """Compare values to 2e-5 and gradients to 1e-3 of their largest entry.

    `dense` lists the primitives that form a weight.
    """
    trainable, frozen = loha_jax.partition(params)

    def value_and_gradient(apply):
        def loss(trainable):
            out = apply(loha_jax.combine(trainable, frozen), *args)
            return sum(
                (jnp.cos(jnp.arange(o.size)).reshape(o.shape) * o).sum()
                for o in jax.tree.leaves(out)
            ), out

        step = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(trainable)
        (_, out), gradient = step.compile({"xla_backend_optimization_level": 0})(
            trainable
        )  # compiling takes longest
        return out, gradient

    expected, expected_gradient = value_and_gradient(lambda p, *a: fn(loha_jax.merge(p), *a))
    frozen_output = jax.jit(lambda p: fn(loha_jax.unload(p), *args))(params)
    moved = [
        np.abs(np.asarray(a) - b).max()
        for a, b in zip(*map(jax.tree.leaves, (expected, frozen_output)), strict=True)
    ]
    assert max(moved) > 1e-3
    applied = {strategy: loha_jax.adapt(fn, strategy=strategy) for strategy in strategies} | (
        {"": fn} if plain else {}
    )
    for apply in applied.values():
        out, gradient = value_and_gradient(apply)
        assert_close(out, expected, 2e-5)
        assert_close(gradient, expected_gradient, 1e-3)
    explanation = loha_jax.explain(fn, params, *args, strategy="factored")
    assert {use.primitive for use in explanation.dense} == set(dense), str(explanation)
    assert not explanation.unused, str(explanation)
