"""Small samples of frozen kernels, to tell whether a kernel has changed since it was adapted."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jax.core import Tracer

from loha_jax.runtime.shards import Array, grid, own_points
from loha_jax.tree.quantised import QuantisedArray

POINTS = 64
"""About how many elements of each kernel are compared."""

K = TypeVar("K")


@dataclasses.dataclass(frozen=True, eq=False)
class KernelSample:
    """Some elements of a kernel.

    Attributes:
        shape, dtype: of the kernel.
        values: the bytes of an element by its position in the flat kernel; of a sharded kernel
            those that this process holds.
        beside: samples of the tree's leaves that no adapter changes, by path: one mapping for all
            kernels of a tree.
    """

    shape: tuple[int, ...]
    dtype: str
    values: dict[int, bytes]
    beside: Mapping[tuple[str, ...], KernelSample] = dataclasses.field(
        default_factory=dict, repr=False
    )

    def differs(self, other: KernelSample) -> bool:
        """Return whether two samples come from different kernels.

        False if they have no element in common.
        """
        if (self.shape, self.dtype) != (other.shape, other.dtype):
            return False  # a cast or sliced kernel: nothing can be said
        return any(
            self.values[n] != other.values[n] for n in self.values.keys() & other.values.keys()
        )


def sample_kernels(kernels: Mapping[K, Array | QuantisedArray]) -> dict[K, KernelSample]:
    """Sample kernels, by name.

    Those without values (tracers, shapes) are left out. Of a quantised kernel, the stored
    arrays are sampled.

    Devices pick the elements that they hold; only these are sent to the host. No process waits for
    another.

    Example:
        >>> sample = sample_kernels({"q": np.ones((3, 4), np.float32)})["q"]
        >>> other = sample_kernels({"q": np.zeros((3, 4), np.float32)})["q"]
        >>> len(sample.values), sample.differs(other)
        (12, True)
    """
    stored = {
        name: jax.tree.leaves(kernel) if isinstance(kernel, QuantisedArray) else [kernel]
        for name, kernel in kernels.items()
    }
    found = {
        name: _sample(arrays) for name, arrays in stored.items() if all(map(_has_values, arrays))
    }
    values = iter(jax.device_get([[p.values for p in points] for points in found.values()]))
    result = {}
    for name, points in found.items():
        by_position: dict[int, bytes] = {}
        for (_, positions), elements in zip(points, next(values), strict=True):
            raw = np.asarray(elements).reshape(-1).view(f"V{elements.dtype.itemsize}")
            by_position.update(zip(positions.tolist(), raw.tolist(), strict=True))
        kernel = kernels[name]
        result[name] = KernelSample(tuple(kernel.shape), str(kernel.dtype), by_position)
    return result


class _Sample(NamedTuple):
    """Elements, and their positions among those of all arrays of a kernel."""

    values: Array
    positions: np.ndarray


def _sample(arrays: Sequence[Array]) -> list[_Sample]:
    """Return the points that this process holds of a kernel's arrays, one after the other."""
    found, start = list[_Sample](), 0
    for array in arrays:
        for values, indices in own_points(array, grid(array.shape, POINTS)):
            # a scalar has no indices
            at = (
                np.ravel_multi_index(np.ix_(*indices), array.shape) if indices else np.zeros(1, int)
            )
            found.append(_Sample(values, start + at.reshape(-1)))
        start += array.size
    return found


def _has_values(kernel: object) -> bool:
    if not isinstance(kernel, jax.Array):
        return isinstance(kernel, np.ndarray)
    return not isinstance(kernel, Tracer) and not kernel.is_deleted()
