"""The best approximation of an update as one product of two matrices, of a given rank."""

from __future__ import annotations

import functools
import math

import numpy as np
from jaxtyping import Float

from loha_jax.lowrank.hadamard import khatri_rao_rows

from .low_rank_update import LowRankUpdate


def best_factors(
    update: LowRankUpdate, rank: int | None, energy: float | None, groups: int
) -> tuple[Float[np.ndarray, "out k"], Float[np.ndarray, "groups k columns"], float]:
    """Return `left`, `right` and the relative error; each group of rows has a `right`."""
    ka, kb = _exact_factors(update)
    # a pair that makes a matrix of ones has one column that is not zero
    kept = ka.any(0) & kb.any(1)
    if not kept.any():
        return np.zeros((update.rows, 1)), np.zeros((groups, 1, update.columns)), 0.0
    ka, kb = np.ascontiguousarray(ka[:, kept]), np.ascontiguousarray(kb[kept])
    inner, out = ka.shape[1], update.rows // groups
    most = min(inner, out, update.columns)
    slots = most if rank is None else min(math.ceil(rank / groups), most)
    if slots == inner and energy is None:
        return ka, np.broadcast_to(kb, (groups, *kb.shape)), 0.0
    qa, ra = np.linalg.qr(ka.reshape(groups, out, inner))
    qb, rb = np.linalg.qr(kb.T)
    u, values, vt = np.linalg.svd(ra @ rb.T, full_matrices=False)
    energies = np.sum(values**2, 0)
    if energy is not None:
        kept_energies = np.cumsum(energies)
        slots = min(int(np.searchsorted(kept_energies, energy * kept_energies[-1])) + 1, most)
    roots = np.sqrt(values[:, :slots])
    left = qa @ (u[:, :, :slots] * roots[:, None, :])
    right = (roots[:, :, None] * vt[:, :slots]) @ qb.T
    total = energies.sum()
    error = math.sqrt(energies[slots:].sum() / total) if total else 0.0
    return left.reshape(update.rows, slots), right, error


def singular_values(update: LowRankUpdate) -> Float[np.ndarray, " k"]:
    """Return the singular values of ΔW that may differ from zero, in float64.

    Example:
        >>> one = np.ones((3, 2), np.float32)
        >>> np.abs(singular_values(LowRankUpdate(((one, one.T), (one, one.T)), 0.5))).round(6)
        array([6., 0., 0.])
    """
    ka, kb = _exact_factors(update)
    (_, ra), (_, rb) = np.linalg.qr(ka), np.linalg.qr(kb.T)
    return np.linalg.svd(ra @ rb.T, compute_uv=False)


def _exact_factors(
    update: LowRankUpdate,
) -> tuple[Float[np.ndarray, "out k"], Float[np.ndarray, "k columns"]]:
    """Return the two matrices whose product is ΔW, in float64: Khatri-Rao products of factors."""
    lefts = (left.astype(np.float64) for left, _ in update.pairs)
    rights = (right.T.astype(np.float64) for _, right in update.pairs)
    ka = functools.reduce(khatri_rao_rows, lefts) * update.scale
    return ka, functools.reduce(khatri_rao_rows, rights).T


def over_all_channels(
    right: Float[np.ndarray, "groups k columns"], in_shape: tuple[int, ...]
) -> Float[np.ndarray, "groups k groups columns"]:
    """Return `right` with zeros at the channels of the other groups."""
    groups, slots = right.shape[:2]
    whole = np.zeros((groups, slots, groups, math.prod(in_shape)))
    for group in range(groups):
        whole[group, :, group] = right[group]
    return whole
