"""‖ΔW‖ and ‖ΔW_A − ΔW_B‖ of modules of adapter files, without materialising ΔW.

ΔW = L @ R exactly, with the Khatri-Rao factors L `[out, r²]` and R `[r², in]`, so that the inner
product of two updates is the sum of (L_Aᵀ L_B) ⊙ (R_A R_Bᵀ). Where these Gram matrices would cost
more than ΔW's rows, or where they cancel, blocks of rows are materialised instead.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from jaxtyping import Float

from loha_jax.lowrank.hadamard import khatri_rao_rows

from .low_rank_update import LowRankUpdate

_BLOCK = 1 << 21
"""Elements of a block of rows."""

_GRAM_BLOCK = 1 << 18
"""Elements of a block of a Khatri-Rao factor: as many as stay in the processor's cache."""

_CANCELLED = 1e-8
"""Below this share of their terms, sums of Gram products have too few digits left."""


def update_norm(update: LowRankUpdate) -> float:
    """Return ‖ΔW‖ (Frobenius), in float64.

    Example:
        >>> one = np.ones((3, 2), np.float32)
        >>> update_norm(LowRankUpdate(((one, one.T), (one, one.T)), 0.5))
        6.0
    """
    return _norm_of_sum([(1.0, update)])


def difference_norm(first: LowRankUpdate, second: LowRankUpdate) -> float:
    """Return ‖ΔW_A − ΔW_B‖ (Frobenius), in float64; the shapes must be the same."""
    return _norm_of_sum([(1.0, first), (-1.0, second)])


def _norm_of_sum(terms: list[tuple[float, LowRankUpdate]]) -> float:
    """Return ‖Σ sign · ΔW‖."""
    first = terms[0][1]
    if any((u.rows, u.columns) != (first.rows, first.columns) for _, u in terms):
        raise ValueError(
            f"The updates differ in shape: {', '.join(f'{[u.rows, u.columns]}' for _, u in terms)}"
        )
    gram = sum(u.inner for _, u in terms) ** 2 * (first.rows + first.columns)
    rows = sum(left.shape[1] for _, u in terms for left, _ in u.pairs) * first.rows * first.columns
    with np.errstate(over="ignore", invalid="ignore"):  # the norm may be inf or NaN
        if gram < rows:
            products = [(s * t, a, b) for s, a in terms for t, b in terms]
            sums = [
                (sign * value, size) for sign, a, b in products for value, size in [_inner(a, b)]
            ]
            square, size = sum(v for v, _ in sums), sum(s for _, s in sums)
            if not square < _CANCELLED * size:
                return math.sqrt(square) if square >= 0 else math.nan
            if size == 0:
                return 0.0
        step = max(1, _BLOCK // max(first.columns, 1))
        total = 0.0
        for start in range(0, first.rows, step):
            block = sum(sign * u.block(start, start + step) for sign, u in terms)
            total += float(np.vdot(block, block))
        return math.sqrt(total) if total >= 0 else math.nan


def _inner(a: LowRankUpdate, b: LowRankUpdate) -> tuple[float, float]:
    """Return ⟨ΔW_A, ΔW_B⟩, and the sum of its terms' sizes."""
    turned = a.T
    left, right = _gram(a, b), _gram(turned, turned if a is b else b.T)
    products = left * right * (a.scale * b.scale)
    return float(products.sum()), float(np.abs(products).sum())


def _gram(a: LowRankUpdate, b: LowRankUpdate) -> Float[np.ndarray, "{a.inner} {b.inner}"]:
    """Return the inner products of the columns of the left Khatri-Rao factors."""
    step = max(1, _GRAM_BLOCK // max(a.inner, b.inner))
    total = np.zeros((a.inner, b.inner))
    for start in range(0, a.rows, step):
        first = _left(a, start, start + step)
        # of one array, BLAS does half the work
        total += first.T @ (first if a is b else _left(b, start, start + step))
    return total


def _left(update: LowRankUpdate, start: int, stop: int) -> Float[np.ndarray, "rows {update.inner}"]:
    """Return rows of the Khatri-Rao factor, in float64."""
    return functools.reduce(
        khatri_rao_rows, (left[start:stop].astype(np.float64) for left, _ in update.pairs)
    )
