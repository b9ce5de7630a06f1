"""Small samples of frozen kernels, to tell whether a kernel has changed since it was adapted."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.core import Tracer

from loha_jax.runtime.digests import grid
from loha_jax.tree.quantised import QuantisedArray

POINTS = 64
"""About how many elements of each kernel are compared."""

K = TypeVar("K")


@dataclasses.dataclass(frozen=True, eq=False)
class KernelSample:
    """Some elements of a kernel.

    Attributes:
        shape, dtype: of the kernel.
        values: the bytes of an element by its position in the flat kernel; of a sharded kernel those that this process
            holds.
        beside: samples of the tree's leaves that no adapter changes, by path: one mapping for all kernels of a tree.
    """

    shape: tuple[int, ...]
    dtype: str
    values: dict[int, bytes]
    beside: Mapping[tuple[str, ...], KernelSample] = dataclasses.field(
        default_factory=dict, repr=False
    )

    def differs(self, other: KernelSample) -> bool:
        """Say whether two samples come from different kernels.

        False if they have no element in common.
        """
        if (self.shape, self.dtype) != (other.shape, other.dtype):
            return False  # a cast or sliced kernel: nothing can be said
        return any(
            self.values[n] != other.values[n] for n in self.values.keys() & other.values.keys()
        )


def sample_kernels(kernels: Mapping[K, Any]) -> dict[K, KernelSample]:
    """Sample kernels, by name.

    Those without values (tracers, shapes) are left out. Of a quantised kernel, the stored arrays are sampled.

    Devices pick the elements that they hold; only these are sent to the host. No process waits for another.

    Example:
        >>> sample = sample_kernels({"q": np.ones((3, 4), np.float32)})["q"]
        >>> len(sample.values), sample.differs(sample_kernels({"q": np.zeros((3, 4), np.float32)})["q"])
        (12, True)
    """
    parts: dict[K, list[tuple[np.ndarray, Any]]] = {}
    for name, kernel in kernels.items():
        stored = jax.tree.leaves(kernel) if isinstance(kernel, QuantisedArray) else [kernel]
        if not all(map(_has_values, stored)):
            continue
        parts[name], start = [], 0
        for array in stored:
            parts[name] += [(start + places, values) for places, values in _sample(array)]
            start += array.size
    values = jax.device_get({n: [v for _, v in found] for n, found in enumerate(parts.values())})
    result = {}
    for n, (name, found) in enumerate(parts.items()):
        kernel, by_position = kernels[name], {}
        for (positions, _), elements in zip(found, values[n], strict=True):
            flat = np.asarray(elements).reshape(-1)
            size, raw = flat.dtype.itemsize, flat.tobytes()
            by_position.update(
                {p: raw[i * size : (i + 1) * size] for i, p in enumerate(positions.tolist())}
            )
        result[name] = KernelSample(tuple(kernel.shape), str(kernel.dtype), by_position)
    return result


def _has_values(x: Any) -> bool:
    if isinstance(x, jax.Array) and not isinstance(x, Tracer):
        return not x.is_deleted()
    return isinstance(x, np.ndarray)


def _sample(array: Any) -> list[tuple[np.ndarray, Any]]:
    """Return flat positions and values of the points in each shard of an array."""
    if isinstance(array, np.ndarray):
        shards: list[tuple[Any, Any]] = [(array, (slice(None),) * array.ndim)]
    else:
        shards = [(s.data, s.index) for s in array.addressable_shards if s.replica_id == 0]
    points = grid(array.shape, POINTS)
    found = [_points(data, index, array.shape, points) for data, index in shards if data.size]
    return [part for part in found if part is not None]


def _points(
    data: Any, index: Sequence[slice], shape: Sequence[int], points: list[np.ndarray]
) -> Any:
    """Return the flat positions and values of the points in one shard; None if there are none."""
    starts = [s.start or 0 for s in index]
    own = [
        p[(p >= low) & (p < low + n)] for p, low, n in zip(points, starts, data.shape, strict=True)
    ]
    if not all(map(len, own)):
        return None
    positions = np.zeros((), np.int64)
    for axis, (p, size) in enumerate(zip(own, shape, strict=True)):
        positions = positions * size + p.reshape(-1, *(1,) * (len(shape) - 1 - axis))
    local = np.ix_(*(p - start for p, start in zip(own, starts, strict=True)))
    if isinstance(data, jax.Array) and next(iter(data.devices())).platform == "cpu":
        data = np.asarray(data)  # no copy, and nothing to compile
    return positions.reshape(-1), data[local]
