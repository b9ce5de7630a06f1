"""Shared by the tests in tests/nnx: models, trees and references."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from nnx_reference import ALPHA, F64, R, dense, table, targets

from loha_jax import LoHaConfig
from loha_jax.nnx import inject

WIDTH = 4


IDS = np.arange(10).reshape(2, 5)


def split(rngs, n):
    """Return `rngs.split(n)`, which Flax 0.12.3 has under its older name."""
    return rngs.split(n) if hasattr(nnx.Rngs, "split") else rngs.fork(split=n)


class Block(nnx.Module):
    def __init__(self, rngs, width=WIDTH):
        self.norm = nnx.LayerNorm(width, rngs=rngs, **F64)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs, **F64)
        self.down = nnx.Linear(2 * width, width, rngs=rngs, **F64)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(self.norm(x))))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, WIDTH, rngs=rngs, **F64)
        self.layers = nnx.List([Block(rngs) for _ in range(2)])
        self.head = nnx.Linear(WIDTH, 3, rngs=rngs, **F64)

    def __call__(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


FOLDS = {
    "embed/embedding": table,
    "head/kernel": dense,
    **{f"layers/{n}/{name}/kernel": dense for n in range(2) for name in ("up", "down")},
}


def config(folds=FOLDS, **settings):
    """Random factors, so that the update is not zero."""
    return LoHaConfig(
        **{"r": R, "alpha": ALPHA, "init_weights": False, "target_modules": targets(folds)}
        | settings
    )


def adapted(build=Model, folds=FOLDS, seed=1, **settings):
    return inject(build(nnx.Rngs(0)), config(folds, **settings), rngs=nnx.Rngs(seed))


def close(a, b, atol=1e-10):
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)
