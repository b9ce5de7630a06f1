"""`ShardWriter`: one file of a merged checkpoint, written block by block by a few threads."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..disk.base_checkpoint import Checkpoint, Header, is_floating
from ..disk.system import copy_range, read_at, sync_folder, write_at
from ..updates.low_rank_update import accumulator
from ..updates.rounding import Losses
from .plan import MergePlan
from .scaled import ScaledRows, matrix
from .sum import RowUpdates, column_gains, merge_rows, squared_columns

_BLOCK = 4 << 20
"""Bytes of a block of rows; a handful are in memory at a time."""

_WORKERS = 3
"""Threads that read, add and write blocks, so that none of the three waits for another."""


def new_dtype(own: np.dtype, dtype: Any) -> np.dtype:
    """Return the dtype of a merged tensor: `dtype` for floating ones, if given."""
    return np.dtype(dtype) if dtype is not None and is_floating(own) else own


class ShardWriter:
    """One weight file of the base and the merged file made from it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: MergePlan,
        file: Path,
        header: Header,
        dtype: Any,
        count: Callable[[int], None],
        losses: Losses,
    ):
        self._checkpoint, self._plan, self._file = checkpoint, plan, file
        self._old, self._new, self._dtype = checkpoint.header(file), header, dtype
        self._count, self._losses = count, losses
        self._scaled: dict[str, ScaledRows] = {}
        self._buffers = threading.local()
        self._writing = threading.Lock()

    def write(self, path: Path, finish: Callable[[], None]) -> None:
        """Write a temporary file in the same folder, flush it, call `finish`, rename it to `path`."""
        part = path.with_name(f".{path.name}.part")
        try:
            with open(self._file, "rb") as source, open(part, "wb", buffering=0) as target:
                self._source, self._target = source.fileno(), target.fileno()
                target.truncate(self._new.file_size)
                self._write(0, self._new.data)
                self._count(len(self._new.data))
                with concurrent.futures.ThreadPoolExecutor(_WORKERS) as pool:
                    _run_all(pool, self._tasks(pool), self._count)
                os.fsync(self._target)
            finish()
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)

    def _tasks(self, pool: concurrent.futures.Executor) -> Iterator[Callable[[], int]]:
        """Yield calls that each write some bytes and return their number, in the order of the base's bytes."""
        for key, (start, end) in sorted(self._old.places.items(), key=lambda item: item[1]):
            own, target = (
                self._checkpoint.dtypes[key],
                new_dtype(self._checkpoint.dtypes[key], self._dtype),
            )
            place = self._new.places[key][0]
            scales, weight = (
                self._checkpoint.quantisation.scales,
                self._checkpoint.quantisation.weights.get(key),
            )
            if key in self._plan.keys and key in scales:
                yield from self._scaled_tasks(pool, key)
                continue
            if weight is not None and weight in self._plan.keys:
                value = self._scaled_rows(pool, weight).new_scale
                yield lambda key=key, value=value: self._write_value(key, value)
                continue
            if key in self._plan.keys or own != target:
                yield from self._tensor_tasks(pool, key, start, own, target)
                continue
            for offset in range(0, end - start, 8 * _BLOCK):
                size = min(8 * _BLOCK, end - start - offset)
                yield lambda a=start + offset, b=place + offset, n=size: self._copy(a, b, n)

    def _merged(
        self, base: ScaledRows, updates: RowUpdates, key: str, span: tuple[int, int]
    ) -> np.ndarray:
        """Return rows of a scaled tensor with its updates, in float32."""
        block = base.rows(*span)
        for value, weight in self._plan.added.get(key, ()):
            block = block + weight * value.reshape(base.shape)[slice(*span)].astype(np.float32)
        return np.asarray(
            _in_precision(np.float32, merge_rows, block, updates.rows(*span), np.dtype(np.float32))
        )

    def _scaled_parts(
        self, pool: concurrent.futures.Executor, key: str, base: ScaledRows
    ) -> tuple[RowUpdates, list[tuple[int, int]]]:
        rows, columns = base.shape
        step = max(1, _BLOCK // max(1, 4 * columns))
        spans = [(a, min(a + step, rows)) for a in range(0, rows, step)]
        return self._row_updates(pool, key, base, spans), spans

    def _scaled_rows(self, pool: concurrent.futures.Executor, key: str) -> ScaledRows:
        """Return a scaled tensor that is merged, with its new scale."""
        if key not in self._scaled:
            base = ScaledRows(self._checkpoint, key, self._plan.replaced.get(key))
            updates, spans = self._scaled_parts(pool, key, base)
            base.fit(lambda span: self._merged(base, updates, key, span), spans, pool.map)
            self._scaled[key] = base
        return self._scaled[key]

    def _scaled_tasks(
        self, pool: concurrent.futures.Executor, key: str
    ) -> Iterator[Callable[[], int]]:
        """Yield the tasks of a float8 tensor whose scale is a tensor of its own."""
        base = self._scaled_rows(pool, key)
        updates, spans = self._scaled_parts(pool, key, base)
        place = self._new.places[key][0]

        def write(span: tuple[int, int]) -> int:
            merged = self._merged(base, updates, key, span)
            result, values = base.quantised(merged, *span)
            parts = (values - merged, merged - base.rows(*span), merged)
            self._losses.add(key, base.dtype, True, [np.vdot(x, x) for x in parts])
            self._write(place + span[0] * base.shape[1], result.reshape(-1).view(np.uint8))
            return result.nbytes

        for span in spans:
            yield lambda span=span: write(span)

    def _tensor_tasks(
        self,
        pool: concurrent.futures.Executor,
        key: str,
        start: int,
        own: np.dtype,
        target: np.dtype,
    ) -> Iterator[Callable[[], int]]:
        value = self._plan.replaced.get(key)
        shape = self._checkpoint.shapes[key] if value is None else value.shape
        if value is not None and not is_floating(own):  # a counter
            yield lambda: self._write_value(key, value.astype(own))
            return
        if value is not None:
            if (
                key in self._plan.updates
            ):  # PEFT puts it into the model, in its dtype, and adds to that
                value = _rounded(key, value, own)
            own = value.dtype
            base: Any = np.ascontiguousarray(value).reshape(matrix(shape))
        else:
            base = _FileMatrix(self._source, start, own, matrix(shape))
        added = [
            (value.reshape(matrix(shape)), weight)
            for value, weight in self._plan.added.get(key, ())
        ]
        rows, columns = matrix(shape)
        step = max(1, _BLOCK // max(1, columns * max(own.itemsize, target.itemsize)))
        spans = [(a, min(a + step, rows)) for a in range(0, rows, step)]
        updates = self._row_updates(pool, key, base, spans)
        place = self._new.places[key][0]

        def write(first: int, last: int) -> int:
            block = self._rows(base, first, last)
            wide = accumulator(own, target)
            if added:
                block = sum((w * d[first:last].astype(wide) for d, w in added), block.astype(wide))
            measure = target.itemsize < 4 and key in self._plan.updates
            result = _in_precision(
                wide, merge_rows, block, updates.rows(first, last), target, measure
            )
            if measure:
                self._losses.add(key, target, False, result[1])
                result = result[0]
            result = np.asarray(result)
            if target.itemsize < 4 and target.name != "bfloat16" and _overflows(block, result):
                raise ValueError(
                    f"{key} has values that {target.name} cannot hold; choose bfloat16 or float32 with `dtype=`"
                )
            self._write(
                place + first * columns * target.itemsize, result.reshape(-1).view(np.uint8)
            )
            return (last - first) * columns * target.itemsize

        for first, last in spans:
            yield lambda first=first, last=last: write(first, last)

    def _write(self, place: int, data: Any) -> None:
        with (
            self._writing
        ):  # threads that wait for a file's lock in the kernel use up the processor
            write_at(self._target, place, data)

    def _copy(self, start: int, place: int, size: int) -> int:
        with self._writing:
            copy_range(self._source, start, self._target, place, size)
        return size

    def _write_value(self, key: str, value: np.ndarray) -> int:
        self._write(
            self._new.places[key][0], np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        )
        return value.nbytes

    def _row_updates(
        self,
        pool: concurrent.futures.Executor,
        key: str,
        base: Any,
        spans: Sequence[tuple[int, int]],
    ) -> RowUpdates:
        updates = self._plan.updates.get(key, [])
        by_column = [
            n for n, u in enumerate(updates) if u.norms is not None and u.norms.shape[0] == 1
        ]
        gains: list[np.ndarray | None] = [None] * len(updates)
        if by_column:  # norms over all rows: the base is read twice
            whole = RowUpdates([updates[n] for n in by_column], [None] * len(by_column))
            wide = accumulator(self._checkpoint.dtypes[key])

            def squares(span: tuple[int, int]) -> np.ndarray:
                rows = tuple(u._replace(norms=None) for u in whole.rows(*span))
                return np.asarray(
                    _in_precision(wide, squared_columns, self._rows(base, *span), rows), np.float64
                )

            total = sum(pool.map(squares, spans))
            for row, n in enumerate(by_column):
                norms = updates[n].norms
                assert norms is not None
                gains[n] = column_gains(np.asarray(total)[row], norms, wide)
        return RowUpdates(updates, gains)

    def _rows(self, base: Any, first: int, last: int) -> np.ndarray:
        if isinstance(base, ScaledRows):
            return base.rows(first, last)
        if not isinstance(base, _FileMatrix):
            return base[first:last]
        size = (last - first) * base.shape[1] * base.dtype.itemsize
        held = getattr(self._buffers, "held", None)
        if held is None or held.size < size:
            held = self._buffers.held = _aligned(size)
        buffer = held[:size]
        read_at(base.descriptor, base.start + first * base.shape[1] * base.dtype.itemsize, buffer)
        return buffer.view(base.dtype).reshape(last - first, base.shape[1])


@dataclasses.dataclass(frozen=True)
class _FileMatrix:
    """A tensor in a file, as a matrix."""

    descriptor: int
    start: int
    dtype: np.dtype
    shape: tuple[int, int]


def _rounded(key: str, value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        result = value.astype(dtype)
    if _overflows(value, result):
        raise ValueError(f"{key} has values that {dtype.name}, the base's dtype, cannot hold")
    return result


def _overflows(base: np.ndarray, result: np.ndarray) -> bool:
    """Return whether finite values became infinite, in a dtype with a small range."""
    return not np.isfinite(result.astype(np.float32)).all() and bool(
        np.isfinite(base.astype(np.float32)).all()
    )


def _in_precision(wide: Any, fn: Callable[..., Any], block: np.ndarray, *args: Any) -> Any:
    """Call a jitted function with a block that is not copied, in 64 bits if the values are."""
    with jax.enable_x64(np.dtype(wide).itemsize > 4):
        return jax.block_until_ready(fn(jax.device_put(block, may_alias=True), *args))


def _aligned(size: int) -> np.ndarray:
    """Return a buffer at an address that XLA uses without a copy."""
    raw = np.empty(size + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + size]


def _run_all(
    pool: concurrent.futures.Executor,
    tasks: Iterator[Callable[[], int]],
    count: Callable[[int], None],
) -> None:
    """Run calls, a few at a time; after an error, wait for those that are running and raise it."""
    running: set[concurrent.futures.Future[int]] = set()
    try:
        for task in tasks:
            running.add(pool.submit(task))
            while len(running) > _WORKERS:
                done, running = concurrent.futures.wait(
                    running, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for future in done:
                    count(future.result())
        for future in concurrent.futures.as_completed(running):
            count(future.result())
    finally:
        for future in running:
            future.cancel()
        concurrent.futures.wait(running)
