"""`MergedRows`: `W + Σ weight·ΔW`, a few rows at a time.

They are added in float32 or wider and rounded once. numpy has bfloat16 only through a slow
conversion; XLA converts, multiplies, adds and rounds in one compiled loop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from loha_jax.lowrank.hadamard import float32_or_wider
from loha_jax.lowrank.weight_decomposition import gain

from ..disk.base_checkpoint import accumulator
from .base_rows import BaseRows, Span
from .plan import MergePlan, TensorUpdate

Array = jax.Array | np.ndarray
T = TypeVar("T")

_UNROLLED = 8
"""Up to this rank, a product of factors is a sum of outer products, which XLA fuses."""


class RowsOfUpdate(NamedTuple):
    """The share of one update in rows of a weight.

    Attributes:
        pairs: `(left [rows, r], right [r, columns])`.
        scale: alpha/r.
        weight: a number.
        norms: of a decomposition per row, `[rows, 1]`, or None.
        gains: of a decomposition per column, `[1, columns]`, or None.
    """

    pairs: tuple[tuple[Array, Array], ...]
    scale: float | jax.Array
    weight: float | jax.Array
    norms: Array | None
    gains: Array | None


class MergedRows:
    """The rows of a merged tensor.

    Args:
        plan: what is added to it.
        key: of the tensor.
        base: its rows before.
        dtype: of the result.
        block: about how many bytes of rows are computed at a time.
        pool: for norms over all rows, which are computed at once.

    Attributes:
        spans: the first and last row of each block.
    """

    def __init__(
        self, plan: MergePlan, key: str, base: BaseRows, dtype: np.dtype, block: int, pool: Executor
    ):
        self._key, self._base, self._dtype = key, base, dtype
        self._wide = accumulator(base.dtype, dtype)
        self._added = [(v.reshape(base.shape), weight) for v, weight in plan.added.get(key, ())]
        rows, columns = base.shape
        step = max(1, block // max(1, columns * max(base.dtype.itemsize, dtype.itemsize)))
        self.spans = [(first, min(first + step, rows)) for first in range(0, rows, step)]
        self._updates = self._with_gains(plan.updates.get(key, ()), pool)

    def _with_gains(
        self, updates: Sequence[TensorUpdate], pool: Executor
    ) -> list[tuple[TensorUpdate, np.ndarray | None]]:
        """Return the updates, with what W + ΔW is multiplied by if its norms are per column."""
        by_column = [update for update in updates if update.column_norms is not None]
        if not by_column:
            return [(update, None) for update in updates]
        wide = accumulator(self._base.dtype)

        def squares(span: Span) -> np.ndarray:
            rows = tuple(_rows_of(update, None, *span) for update in by_column)
            base = self._base.rows(*span)
            return np.asarray(_in_precision(wide, squared_columns, base, rows), np.float64)

        # Norms over all rows: the base is read twice.
        totals = iter(np.asarray(sum(pool.map(squares, self.spans))))
        return [
            (u, None if (n := u.column_norms) is None else column_gains(next(totals), n, wide))
            for u in updates
        ]

    def rows(
        self, first: int, last: int, measure: bool = False
    ) -> tuple[np.ndarray, Sequence[jax.Array]]:
        """Return merged rows; with `measure`, also what rounding loses, as `merge_rows` does.

        Raises:
            ValueError: the dtype cannot hold their values.
        """
        block = self._base.rows(first, last)
        for value, weight in self._added:
            block = block.astype(self._wide) + weight * value[first:last].astype(self._wide)
        updates = tuple(_rows_of(update, gains, first, last) for update, gains in self._updates)
        merge = functools.partial(merge_rows, dtype=self._dtype, measure=measure)
        merged, sums = _in_precision(self._wide, merge, block, updates)
        result = np.asarray(merged)
        small = self._dtype.itemsize < 4 and self._dtype.name != "bfloat16"
        if small and overflows(block, result):
            raise ValueError(
                f"{self._key} has values that {self._dtype.name} cannot hold; choose bfloat16 or "
                "float32 with `dtype=`"
            )
        return result, sums


def overflows(base: np.ndarray, result: np.ndarray) -> bool:
    """Return whether finite values became infinite, in a dtype with a small range."""
    return not np.isfinite(result.astype(np.float32)).all() and bool(
        np.isfinite(base.astype(np.float32)).all()
    )


@functools.partial(jax.jit, static_argnames=("dtype", "measure"))
def merge_rows(
    weight: jax.Array, updates: tuple[RowsOfUpdate, ...], dtype: np.dtype, measure: bool
) -> tuple[jax.Array, list[jax.Array]]:
    """Return rows of the merged weight, and what rounding loses.

    Args:
        weight: `[rows, columns]`.
        updates: for these rows.
        dtype: of the result.
        measure: whether to compute what rounding loses.

    Returns:
        `W + Σ weight·ΔW`; with a decomposition, `W + weight·(g·(W + ΔW) − W)` with g = norms/‖W +
        ΔW‖. With `measure`, also the sums of squares of what rounding adds, of the update, and of
        the sum.
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
            assert update.norms is not None
            gains = gain(jnp.sqrt(jnp.sum(adapted**2, 1, keepdims=True)), jnp.asarray(update.norms))
        total += share * (gains.astype(wide) * adapted - base)
    result = total.astype(dtype)
    parts = (result.astype(wide) - total, total - base, total) if measure else ()
    return result, [jnp.sum(x * x) for x in parts]


