"""The tables and the plots of all records that are there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.learning import plan, records
from benchmarks.learning.methods import METHODS
from benchmarks.learning.plots import plot
from benchmarks.learning.records import Records
from benchmarks.learning.task import Facts
from benchmarks.learning.tasks import TASKS
from benchmarks.learning.training import WINDOW
from benchmarks.report import table

REFERENCE = "lora"


class Estimate(NamedTuple):
    """A mean and its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Return the estimate from these values; the error of one value is NaN."""
        error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else math.nan
        return cls(float(np.mean(values)), float(error))

    def text(self, sign: bool = False) -> str:
        """Return the mean and the error to four decimals."""
        return f"{self.mean:{'+' if sign else ''}.4f} ± {self.error:.4f}"


def write_report(folder: Path) -> str:
    """Write tables.md and one plot for each task into the folder; return the tables."""
    parts = [
        "# Tables",
        "`python -m benchmarks.learning report` writes this file from the records beside it. "
        "[README.md](../README.md) says what they mean.",
    ]
    for name, facts in TASKS.items():
        done = records.read(folder / f"{name}.jsonl")
        if done:
            tested = {run.r for run in done if run.stage == "test"}
            for r in sorted({facts.r, *tested}):
                parts += task_report(name, facts._replace(r=r), done)
            parts += rank_report(name, facts, done)
            plot(name, facts, done, folder / f"{name}.svg")
            parts.append(f"![{name}: scores over learning rates and ranks]({name}.svg)")
            parts.append(about(done))
    text = "\n\n".join(parts) + "\n"
    (folder / "tables.md").write_text(text, encoding="utf-8")
    return text


def task_report(name: str, facts: Facts, done: Records) -> list[str]:
    """Return the paragraphs of one task at one rank: the test, and the choice of the rate."""
    parts = [f"## {name}, r = {facts.r}"]
    better = "higher" if facts.higher_is_better else "lower"
    if rows := list(test_rows(name, facts, done)):
        parts += [
            f"Test {facts.score} ({better} is better) at the rate that the validation chose; "
            f"LoRA and HiRA have rank {2 * facts.r}. Mean ± standard error over seeds; "
            "differences to LoRA are paired by seed. With *: not all runs of the choice are done.",
            table(rows),
        ]
    if rows := choice_rows(name, facts, done):
        parts += [
            f"Validation {facts.score} by learning rate, mean of {facts.choice_seeds} seeds. In "
            "bold: the chosen rate.",
            table(rows),
        ]
    return parts


def rank_report(name: str, facts: Facts, done: Records) -> list[str]:
    """Return the paragraphs of one task over ranks."""
    rows = rank_rows(name, facts, done)
    if not rows:
        return []
    return [
        f"## {name}, ranks",
        f"Validation {facts.score} by r at the learning rate {facts.shared_rate:g} for all, "
        f"mean of {facts.choice_seeds} seeds.",
        table(rows),
    ]


def test_rows(name: str, facts: Facts, done: Records) -> Iterable[dict[str, str]]:
    """Yield one row for each method whose rate is chosen and whose test was read."""
    reference = test_records(name, facts, REFERENCE, done)
    for method in METHODS:
        found = test_records(name, facts, method, done)
        if not found:
            continue
        both = sorted(found.keys() & reference.keys())
        difference = Estimate.of([found[s]["score"] - reference[s]["score"] for s in both] or [0])
        first = next(iter(found.values()))
        rate = plan.best_rate(facts, plan.validation(facts, name, method, done))
        open_end = "" if plan.is_settled(facts, name, method, done) else " *"
        yield {
            "method": method,
            "trained": f"{first['parameters']:,}",
            "rate": f"{rate:.2g}{open_end}",
            f"test {facts.score}": Estimate.of([r["score"] for r in found.values()]).text(),
            "− LoRA": "" if method == REFERENCE or not both else difference.text(sign=True),
            "seeds": str(len(found)),
            f"steps to loss {facts.goal:g}": steps_to_goal(facts, found.values()),
            "CPU s": f"{np.median([r['cpu_seconds'] for r in found.values()]):.1f}",
            "wall s": f"{np.median([r['seconds'] for r in found.values()]):.1f}",
        }


def test_records(name: str, facts: Facts, method: str, done: Records) -> dict[int, dict[str, Any]]:
    """Return the test records of a method at its chosen rate, by seed."""
    scores = plan.validation(facts, name, method, done)
    rate = plan.best_rate(facts, scores) if scores else None
    found = {
        run.seed: record
        for run, record in done.items()
        if run[:5] == (name, "test", method, facts.r, rate)
    }
    return dict(sorted(found.items()))


def steps_to_goal(facts: Facts, found: Iterable[dict[str, Any]]) -> str:
    """Return the mean step at which the loss curve first reaches the goal."""
    curves = [record["losses"] for record in found]
    reached = [
        next(
            (
                (n + 1) * WINDOW
                for n, loss in enumerate(c)
                if loss is not None and loss <= facts.goal
            ),
            None,
        )
        for c in curves
    ]
    steps = [step for step in reached if step is not None]
    if not steps:
        return "never"
    few = "" if len(steps) == len(reached) else f" ({len(steps)} of {len(reached)})"
    return f"{np.mean(steps):.0f}{few}"


def choice_rows(name: str, facts: Facts, done: Records) -> list[dict[str, str]]:
    """Return one row for each method and one column for each rate that any method ran with."""
    scores = {m: s for m in METHODS if (s := plan.validation(facts, name, m, done))}
    rates = sorted({rate for found in scores.values() for rate in found})
    rows = []
    for method, found in scores.items():
        best = plan.best_rate(facts, found)
        cells = {f"{rate:.2g}": _cell(found.get(rate), rate == best) for rate in rates}
        rows.append({"method": method, **cells})
    return rows


def rank_rows(name: str, facts: Facts, done: Records) -> list[dict[str, str]]:
    """Return one row for each method and one column for each rank."""
    rows = []
    for method in plan.RANKED:
        means = plan.rank_scores(facts, name, method, done)
        if len(means) > 1:
            cells = {f"r={r}": _cell(means.get(r), False) for r in facts.ranks}
            rows.append({"method": method, **cells})
    return rows


def about(done: Records) -> str:
    """Return the machines and the versions of the records."""

    def distinct(text: Callable[[dict[str, Any]], str]) -> str:
        return "; ".join(sorted({text(record) for record in done.values()}))

    machines = distinct(lambda record: record["machine"])
    versions = distinct(lambda r: ", ".join(f"{n} {v}" for n, v in r["versions"].items()))
    return f"{len(done)} runs on {machines}; {versions}."


def _cell(score: float | None, bold: bool) -> str:
    if score is None:
        return ""
    text = f"{score:.4f}" if math.isfinite(score) else "diverged"
    return f"**{text}**" if bold else text
