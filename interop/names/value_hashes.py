"""Sums of hashed values.

They are equal for arrays that hold the same values, in whatever order and shape.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from jax.typing import ArrayLike, DTypeLike

_CHUNK = 1 << 18
_TABLE = np.random.default_rng(0).integers(0, 2**64, 1 << 16, dtype=np.uint64)
_MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)


def coarser(a: DTypeLike, b: DTypeLike) -> np.dtype | None:
    """Return the dtype to compare in: that with fewer digits; int64 for integers; else None.

    Example:
        >>> coarser(np.dtype("float32"), np.dtype("bfloat16"))
        dtype(bfloat16)
    """
    a, b = np.dtype(a), np.dtype(b)
    floats = [_digits(a), _digits(b)]
    if None not in floats:
        return min(a, b, key=lambda d: (_digits(d), str(d)))
    if all(d.kind in "iub" for d in (a, b)):
        return np.dtype(np.int64)
    return None


def _digits(dtype: np.dtype) -> int | None:
    try:
        return ml_dtypes.finfo(dtype).nmant
    except ValueError:
        return None


def value_bits(array: ArrayLike, dtype: np.dtype) -> np.ndarray:
    """Return an array's values in `dtype`, as unsigned integers."""
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.ascontiguousarray(np.asarray(array).astype(dtype, copy=False)).reshape(
            np.shape(array)
        )
    return values.view(f"u{dtype.itemsize}")


def fingerprint(bits: np.ndarray) -> int:
    """Return the sum of hashed values, modulo 2^64."""
    flat, total = bits.reshape(-1), np.uint64(0)
    with np.errstate(over="ignore"):
        for start in range(0, flat.size, _CHUNK):
            chunk = flat[start : start + _CHUNK]
            if chunk.itemsize <= 2:
                total += _TABLE[chunk].sum(dtype=np.uint64)
            else:
                mixed = chunk.astype(np.uint64) * _MIX[0]
                mixed ^= mixed >> np.uint64(32)
                mixed *= _MIX[1]
                mixed ^= mixed >> np.uint64(29)
                total += mixed.sum(dtype=np.uint64)
    return int(total)
