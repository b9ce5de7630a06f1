"""Numbers and random keys as people pass them."""

from __future__ import annotations

from typing import Any, TypeGuard, TypeVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

C = TypeVar("C", bound=str)


def plain_scalar(value: object) -> Any:
    """Return Python's own number or string for a scalar; other values as they are.

    Scalars are numpy's, and concrete arrays without axes.

    Example:
        >>> plain_scalar(np.int64(4)), plain_scalar(jnp.float32(0.5)), plain_scalar("r")
        (4, 0.5, 'r')
    """
    if isinstance(value, np.generic):
        return value.item()
    if not isinstance(value, np.ndarray | jax.Array) or isinstance(value, jax.core.Tracer):
        return value
    extended = jnp.issubdtype(value.dtype, jax.dtypes.extended)
    return value if value.ndim or extended else value.item()


def is_integer(value: object) -> TypeGuard[int]:
    """Return whether a value is one of Python's integers, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def one_of(what: str, value: str, choices: tuple[C, ...]) -> C:
    """Return the choice that a string names.

    Raises:
        ValueError: there is none; the message begins with `what`.
    """
    for choice in choices:
        if value == choice:
            return choice
    raise ValueError(f"{what} is one of {', '.join(choices)}, got {value!r}")


def check_key(key: Any) -> None:
    """Raise TypeError for an object that is no JAX PRNG key."""
    dtype = getattr(key, "dtype", None)
    if dtype is None or not (jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == np.uint32):
        seed = int(key) if isinstance(key, int) else 0
        given = repr(key) if dtype is None else f"an array of {dtype}{list(jnp.shape(key))}"
        raise TypeError(f"key is a JAX PRNG key, got {given}: use jax.random.key({seed})")
    raw = 0 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else 1  # a raw key is a row of numbers
    if key.ndim != raw:
        raise TypeError(
            f"key is one JAX PRNG key, got an array of shape {tuple(key.shape)}: pass one of them, "
            "such as key[0]"
        )
