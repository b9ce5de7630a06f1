"""Promotion of dtypes and ranks in this library's own arithmetic."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def standard_promotion() -> Iterator[None]:
    """Use JAX's defaults for dtypes and ranks, as a context or a decorator.

    Callers may have `jax_numpy_dtype_promotion="strict"` or `jax_numpy_rank_promotion="raise"`,
    which are meant for the model's code: that is traced outside of this.
    """
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
