"""Models of Linen, NNX and Equinox under `adapt`."""

import equinox as eqx
import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx
from pullbacks import KEY, adapted, assert_close, check, normal

import loha_jax
from loha_jax import LoHaConfig


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attn")(nn.LayerNorm()(x))
        return x + nn.Dense(8, name="down")(
            nn.silu(nn.Dense(16, name="up")(nn.LayerNorm()(x)))
        ), None


class Transformer(nn.Module):
    scan: bool

    @nn.compact
    def __call__(self, x):
        if self.scan:
            scanned = nn.scan(
                nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            x, _ = scanned(name="layers")(x, None)
        else:
            for n in range(3):
                x, _ = Block(name=f"layers_{n}")(x)
        return nn.Dense(5, name="head")(x)


@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.slow), True])
def test_linen_transformer(scan):
    model = Transformer(scan)
    x = normal(2, 6, 8, seed=3)
    base = model.init(KEY, x)
    params = adapted(base, loha_jax.infer_layouts(model.apply, base, x))
    check(model.apply, params, x)


def test_scanned_and_unrolled_transformers():
    """One config and key give both the same factors.

    The names of the stacked modules are those of the unrolled ones.
    """
    x = normal(2, 6, 8, seed=3)
    scanned, unrolled = Transformer(True), Transformer(False)
    stacked = scanned.init(KEY, x)["params"]
    apart = {
        f"layers_{n}": jax.tree.map(lambda v, n=n: v[n], stacked["layers"]) for n in range(3)
    } | {"head": stacked["head"]}
    config = LoHaConfig(r=2, target_modules=["query", "up"], init_weights=False)
    one = loha_jax.inject(stacked, config, key=KEY, layouts={"layers.up": "sio"})
    two = loha_jax.inject(apart, config, key=KEY, names={r"layers_(\d)\.(.*)": r"layers.\1.\2"})
    np.testing.assert_allclose(
        loha_jax.adapt(scanned.apply)({"params": one}, x),
        loha_jax.adapt(unrolled.apply)({"params": two}, x),
        atol=1e-5,
    )


def test_equinox_mlp():
    model = eqx.nn.MLP(4, 3, 8, 2, key=KEY)
    x = normal(5, 4, seed=1)
    arrays, static = eqx.partition(model, eqx.is_array)

    def fn(arrays, x):
        return jax.vmap(eqx.combine(arrays, static, is_leaf=loha_jax.tree.leaves.is_adapted))(x)

    layouts = loha_jax.infer_layouts(fn, arrays, x)
    assert set(layouts.values()) == {"oi"}
    check(fn, adapted(arrays, layouts), x)


def test_equinox_module_with_its_functions_in_the_tree():
    model = eqx.nn.MLP(4, 3, 8, 2, key=KEY)
    x = normal(5, 4, seed=1)
    params = adapted(model, {".*": "oi"})
    expected = jax.vmap(loha_jax.merge(params))(x)
    assert_close(loha_jax.adapt(lambda m, x: jax.vmap(m)(x))(params, x), expected, 2e-5)


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.attn = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])
        self.einsum = nnx.Einsum("btd,dhk->bthk", (8, 2, 3), (2, 3), rngs=rngs)

    def __call__(self, x):
        x = self.attn(x)
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.einsum(x)


def test_nnx_state():
    graph, state = nnx.split(NNXNet(nnx.Rngs(0)))

    def fn(state, x):
        return nnx.merge(graph, state)(x)

    x = normal(2, 5, 8, seed=1)
    layouts = loha_jax.infer_layouts(fn, state, x)
    assert layouts["attn.out"] == "iio"
    assert layouts["einsum"] == "ioo"
    params = adapted(state, layouts)
    check(fn, params, x)
