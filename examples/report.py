"""The output of the example: a progress bar, learning curves, a table."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws into files: no display is needed

import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

console = Console(highlight=False)

RECENT = 50  # steps that a smoothed loss is the mean of


@dataclasses.dataclass
class History:
    """The course of a training: the loss of each step, `(step, accuracy)` of each validation."""

    losses: list[float] = dataclasses.field(default_factory=list)
    validations: list[tuple[int, float]] = dataclasses.field(default_factory=list)

    @property
    def best(self) -> tuple[int, float]:
        """Step and accuracy of the best validation, the first of equals."""
        return max(self.validations, key=lambda validation: validation[1])


class Stopwatch:
    """Sums up seconds under names."""

    def __init__(self):
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to `seconds[name]`."""
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start


class TrainingBar:
    """A progress bar with the loss; see `training_bar`."""

    def __init__(self, progress: Progress, steps: int):
        self._progress = progress
        self._task = progress.add_task("training", total=steps, loss="")

    def advance(self, loss: float) -> None:
        """One step is done."""
        self._progress.update(self._task, advance=1, loss=f"loss {loss:.3f}")


@contextlib.contextmanager
def training_bar(steps: int) -> Iterator[TrainingBar]:
    """Shows a progress bar for so many steps."""
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        yield TrainingBar(progress, steps)


def peak_memory() -> float | None:
    """The most memory this process has used so far, in MiB; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes, Linux KiB


def plot_curves(history: History, probe_accuracy: float, path: Path) -> None:
    """Draws loss and validation accuracy over the steps into a PNG."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    steps = np.arange(1, len(history.losses) + 1)
    window = max(1, min(RECENT, len(steps) // 8))
    left.plot(steps, history.losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="each step")
    smooth = np.convolve(history.losses, np.full(window, 1 / window), mode="valid")
    left.plot(steps[window - 1 :], smooth, color="tab:blue", label=f"mean of {window} steps")
    left.set(title="Training loss", xlabel="step", ylabel="cross-entropy", ylim=(0, None))
    left.legend()
    right.plot(
        *zip(*history.validations, strict=True), marker="o", color="tab:orange", label="LoHa"
    )
    right.plot(
        *history.best, marker="*", markersize=16, color="tab:red", linestyle="none", label="kept"
    )
    right.axhline(probe_accuracy, color="gray", linestyle="--", label="probe on the frozen encoder")
    right.set(title="Validation accuracy", xlabel="step", ylabel="accuracy", xlim=(0, None))
    right.legend()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of one way of training, and what it took."""

    right: np.ndarray  # for each test sentence, whether its label was found
    parameters: int
    compile_seconds: float
    train_seconds: float
    peak_memory: float | None  # of the process, up to the end of this training, in MiB

    @property
    def accuracy(self) -> float:
        """The share of test sentences whose label was found."""
        return float(self.right.mean())


def paired_difference(before: Outcome, after: Outcome) -> tuple[float, float]:
    """How much more accurate `after` is on the same sentences, and the standard error of that."""
    gain = after.right.astype(float) - before.right.astype(
        float
    )  # sentence by sentence: 1, 0 or -1
    return float(gain.mean()), float(gain.std(ddof=1) / len(gain) ** 0.5)


def show_comparison(probe: Outcome, loha: Outcome) -> None:
    """Prints the table of the two."""
    difference, error = paired_difference(probe, loha)
    table = Table(
        "", "probe", "LoHa", title=f"{len(loha.right):,} test sentences", title_justify="left"
    )

    def row(name: str, cell: Callable[[Outcome], str]) -> None:
        table.add_row(name, cell(probe), cell(loha))

    row("test accuracy", lambda outcome: f"{outcome.accuracy:.4f}")
    table.add_row("difference ± standard error (paired)", "", f"{difference:+.4f} ± {error:.4f}")
    row("parameters trained", lambda outcome: f"{outcome.parameters:,}")
    row("seconds to compile", lambda outcome: f"{outcome.compile_seconds:.1f}")
    row("seconds to train", lambda outcome: f"{outcome.train_seconds:.1f}")
    row(
        "peak memory so far, MiB",
        lambda outcome: f"{outcome.peak_memory:,.0f}" if outcome.peak_memory else "unknown",
    )
    console.print(table)


def write_results(path: Path, probe: Outcome, loha: Outcome, **more: object) -> None:
    """Writes the figures of the table, and `more`, as JSON."""

    def plain(outcome: Outcome) -> dict[str, object]:
        fields = {name: value for name, value in vars(outcome).items() if name != "right"}
        return {"test_accuracy": outcome.accuracy, **fields}

    difference, error = paired_difference(probe, loha)
    results = {
        "probe": plain(probe),
        "loha": plain(loha),
        "difference": difference,
        "standard_error": error,
        "test_sentences": len(loha.right),
        **more,
    }
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
