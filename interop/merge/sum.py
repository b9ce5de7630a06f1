"""`W + Σ weight·ΔW` of rows of a weight, in one compiled pass: added in float32 or wider, rounded once.

numpy has bfloat16 only through a slow conversion; XLA converts, multiplies, adds and rounds in one
loop.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from loha_jax.lowrank.hadamard import float32_or_wider
from loha_jax.lowrank.weight_decomposition import gain

from .plan import TensorUpdate

_UNROLLED = 8
"""Up to this rank, a product of factors is a sum of outer products, which XLA fuses with all the rest."""


class RowsOfUpdate(NamedTuple):
    """The share of one update in rows of a weight.

    Attributes:
        pairs: `(left [rows, r], right [r, columns])`.
        scale: alpha/r.
        weight: a number.
        norms: of a decomposition per row, `[rows, 1]`, or None.
        gains: of a decomposition per column, `[1, columns]`, or None.
    """

    pairs: tuple[tuple[Any, Any], ...]
    scale: Any
    weight: Any
    norms: Any
    gains: Any


class RowUpdates:
    """The updates of one tensor, taken in blocks of rows.

    Args:
        updates: of the tensor.
        gains: for each update with norms per column: what the columns of W + ΔW are multiplied by.
    """

    def __init__(self, updates: Sequence[TensorUpdate], gains: Sequence[np.ndarray | None]):
        self._updates = list(zip(updates, gains, strict=True))

    def rows(self, start: int, stop: int) -> tuple[RowsOfUpdate, ...]:
        """Return the updates of some rows."""
        return tuple(
            RowsOfUpdate(
                tuple((left[start:stop], right) for left, right in u.update.pairs),
                float(u.update.scale),
                float(u.weight),
                u.norms[start:stop] if u.norms is not None and gains is None else None,
                gains,
            )
            for u, gains in self._updates
        )


@functools.partial(jax.jit, static_argnames=("dtype", "measure"))
def merge_rows(
    weight: jax.Array, updates: tuple[RowsOfUpdate, ...], dtype: Any, measure: bool = False
) -> Any:
    """Return rows of the merged weight.

    Args:
        weight: `[rows, columns]`.
        updates: for these rows.
        dtype: of the result.
        measure: also return what rounding loses.

    Returns:
        `W + Σ weight·ΔW`; with a decomposition, `W + weight·(g·(W + ΔW) − W)` with g = norms/‖W +
        ΔW‖. With `measure` a tuple of it and the sums of squares of what rounding adds, of the
        update, and of the sum.
    """
    factors = [factor for u in updates for pair in u.pairs for factor in pair]
    wide = float32_or_wider(weight.dtype, *(f.dtype for f in factors))
    base = weight.astype(wide)
    total = base
    for update in updates:
        delta = _delta(update, wide)
        share = jnp.asarray(update.weight, wide)
        if update.norms is None and update.gains is None:
            total += share * delta
            continue
        adapted = base + delta
        gains = update.gains
        if gains is None:
            gains = gain(jnp.sqrt(jnp.sum(adapted**2, 1, keepdims=True)), update.norms)
        total += share * (gains.astype(wide) * adapted - base)
    result = total.astype(dtype)
    if not measure:
        return result
    return result, [jnp.sum(x * x) for x in (result.astype(wide) - total, total - base, total)]


@jax.jit
def squared_columns(weight: jax.Array, updates: tuple[RowsOfUpdate, ...]) -> jax.Array:
    """Return the sums of squares of W + ΔW over rows, for each update: `[updates, columns]`."""
    wide = float32_or_wider(weight.dtype)
    return jnp.stack([jnp.sum((weight.astype(wide) + _delta(u, wide)) ** 2, 0) for u in updates])


def column_gains(squares: np.ndarray, norms: np.ndarray, dtype: Any) -> np.ndarray:
    """Return the factors that the columns of W + ΔW are multiplied by.

    Args:
        squares: sums of squares of all rows, `[columns]`.
        norms: `[1, in]`; columns are in · prod(spatial).
        dtype: of the result.
    """
    width = squares.size // norms.size
    lengths = np.sqrt(squares.reshape(norms.size, width).sum(1)).astype(dtype)
    return np.repeat(np.asarray(gain(lengths, norms.reshape(-1))), width)[None]


def _delta(update: RowsOfUpdate, dtype: Any) -> jax.Array:
    result: Any = None
    for left, right in update.pairs:
        product = _product(left.astype(dtype), right.astype(dtype))
        result = product if result is None else result * product
    return result * jnp.asarray(update.scale, dtype)


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    if left.shape[1] > _UNROLLED:
        return jnp.matmul(left, right, precision="highest")
    terms = [left[:, n, None] * right[n] for n in range(left.shape[1])]
    return functools.reduce(jnp.add, terms)
