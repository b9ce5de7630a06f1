"""`ShardWriter`: one file of a merged checkpoint, written block by block by a few threads."""

from __future__ import annotations

import concurrent.futures
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from pathlib import Path

import numpy as np

from ..disk.base_checkpoint import is_floating
from ..disk.system import copy_range, sync_folder, write_at
from ..updates.rounding import Losses
from .base_rows import BaseRows, ScaledRows, Span
from .merged_rows import MergedRows, overflows
from .target import MergeTarget

_BLOCK = 4 << 20
"""Bytes of a block of rows; a handful are in memory at a time."""

_WORKERS = 3
"""Threads that read, add and write blocks, so that none of the three waits for another."""


class ShardWriter:
    """One weight file of the base and the merged file made from it.

    Args:
        target: the checkpoint to write.
        file: of the base.
        count: called with the size of each block that is written.
        losses: get what rounding loses.
    """

    def __init__(
        self, target: MergeTarget, file: Path, count: Callable[[int], None], losses: Losses
    ):
        self._target, self._plan, self._base = target, target.plan, target.base
        self._file, self._count, self._losses = file, count, losses
        self._header = target.headers[file.name]
        self._scaled: dict[str, tuple[ScaledRows, MergedRows]] = {}
        self._writing = threading.Lock()

    def write(self, path: Path, finish: Callable[[], None]) -> None:
        """Write a temporary file in the same folder, flush it, call `finish`, then rename it."""
        part = path.with_name(f".{path.name}.part")
        try:
            with open(self._file, "rb") as source, open(part, "wb", buffering=0) as result:
                self._source, self._result = source.fileno(), result.fileno()
                result.truncate(self._header.file_size)
                self._write(0, np.frombuffer(self._header.data, np.uint8))
                self._count(len(self._header.data))
                with concurrent.futures.ThreadPoolExecutor(_WORKERS) as pool:
                    _run_all(pool, self._tasks(pool), self._count)
                os.fsync(self._result)
            finish()
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)

    def _tasks(self, pool: Executor) -> Iterator[Callable[[], int]]:
        """Yield calls that each write some bytes and return their number, in the base's order."""
        changed, quantisation = self._plan.keys, self._base.quantisation
        places = self._base.header(self._file).places
        for key, (start, end) in sorted(places.items(), key=lambda item: item[1]):
            weight = quantisation.weights.get(key)
            if key in changed and key in quantisation.scales:
                yield from self._scaled_tasks(pool, key)
            elif weight in changed:
                scale = self._scaled_rows(pool, weight)[0].new_scale
                yield lambda key=key, scale=scale: self._write_tensor(key, 0, scale)
            elif key in changed or self._base.dtypes[key] != self._target.dtype_of(key):
                yield from self._tensor_tasks(pool, key)
            else:
                place = self._header.places[key][0]
                for offset in range(0, end - start, 8 * _BLOCK):
                    size = min(8 * _BLOCK, end - start - offset)
                    yield lambda a=start + offset, b=place + offset, n=size: self._copy(a, b, n)

    def _scaled_rows(self, pool: Executor, key: str) -> tuple[ScaledRows, MergedRows]:
        """Return a scaled tensor that is merged, with its new scale, and its merged rows."""
        if key not in self._scaled:
            base = ScaledRows(self._base, key, self._plan.replaced.get(key))
            merged = MergedRows(self._plan, key, base, np.dtype(np.float32), _BLOCK, pool)
            base.fit(lambda span: merged.rows(*span)[0], merged.spans, pool)
            self._scaled[key] = base, merged
        return self._scaled[key]

    def _scaled_tasks(self, pool: Executor, key: str) -> Iterator[Callable[[], int]]:
        """Yield the tasks of a float8 tensor whose scale is a tensor of its own."""
        base, merged = self._scaled_rows(pool, key)

        def write(span: Span) -> int:
            wanted, _ = merged.rows(*span)
            result, values = base.quantised(wanted, *span)
            parts = (values - wanted, wanted - base.rows(*span), wanted)
            self._losses.add(key, base.stored, True, [np.vdot(x, x) for x in parts])
            return self._write_tensor(key, span[0], result)

        for span in merged.spans:
            yield lambda span=span: write(span)

    def _tensor_tasks(self, pool: Executor, key: str) -> Iterator[Callable[[], int]]:
        """Yield the tasks of any other tensor that changes."""
        own, value = self._base.dtypes[key], self._plan.replaced.get(key)
        if value is not None and not is_floating(own):  # a counter
            yield lambda: self._write_tensor(key, 0, value.astype(own))
            return
        is_updated = key in self._plan.updates
        if value is not None and is_updated:
            # PEFT puts it into the model, in its dtype, and adds to that.
            value = _rounded(key, value, own)
        dtype = self._target.dtype_of(key)
        base = BaseRows(self._base, key, value)
        merged = MergedRows(self._plan, key, base, dtype, _BLOCK, pool)
        measure = is_updated and dtype.itemsize < 4

        def write(span: Span) -> int:
            result, sums = merged.rows(*span, measure)
            if measure:
                self._losses.add(key, dtype, False, sums)
            return self._write_tensor(key, span[0], result)

        for span in merged.spans:
            yield lambda span=span: write(span)

    def _write_tensor(self, key: str, first: int, rows: np.ndarray) -> int:
        """Write a tensor from its row `first` on; return the number of bytes."""
        row = rows.nbytes // len(rows) if first else 0
        data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
        self._write(self._header.places[key][0] + first * row, data)
        return data.nbytes

    def _write(self, place: int, data: np.ndarray) -> None:
        # Threads that wait for a file's lock in the kernel use up the processor.
        with self._writing:
            write_at(self._result, place, data)

    def _copy(self, start: int, place: int, size: int) -> int:
        with self._writing:
            copy_range(self._source, start, self._result, place, size)
        return size


def _rounded(key: str, value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        result = value.astype(dtype)
    if overflows(value, result):
        raise ValueError(f"{key} has values that {dtype.name}, the base's dtype, cannot hold")
    return result


def _run_all(
    pool: Executor, tasks: Iterator[Callable[[], int]], count: Callable[[int], None]
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