@jax.jit
def squared_columns(weight: jax.Array, updates: tuple[RowsOfUpdate, ...]) -> jax.Array:
    """Return the sums of squares of W + ΔW over rows, for each update: `[updates, columns]`."""
    wide = float32_or_wider(weight.dtype)
    return jnp.stack([jnp.sum((weight.astype(wide) + _delta(u, wide)) ** 2, 0) for u in updates])


def column_gains(squares: np.ndarray, norms: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return the factors that the columns of W + ΔW are multiplied by.

    Args:
        squares: sums of squares of all rows, `[columns]`.
        norms: `[1, in]`; columns are in · prod(spatial).
        dtype: of the result.
    """
    width = squares.size // norms.size
    lengths = np.sqrt(squares.reshape(norms.size, width).sum(1)).astype(dtype)
    return np.repeat(np.asarray(gain(lengths, norms.reshape(-1))), width)[None]


def _rows_of(update: TensorUpdate, gains: np.ndarray | None, first: int, last: int) -> RowsOfUpdate:
    norms = update.norms if update.column_norms is None else None
    return RowsOfUpdate(
        tuple((left[first:last], right) for left, right in update.update.pairs),
        float(update.update.scale),
        float(update.weight),
        None if norms is None else norms[first:last],
        gains,
    )


def _in_precision(
    wide: np.dtype,
    fn: Callable[[jax.Array, tuple[RowsOfUpdate, ...]], T],
    block: np.ndarray,
    updates: tuple[RowsOfUpdate, ...],
) -> T:
    """Call a jitted function with a block that is not copied, in 64 bits if the values are."""
    with jax.enable_x64(wide.itemsize > 4):
        return jax.block_until_ready(fn(jax.device_put(block, may_alias=True), updates))


def _delta(update: RowsOfUpdate, dtype: jnp.dtype) -> jax.Array:
    products = [_product(left.astype(dtype), right.astype(dtype)) for left, right in update.pairs]
    return functools.reduce(jnp.multiply, products) * jnp.asarray(update.scale, dtype)


def _product(left: Array, right: Array) -> jax.Array:
    if left.shape[1] > _UNROLLED:
        return jnp.matmul(left, right, precision="highest")
    terms = [jnp.multiply(left[:, n, None], right[n]) for n in range(left.shape[1])]
    return functools.reduce(jnp.add, terms)
