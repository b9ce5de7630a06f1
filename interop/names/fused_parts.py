"""Leaves that hold several torch tensors one after another along an axis, or a part of one: found,
to say so.

A layout has no word for either (torch's q, k and v in one `[in, 3·out]` kernel, or the other way
round), so that such a leaf stays unmatched; but its owner should know what it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from loha_jax.interop.disk.base_checkpoint import Checkpoint
from loha_jax.interop.names.value_hashes import coarser, fingerprint, slice_fingerprints, value_bits


def find_parts(leaves: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, str]:
    """Return, by path, which tensors a leaf holds or is a part of; other leaves are left out.

    Only fingerprints decide, since only a message depends on it.
    """
    held: dict[str, list[tuple[int, str]]] = {}
    inside_of: dict[str, str] = {}
    sums: dict[Any, np.ndarray] = {}  # of the leaves, for as long as this takes
    for key, shape in checkpoint.shapes.items():
        size, tensor = math.prod(shape), None
        own_sums: dict[Any, np.ndarray] = {}
        for path, leaf in leaves.items():
            total, common = math.prod(leaf.shape), coarser(leaf.dtype, checkpoint.dtypes[key])
            if common is None or size == total or min(size, total) < 2:
                continue
            holds = size < total
            for axis, width in _windows(leaf.shape if holds else shape, min(size, total)):
                tensor = checkpoint.read(key) if tensor is None else tensor
                small, large = (tensor, leaf) if holds else (leaf, tensor)
                table, at = (sums, (path, common, axis)) if holds else (own_sums, (common, axis))
                if at not in table:
                    steps = slice_fingerprints(value_bits(large, common), axis)
                    table[at] = np.concatenate([np.zeros(1, np.uint64), np.cumsum(steps, dtype=np.uint64)])
                found = np.flatnonzero(table[at][width:] - table[at][:-width] == fingerprint(value_bits(small, common)))
                if found.size:
                    start, where = int(found[0]), f"{found[0]}:{found[0] + width} of axis {axis}"
                    if holds:
                        held.setdefault(path, []).append((start, f"{where} has the values of {key}"))
                    else:
                        inside_of.setdefault(path, f"it has the values of {where} of {key}")
                    break
    return {**inside_of, **{path: ", ".join(text for _, text in sorted(parts)) for path, parts in held.items()}}


def _windows(shape: tuple[int, ...], size: int) -> list[tuple[int, int]]:
    """Axes along which `size` values are a whole number of indices, and that number."""
    total = math.prod(shape)
    return [(axis, size * n // total) for axis, n in enumerate(shape) if total and size * n % total == 0 and n > 1]
