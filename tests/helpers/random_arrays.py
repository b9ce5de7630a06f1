"""Random arrays."""

import jax.numpy as jnp
import numpy as np


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def normal_array(seed, shape, dtype=float):
    """As `jax.random.normal`, which compiles a program for each shape: a tenth of a second."""
    return jnp.asarray(normal(seed, *shape), dtype)
