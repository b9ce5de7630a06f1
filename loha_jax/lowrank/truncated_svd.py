"""The largest singular values of a matrix with their vectors, without a whole decomposition."""

# JAX's own functions are only partly typed.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_SPARE = 8
"""Columns of the random start beyond the rank (Halko, Martinsson and Tropp, 2011)."""

_ITERATIONS = 3
"""Passes over the matrix and its transpose: enough for the slowly falling values of a weight."""


def largest_singular_values(
    matrix: Float[Array, "rows columns"], count: int
) -> tuple[Float[Array, "rows {count}"], Float[Array, "{count}"], Float[Array, "{count} columns"]]:
    """Return the `count` largest singular values with their vectors, by subspace iteration.

    The start is random, but always the same. Values that the matrix does not have are 0.

    Source: Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 2011.
    """
    width = min(count + _SPARE, *matrix.shape)
    key = jax.random.key(0, impl="threefry2x32")  # whatever the default is
    start = jax.random.normal(key, (matrix.shape[1], width), matrix.dtype)
    columns = jnp.linalg.qr(start)[0]  # [columns, width]
    for _ in range(_ITERATIONS):
        rows = jnp.linalg.qr(precise_product(matrix, columns))[0]  # [rows, width]
        columns = jnp.linalg.qr(precise_product(matrix.T, rows))[0]
    rows, triangle = jnp.linalg.qr(precise_product(matrix, columns))
    u, values, vt = jnp.linalg.svd(triangle)
    eps = float(cast(float, jnp.finfo(matrix.dtype).eps))
    smallest = values[0] * max(matrix.shape) * eps
    values = jnp.where(values > smallest, values, 0)
    missing = max(0, count - width)
    return (
        jnp.pad(precise_product(rows, u)[:, :count], ((0, 0), (0, missing))),
        jnp.pad(values[:count], (0, missing)),
        jnp.pad(precise_product(vt, columns.T)[:count], ((0, missing), (0, 0))),
    )


def precise_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return a @ b, in full precision on every device."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
