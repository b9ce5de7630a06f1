"""A loop that saves checkpoint after checkpoint, run by `tests/checkpoint/test_killed_saves.py`."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np

import loha_jax
from loha_jax.checkpoint import Checkpoints


def trees(template, step):
    """Parameters and optimizer state of a step: other numbers in every array of every step."""
    trainable, frozen = loha_jax.partition(template)
    draw = np.random.default_rng(step)
    first, second = (
        jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape).astype(np.float32)), trainable)
        for _ in range(2)
    )
    return loha_jax.combine(first, frozen), {"mu": second, "count": jnp.asarray(np.int32(step))}


def loss(step):
    return float(step * 37 % 101)


def write(folder, template, connection):
    """Saves without end, and tells which steps are finished."""
    warnings.simplefilter("ignore")
    with Checkpoints(folder, keep=2, best="loss") as checkpoints:
        restored = checkpoints.restore(*trees(template, 0))
        step = 0 if restored is None else restored.step
        while True:
            step += 1
            checkpoints.save(
                step, *trees(template, step), data={"step": step}, metrics={"loss": loss(step)}
            )
            if step % 2:
                checkpoints.wait()
                connection.send(step)
