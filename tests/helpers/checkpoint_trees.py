"""Shared by the tests in tests/checkpoint: models, trees and references."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import loha_jax
from loha_jax import LoHaConfig
from loha_jax.checkpoint import Checkpoints

KEY = jax.random.key(0)


@functools.cache
def base():
    k = jax.random.split(KEY, 5)
    return {
        "layers": {"q": {"kernel": jax.random.normal(k[0], (3, 8, 6))}},
        "linear/~/sub": {"w": jax.random.normal(k[1], (6, 5)), "b": jnp.zeros(5)},
        "conv": {"kernel": jax.random.normal(k[2], (3, 3, 4, 6))},
        "head": {
            "kernel": jax.random.normal(k[3], (5, 2), jnp.bfloat16),
            "bias": jnp.ones(2, jnp.bfloat16),
        },
    }


def inject(tree, **options):
    options = {"r": 2, "target_modules": ["sub"], "init_weights": False, **options}
    return loha_jax.inject(tree, LoHaConfig(**options), key=KEY)


@functools.cache
def dense():
    return inject(base())


OPTIMIZERS = {
    "adamw": optax.adamw(1e-2),
    "hyperparameters": optax.inject_hyperparams(optax.adam)(
        learning_rate=0.1
    ),  # its numbers are weakly typed
    "noise and masks": optax.chain(
        optax.add_noise(0.1, 0.5, KEY),
        optax.masked(optax.sgd(0.1, momentum=0.9), lambda t: jax.tree.map(lambda x: x.ndim > 1, t)),
    ),
    "steps": optax.MultiSteps(optax.adafactor(1e-2, min_dim_size_to_factor=2), every_k_schedule=3),
    "nothing": optax.set_to_zero(),
}


def trained(params, optimizer, steps=2):
    """Both after some updates with other values in every array."""
    trainable, frozen = loha_jax.partition(params)
    state = optimizer.init(trainable)
    update = jax.jit(optimizer.update)
    for n in range(steps):
        gradients = jax.tree.map(
            lambda x, n=n: np.cos(np.asarray(x) + n, dtype=np.float32).astype(x.dtype), trainable
        )
        updates, state = update(gradients, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    return loha_jax.combine(trainable, frozen), state


def bits(leaf):
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(leaf.dtype), leaf.shape, np.asarray(jax.random.key_data(leaf)).tobytes()
    weak = getattr(leaf, "weak_type", None)
    return type(leaf), str(np.asarray(leaf).dtype), np.shape(leaf), weak, np.asarray(leaf).tobytes()


def assert_same_bits(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree_util.tree_flatten_with_path(tree)[0], jax.tree.leaves(expected), strict=True
    ):
        assert bits(a) == bits(b), jax.tree_util.keystr(path)


def saved(folder, *steps, params=None, **options):
    """A folder with a checkpoint per step, and the trees by step.

    The arrays tell the steps apart.
    """
    params = dense() if params is None else params
    states = {}
    with Checkpoints(folder, keep=None) as checkpoints:
        for step in steps:
            states[step] = trained(params, OPTIMIZERS["adamw"], step)
            checkpoints.save(
                step, *states[step], key=jax.random.key(step), data={"batch": step}, **options
            )
    return states


def start():
    params = dense()
    return params, OPTIMIZERS["adamw"].init(loha_jax.partition(params)[0])
