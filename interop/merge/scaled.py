"""Merging into scaled float8: rows are dequantised, added to, and quantised with a new scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..disk.base_checkpoint import Checkpoint
from ..disk.quantised import dequantised, quantised

Span = tuple[int, int]


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape as `[rows, columns]`: rows are output features; a vector is one row."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


class ScaledRows:
    """A scaled float8 tensor of a base checkpoint as a matrix, with its new scale.

    Args:
        checkpoint: the base.
        key: of the tensor.
        replaced: values in its place, or None.
    """

    def __init__(self, checkpoint: Checkpoint, key: str, replaced: np.ndarray | None = None):
        self._key, self._scale = key, checkpoint.quantisation.scales[key]
        self._old = checkpoint.read_scale(key)
        self._torch_shape = checkpoint.shapes[key]
        self._file = checkpoint.file_of(key)
        self._start = checkpoint.header(self._file).places[key][0]
        self._replaced = None if replaced is None else replaced.reshape(matrix(replaced.shape))
        self.dtype = checkpoint.dtypes[key]
        self.shape = matrix(self._torch_shape)
        self.new_scale = self._old

    def _expanded(self, scale: np.ndarray, first: int, last: int) -> np.ndarray:
        """Return a scale for rows of the matrix."""
        rows = self._scale.rows(
            scale, self._torch_shape, *((first, last) if len(self._torch_shape) > 1 else ())
        )
        full = (
            np.broadcast_to(rows, (last - first, *self._torch_shape[1:])) if rows.ndim > 2 else rows
        )
        return full.reshape(full.shape[0], -1) if rows.ndim > 1 else full.reshape(1, -1)

    def rows(self, first: int, last: int) -> np.ndarray:
        """Return rows of the base in float32."""
        if self._replaced is not None:
            return self._replaced[first:last].astype(np.float32)
        count = (last - first) * self.shape[1]
        data = np.fromfile(self._file, np.uint8, count, offset=self._start + first * self.shape[1])
        if data.size != count:
            raise OSError(f"{self._file} became shorter while it was read")
        return dequantised(
            data.view(self.dtype).reshape(last - first, -1), self._expanded(self._old, first, last)
        )

    def fit(
        self, merged: Callable[[Span], np.ndarray], spans: Sequence[Span], run: Callable[..., Any]
    ) -> None:
        """Find the new scale from all merged rows; they are recomputed when they are written.

        Args:
            merged: gives the rows of a span.
            spans: of all rows.
            run: `map`, or that of a pool.
        """

        def largest(span: Span) -> np.ndarray:
            sizes = np.abs(merged(span))
            if not np.isfinite(sizes).all():
                raise ValueError(f"{self._key}: the merged weight has values that are not finite")
            shape = self._torch_shape
            sizes = sizes.reshape(-1, *shape[1:]) if len(shape) > 1 else sizes.reshape(-1)
            return self._scale.largest(sizes, first_axis=1)

        rows = np.concatenate(list(run(largest, spans)))
        self.new_scale = self._scale.renewed(
            self._old, self._scale.largest(rows, last_axis=1), self.dtype
        )

    def quantised(self, merged: np.ndarray, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Return merged rows in float8, and their values."""
        scale = self._expanded(self.new_scale, first, last)
        result = quantised(merged, scale, self.dtype)
        return result, dequantised(result, scale)
