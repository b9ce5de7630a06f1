"""Merging into scaled float8: rows are dequantised, added to, and quantised again with a scale that fits them."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loha_jax.merge import LOSS_LIMIT

from .atomic import write_atomically
from .checkpoint import Checkpoint
from .quantised import dequantised, quantised

Span = tuple[int, int]


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows are out features; what has no second axis is one row per value of its first."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


@dataclasses.dataclass
class Loss:
    """Sums of squares over the values of one merged tensor.

    Attributes:
        dtype: of the merged tensor.
        scaled: whether it has a scale.
        lost: of what is stored, less what was to be stored.
        update: of what was to be stored, less the base.
        size: of what was to be stored.
    """

    dtype: str
    scaled: bool
    lost: float = 0.0
    update: float = 0.0
    size: float = 0.0

    @property
    def share(self) -> float:
        """‖stored − (W + ΔW)‖ / ‖ΔW‖."""
        return math.sqrt(self.lost / self.update) if self.update else 0.0

    @property
    def relative(self) -> float:
        """‖stored − (W + ΔW)‖ / ‖W + ΔW‖."""
        return math.sqrt(self.lost / self.size) if self.size else 0.0


class Losses:
    """The rounding losses of all merged tensors, added up from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.tensors: dict[str, Loss] = {}

    def add(self, key: str, dtype: np.dtype, scaled: bool, sums: Sequence[Any]) -> None:
        """Adds a block's sums of squares: lost, update, size."""
        lost, update, size = (float(s) for s in sums)
        with self._lock:
            own = self.tensors.setdefault(key, Loss(dtype.name, scaled))
            own.lost, own.update, own.size = own.lost + lost, own.update + update, own.size + size

    def write(self, path: Path) -> None:
        """Notes them in a file beside a finished shard."""
        write_atomically(path, json.dumps(self.to_json()).encode())

    def to_json(self) -> dict[str, Any]:
        """Return the losses in the form that `add_json` takes."""
        return {key: dataclasses.asdict(loss) for key, loss in self.tensors.items()}

    def add_json(self, values: dict[str, Any]) -> None:
        """Take over the losses of a shard that an earlier run finished."""
        self.tensors.update({key: Loss(**loss) for key, loss in values.items()})


def overall(tensors: Sequence[Loss]) -> float:
    """The share that is lost of all the tensors' updates."""
    update = sum(t.update for t in tensors)
    return math.sqrt(sum(t.lost for t in tensors) / update) if update else 0.0


def loss_notes(losses: dict[str, Loss]) -> list[str]:
    """Sentences on updates of which rounding loses much."""
    notes = []
    for dtype, scaled in sorted({(t.dtype, t.scaled) for t in losses.values()}):
        own = {key: t for key, t in losses.items() if (t.dtype, t.scaled) == (dtype, scaled)}
        if (share := overall(list(own.values()))) > LOSS_LIMIT or any(t.share > LOSS_LIMIT for t in own.values()):
            worst = max(own, key=lambda key: own[key].share)
            many = sum(t.share > LOSS_LIMIT for t in own.values())
            notes.append(
                f"rounding to {'scaled ' * scaled}{dtype} loses {share:.0%} of the update (‖stored − (W + ΔW)‖/‖ΔW‖); "
                f"more than {LOSS_LIMIT:.0%} in {many} of {len(own)} tensors, most in {worst}, {own[worst].share:.0%}. "
                "A base of more bits keeps it"
            )
    return notes


def check_losses(losses: dict[str, Loss], force: bool) -> None:
    """Raises ValueError where rounding to float8 without scales loses too much."""
    own = {key: t for key, t in losses.items() if not t.scaled and t.dtype.startswith("float8")}
    if force or (share := overall(list(own.values()))) <= LOSS_LIMIT:
        return
    worst = max(own, key=lambda key: own[key].share)
    raise ValueError(
        f"Rounding to {own[worst].dtype}, which has no scales here, loses {share:.0%} of the update "
        f"(‖round(W + ΔW) − (W + ΔW)‖/‖ΔW‖), most in {worst} ({own[worst].share:.0%}); nothing was written. Merge into "
        "a base of more bits, give --dtype bfloat16 (dtype=), or accept it with --force (force=True)"
    )


class ScaledRows:
    """A scaled float8 tensor of a base checkpoint as a matrix, and what it becomes.

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
        """A scale for rows of the matrix."""
        rows = self._scale.rows(scale, self._torch_shape, *((first, last) if len(self._torch_shape) > 1 else ()))
        full = np.broadcast_to(rows, (last - first, *self._torch_shape[1:])) if rows.ndim > 2 else rows
        return full.reshape(full.shape[0], -1) if rows.ndim > 1 else full.reshape(1, -1)

    def rows(self, first: int, last: int) -> np.ndarray:
        """Rows of the base in float32."""
        if self._replaced is not None:
            return self._replaced[first:last].astype(np.float32)
        count = (last - first) * self.shape[1]
        data = np.fromfile(self._file, np.uint8, count, offset=self._start + first * self.shape[1])
        if data.size != count:
            raise OSError(f"{self._file} became shorter while it was read")
        return dequantised(data.view(self.dtype).reshape(last - first, -1), self._expanded(self._old, first, last))

    def fit(self, merged: Callable[[Span], np.ndarray], spans: Sequence[Span], run: Callable[..., Any]) -> None:
        """Finds the new scale from all merged rows, which are computed once for it and once to be written.

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
        self.new_scale = self._scale.renewed(self._old, self._scale.largest(rows, last_axis=1), self.dtype)

    def quantised(self, merged: np.ndarray, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Merged rows in float8, and their values."""
        scale = self._expanded(self.new_scale, first, last)
        result = quantised(merged, scale, self.dtype)
        return result, dequantised(result, scale)
