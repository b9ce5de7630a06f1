"""The plot of a task: its score over learning rates, and over ranks."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws into files: no display is needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.learning import plan
from benchmarks.learning.methods import METHODS
from benchmarks.learning.records import Records
from benchmarks.learning.task import Facts

COLOURS = dict(zip(METHODS, plt.get_cmap("tab20").colors, strict=False))  # type: ignore[attr-defined]  # of a listed map


def plot(name: str, facts: Facts, done: Records, path: Path) -> None:
    """Draw the validation scores of all methods into an SVG file."""
    plt.rcParams["svg.hashsalt"] = name  # the same records give the same file
    by_rank = {m: plan.rank_scores(facts, name, m, done) for m in plan.RANKED}
    by_rank = {method: scores for method, scores in by_rank.items() if len(scores) > 1}
    by_rate = {m: plan.validation(facts, name, m, done) for m in METHODS}
    columns = 2 if by_rank else 1
    size = 5.5 * columns, 4
    figure, axes = plt.subplots(1, columns, figsize=size, layout="constrained", squeeze=False)
    _lines(axes[0, 0], by_rate, "learning rate")
    axes[0, 0].set(xscale="log", ylabel=f"validation {facts.score}", title=f"{name}, r={facts.r}")
    axes[0, 0].legend(fontsize="small")
    if by_rank:
        _lines(axes[0, 1], by_rank, "r")
        axes[0, 1].set_xscale("log", base=2)
        axes[0, 1].set(title=f"{name}, learning rate {facts.shared_rate:g}")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _lines(axes: Axes, scores: dict[str, dict[float, float]], x: str) -> None:
    for method, found in scores.items():
        if found:
            points = list(found), list(found.values())
            axes.plot(*points, "o-", ms=3, color=COLOURS[method], label=method)
    axes.set_xlabel(x)
    axes.spines[["top", "right"]].set_visible(False)
