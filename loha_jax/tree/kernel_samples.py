"""Small samples of frozen kernels, to tell whether a kernel has changed since it was adapted."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

import jax
import numpy as np
from jax.core import Tracer

from loha_jax.runtime.shards import Array, grid, own_points

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
        """Say whether two samples come from different kernels.

        False if they have no element in common.
        """
        if (self.shape, self.dtype) != (other.shape, other.dtype):
            return False  # a cast or sliced kernel: nothing can be said
        return any(
            self.values[n] != other.values[n] for n in self.values.keys() & other.values.keys()
        )


def sample_kernels(kernels: Mapping[K, Array]) -> dict[K, KernelSample]:
    """Sample kernels, by name.

    Those without values (tracers, shapes, quantised arrays) are left out.

    Devices pick the elements that they hold; only these are sent to the host. No process waits for
    another.

    Example:
        >>> sample = sample_kernels({"q": np.ones((3, 4), np.float32)})["q"]
        >>> other = sample_kernels({"q": np.zeros((3, 4), np.float32)})["q"]
        >>> len(sample.values), sample.differs(other)
        (12, True)
    """
    found = {
        name: own_points(kernel, grid(kernel.shape, POINTS))
        for name, kernel in kernels.items()
        if _has_values(kernel)
    }
    values = iter(jax.device_get([[p.values for p in points] for points in found.values()]))
    result = {}
    for name, points in found.items():
        kernel, by_position = kernels[name], {}
        for (_, indices), elements in zip(points, next(values), strict=True):
            positions = np.ravel_multi_index(np.ix_(*indices), kernel.shape)
            raw = np.asarray(elements).reshape(-1).view(f"V{elements.dtype.itemsize}")
            by_position.update(zip(positions.reshape(-1).tolist(), raw.tolist(), strict=True))
        result[name] = KernelSample(tuple(kernel.shape), str(kernel.dtype), by_position)
    return result


def _has_values(kernel: object) -> bool:
    if not isinstance(kernel, jax.Array):
        return isinstance(kernel, np.ndarray)
    return not isinstance(kernel, Tracer) and not kernel.is_deleted()
