"""The arrays that factored products hold until the backward pass.

The tests look inside the pullback, and compare the gradients.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_arrays import normal_array

import loha_jax

WIDTH, HIDDEN, ROWS = 16, 48, 20


def gated(p, x):
    gate, up = x @ p["gate"]["kernel"], x @ p["up"]["kernel"]
    return (jax.nn.silu(gate) * up) @ p["down"]["kernel"]


def gelu(p, x):
    return jax.nn.gelu(x @ p["up"]["kernel"] + p["bias"]) @ p["down"]["kernel"]


def rms_norm(p, x):
    x = jnp.sin(x @ p["square"]["kernel"])
    normed = p["scale"] * (x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6))
    return normed @ p["up"]["kernel"]


def layer_norm(p, x):
    x = jnp.sin(x @ p["square"]["kernel"])
    norm = nn.LayerNorm().apply({"params": {"scale": p["scale"], "bias": p["bias"][:WIDTH]}}, x)
    return norm @ p["up"]["kernel"]


def dropout(p, x):
    x = jnp.tanh(x @ p["up"]["kernel"])
    mask = jax.random.bernoulli(jax.random.key(3), 0.5, x.shape)
    return (x * x * mask) @ p["down"]["kernel"]


def residual(p, x):  # a sum of two arrays: nothing else is kept for it, so it is kept itself
    return (x + jnp.sin(x @ p["square"]["kernel"])) @ p["up"]["kernel"]


def base():
    def normal(seed, *shape):
        return normal_array(seed, shape) / shape[0] ** 0.5

    shapes = {
        "gate": (WIDTH, HIDDEN),
        "up": (WIDTH, HIDDEN),
        "down": (HIDDEN, WIDTH),
        "square": (WIDTH, WIDTH),
    }
    kernels = {
        name: {"kernel": normal(n, *shape)} for n, (name, shape) in enumerate(shapes.items())
    }
    return kernels | {"scale": 1 + 0.1 * normal(8, WIDTH), "bias": 0.1 * normal(9, HIDDEN)}


def held_bytes(fn, *args):
    """Bytes of the activations that a pullback holds: arrays with a row per row of x."""
    leaves = jax.tree.leaves(jax.eval_shape(lambda *a: jax.vjp(fn, *a)[1], *args))
    arrays = {id(leaf): leaf for leaf in leaves if leaf.shape[:1] == (ROWS,)}
    return sum(leaf.size * leaf.dtype.itemsize for leaf in arrays.values())


@pytest.mark.parametrize(
    "fn", [gated, gelu, rms_norm, layer_norm, dropout, residual], ids=lambda fn: fn.__name__
)
def test_gradients_are_those_of_the_dense_weight(fn):
    config = loha_jax.LoHaConfig(
        r=2, alpha=4, target_modules=["gate", "up", "down", "square"], init_weights=False
    )
    params = loha_jax.inject(base(), config, key=jax.random.key(0))
    trainable, frozen = loha_jax.partition(params)
    x = normal_array(1, (ROWS, WIDTH))

    def gradient(apply):
        def loss(t, x):
            return jnp.sin(apply(loha_jax.combine(t, frozen), x)).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(trainable, x)

    got = gradient(loha_jax.adapt(fn, strategy="factored"))
    want = gradient(lambda p, x: fn(loha_jax.merge(p), x))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-5 * np.abs(w).max())


@pytest.mark.parametrize(
    ("fn", "wide"), [(gated, 0), (rms_norm, 0), (layer_norm, 0), (dropout, 0), (residual, 1)]
)
def test_an_input_that_can_be_built_again_is_not_held(fn, wide):
    """`wide`: how many arrays of the last product's input are held beyond the frozen step's."""
    last = "down" if fn in (gated, dropout) else "up"
    config = loha_jax.LoHaConfig(r=1, target_modules=[last])
    params = loha_jax.inject(base(), config, key=jax.random.key(0))
    trainable, frozen = loha_jax.partition(params)
    x = jnp.ones((ROWS, WIDTH))
    before = held_bytes(lambda x: fn(base(), x), x)
    apply = loha_jax.adapt(fn, strategy="factored")
    after = held_bytes(lambda t, x: apply(loha_jax.combine(t, frozen), x), trainable, x)
    h = 4 * ROWS  # x KB, r² = 1 wide
    size = 4 * ROWS * (HIDDEN if last == "down" else WIDTH)
    assert (
        after - before <= h + wide * size + size // 4
    )  # a mask of one byte per element, or a norm per row
    assert after - before >= h + wide * size
