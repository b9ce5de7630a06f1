"""`BaseRows`: a tensor of the base, a few rows at a time; `ScaledRows`: one in scaled float8."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

import numpy as np

from ..disk.base_checkpoint import Checkpoint
from ..disk.quantised import dequantised, quantised
from ..disk.system import read_at

Span = tuple[int, int]

_buffers = threading.local()


class BaseRows:
    """A tensor of a base checkpoint as `[rows, columns]`: rows are output features.

    A vector is one row. An adapter may have replaced the values.

    Args:
        checkpoint: the base.
        key: of the tensor.
        replaced: values in its place, or None.

    Attributes:
        dtype: of the tensor.
        shape: of the matrix.
    """

    def __init__(self, checkpoint: Checkpoint, key: str, replaced: np.ndarray | None):
        shape = checkpoint.shapes[key] if replaced is None else replaced.shape
        self.dtype = checkpoint.dtypes[key] if replaced is None else replaced.dtype
        self.shape = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
        self._replaced = None if replaced is None else replaced.reshape(self.shape)
        self._file = checkpoint.file_of(key)
        self._start = checkpoint.header(self._file).places[key][0]

    def rows(self, first: int, last: int) -> np.ndarray:
        """Return rows; the next call from the same thread may overwrite them."""
        if self._replaced is not None:
            return np.ascontiguousarray(self._replaced[first:last])
        size = self.shape[1] * self.dtype.itemsize
        buffer = _buffer((last - first) * size)
        with open(self._file, "rb", buffering=0) as file:
            read_at(file.fileno(), self._start + first * size, buffer)
        return buffer.view(self.dtype).reshape(last - first, self.shape[1])


class ScaledRows(BaseRows):
    """A scaled float8 tensor: its rows are dequantised, and merged ones quantised with a new scale.

    Attributes:
        stored: the dtype of the base's tensor; the rows are float32.
        new_scale: the scale that `fit` finds.
    """

    def __init__(self, checkpoint: Checkpoint, key: str, replaced: np.ndarray | None):
        super().__init__(checkpoint, key, None if replaced is None else replaced.astype(np.float32))
        self._key, self._scale = key, checkpoint.quantisation.scales[key]
        self._torch_shape = checkpoint.shapes[key]
        self.stored = checkpoint.dtypes[key]
        self._old = self.new_scale = checkpoint.read_scale(key)

    def _expanded(self, scale: np.ndarray, first: int, last: int) -> np.ndarray:
        """Return a scale for rows of the matrix, `[rows, 1]` or `[rows, columns]`."""
        is_vector = len(self._torch_shape) < 2
        full = self._scale.rows(scale, self._torch_shape, *(() if is_vector else (first, last)))
        if full.ndim > 2:
            full = np.broadcast_to(full, (last - first, *self._torch_shape[1:]))
        return full.reshape(1 if is_vector else len(full), -1)

    def rows(self, first: int, last: int) -> np.ndarray:
        """Return rows of the base in float32."""
        rows = super().rows(first, last)
        if self._replaced is not None:
            return rows
        return dequantised(rows, self._expanded(self._old, first, last))

    def fit(
        self, merged: Callable[[Span], np.ndarray], spans: Sequence[Span], pool: Executor
    ) -> None:
        """Find the new scale from all merged rows; they are recomputed when they are written.

        Args:
            merged: gives the rows of a span.
            spans: of all rows.
            pool: computes several spans at a time.
        """

        def largest(span: Span) -> np.ndarray:
            sizes = np.abs(merged(span))
            if not np.isfinite(sizes).all():
                raise ValueError(f"{self._key}: the merged weight has values that are not finite")
            shape = self._torch_shape
            sizes = sizes.reshape(-1, *shape[1:]) if len(shape) > 1 else sizes.reshape(-1)
            return self._scale.largest(sizes, first_axis=1)

        rows = np.concatenate(list(pool.map(largest, spans)))
        largest_in_all = self._scale.largest(rows, last_axis=1)
        self.new_scale = self._scale.renewed(self._old, largest_in_all, self.stored)

    def quantised(self, merged: np.ndarray, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Return merged rows in float8, and their values."""
        scale = self._expanded(self.new_scale, first, last)
        result = quantised(merged, scale, self.stored)
        return result, dequantised(result, scale)


def _buffer(size: int) -> np.ndarray:
    """Return this thread's buffer, at an address that XLA uses without a copy."""
    held: np.ndarray | None = getattr(_buffers, "held", None)
    if held is None or held.size < size:
        raw = np.empty(size + 64, np.uint8)
        held = _buffers.held = raw[-raw.ctypes.data % 64 :]
    return held[:size]
