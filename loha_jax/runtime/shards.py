"""The elements of arrays that this process holds, and the points of a grid among them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

Array = jax.Array | np.ndarray | np.generic

_SHORT = 128  # an axis that may be a stack of layers


class Points(NamedTuple):
    """Elements of an array.

    Attributes:
        values: the elements, an array with the same axes.
        indices: along each axis of the whole array, in order.
    """

    values: Array
    indices: list[np.ndarray]


def grid(shape: Sequence[int], elements: int) -> list[np.ndarray]:
    """Return indices along each axis, about `elements` in all.

    The shortest axis (a stack of layers, say) gets all of its indices.

    Example:
        >>> [len(indices) for indices in grid((32, 4096, 4096), 1 << 14)]
        [32, 22, 23]
    """
    result: list[np.ndarray] = [np.zeros(0, np.int64)] * len(shape)
    left = elements
    for done, axis in enumerate(sorted(range(len(shape)), key=lambda axis: shape[axis])):
        size, share = shape[axis], math.floor(left ** (1 / (len(shape) - done)))
        count = min(size, left if not done and size <= _SHORT else share)
        result[axis] = (2 * np.arange(count) + 1) * size // (2 * max(count, 1))
        left //= max(count, 1)
    return result


def own_points(array: Array, chosen: Sequence[np.ndarray] | None) -> list[Points]:
    """Return the elements that this process holds and counts: one replica of each shard.

    Args:
        array: with values, typed random keys excepted.
        chosen: the points of a `grid`; by default all elements.

    Example:
        >>> [points] = own_points(np.arange(12).reshape(3, 4), [np.array([0, 2]), np.array([3])])
        >>> points.values.tolist()
        [[3], [11]]
    """
    if isinstance(array, jax.Array):
        shards = [(s.data, s.index) for s in array.addressable_shards if s.replica_id == 0]
    else:
        shards = [(np.asarray(array), (slice(None),) * array.ndim)]
    found = []
    for data, index in shards:
        if isinstance(data, jax.Array) and next(iter(data.devices())).platform == "cpu":
            data = np.asarray(data)  # no copy, nothing to compile, one program for all devices
        spans = [(s.start or 0, size) for s, size in zip(index, data.shape, strict=True)]
        indices = [np.arange(low, low + size) for low, size in spans]
        if chosen is not None:
            pairs = zip(chosen, spans, strict=True)
            indices = [c[(c >= low) & (c < low + size)] for c, (low, size) in pairs]
            local = (own - low for own, (low, _) in zip(indices, spans, strict=True))
            data = data[np.ix_(*local)] if all(map(len, indices)) else data[:0]
        if data.size:
            found.append(Points(data, indices))
    return found
