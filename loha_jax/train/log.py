"""The metrics, the seconds and the progress bar of a run."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LAG = 2
"""Steps after which the metrics of a step are read, so that the device never waits."""


class Log:
    """The metrics of a run, read some steps after they were computed."""

    def __init__(
        self,
        advance: Callable[[int, float], None],
        every: int,
        on_metrics: Callable[[int, dict[str, float]], object] | None,
    ):
        self.history: list[dict[str, float]] = []
        self.failure: tuple[int, dict[str, float]] | None = None  # last good step, next metrics
        self._advance, self._every, self._on_metrics = advance, every, on_metrics
        self._unread: deque[tuple[int, Any]] = deque()
        self._window: list[dict[str, float]] = []

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Add the metrics of a step that has just started."""
        self._unread.append((step, metrics))
        if len(self._unread) > LAG:
            self._read()

    def read_all(self) -> None:
        """Wait for all steps, and read their metrics."""
        while self._unread:
            self._read()

    def _read(self) -> None:
        step, metrics = self._unread.popleft()
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not values.pop("good"):
            self.failure = self.failure or (step - 1, values)
            return
        self._window.append(values)
        self._advance(step, values["loss"])
        if step % self._every == 0:
            self.end(step)

    def end(self, step: int) -> None:
        """Record the mean of the metrics that are not recorded yet."""
        if self._window:
            self.record(
                step,
                {name: float(np.mean([v[name] for v in self._window])) for name in self._window[0]},
            )
            self._window.clear()

    def metrics_of(self, step: int) -> dict[str, float]:
        """Return the metrics recorded for a step."""
        rows = [row for row in self.history[-2:] if row["step"] == step]
        return {name: value for row in rows for name, value in row.items() if name != "step"}

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Add an entry to the history."""
        self.history.append({"step": step, **metrics})
        if self._on_metrics is not None:
            self._on_metrics(step, metrics)


class Clock:
    """The seconds spent, by activity."""

    def __init__(self):
        self._start = time.perf_counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Count the time inside the block."""
        start = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """Return the seconds so far by activity; "train" is the time that no block counts."""
        other = {name: self._seconds[name] for name in ("compile", "evaluate", "save")}
        return {"train": time.perf_counter() - self._start - sum(other.values()), **other}


@contextlib.contextmanager
def progress_bar(
    wanted: bool, start: int, steps: int | None
) -> Iterator[Callable[[int, float], None]]:
    """Show a progress bar in a terminal or notebook; the yielded `(step, loss)` updates it."""
    console = Console()
    columns = (
        TextColumn("  training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    seen = wanted and (console.is_terminal or console.is_jupyter) and jax.process_index() == 0
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not seen) as bar:
        task = bar.add_task("training", total=steps, completed=start, loss="")
        yield lambda step, loss: bar.update(task, completed=step, loss=f"loss {loss:.3f}")
