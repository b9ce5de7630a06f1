"""Draw the figures of the documentation: `python docs/_site/figures.py`.

The numbers are those of docs/notes/speed.md and of benchmarks/learning/results. It needs
matplotlib.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
matplotlib.rcParams |= {"svg.hashsalt": "loha-jax", "font.size": 10, "axes.spines.top": False}
matplotlib.rcParams |= {"axes.spines.right": False, "legend.frameon": False}

BLUE, ORANGE, GREEN = "#3b6fb6", "#d9822b", "#4f9d69"
GREY, BLACK = "#c9ccd1", "#30343b"


def tables(page: Path) -> list[list[list[str]]]:
    """Return the tables of a page in Markdown: rows of cells, without the line of dashes."""
    found = re.findall(r"(?:^\|.*\n)+", page.read_text(encoding="utf-8"), re.MULTILINE)
    rows = ([line[1:-1].split("|") for line in table.splitlines()] for table in found)
    return [
        [[cell.strip() for cell in row] for row in table if not set("".join(row)) <= set("- ")]
        for table in rows
    ]


def idea() -> Figure:
    """Draw W + (w1_a w1_b) ⊙ (w2_a w2_b) · alpha/r, and the same as one thin product."""
    figure = Figure(figsize=(9, 3.1))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 90), ylim=(0, 31))
    axes.axis("off")

    def box(x: float, y: float, width: float, height: float, color: str, text: str) -> None:
        axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="white"))
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)

    def say(x: float, y: float, text: str, size: float = 13) -> None:
        axes.text(x, y, text, ha="center", va="center", fontsize=size)

    def pair(x: float, number: str, color: str) -> None:
        box(x, 17, 3, 11, color, "")
        say(x + 1.5, 29.4, f"w{number}_a", 9)
        box(x + 4, 25, 10, 3, color, f"w{number}_b")

    box(1, 17, 10, 11, GREY, "W\nfrozen")
    say(13, 22.5, "+")
    pair(16, "1", BLUE)
    say(33, 22.5, "⊙")
    pair(36, "2", ORANGE)
    say(57, 22.5, "· alpha/r")
    say(75, 25.5, "r·(in + out) numbers a pair,", 10)
    say(75, 22.5, "as a LoRA of rank 2r;", 10)
    say(75, 19.5, "rank of the update: up to r²", 10)
    box(1, 2, 10, 11, GREY, "W\nfrozen")
    say(13, 7.5, "+")
    box(16, 2, 6, 11, GREEN, "KB")
    box(23, 7, 10, 6, GREEN, "KA")
    say(40, 7.5, "· alpha/r")
    say(68, 10.5, "the same update, exactly: a column of KB and a row of KA", 10)
    say(68, 7.5, "for each pair of columns and rows of the factors, r² in all.", 10)
    say(68, 4.5, "loha-jax computes x·W + (x·KB)·KA and keeps no ΔW.", 10)
    return figure


def targets() -> Figure:
    """Draw which kernels of a Llama get an adapter, by `target_modules`."""
    rows = (
        (("embed_tokens", 12),),
        (("q_proj", 3), ("k_proj", 3), ("v_proj", 3), ("o_proj", 3)),
        (("gate_proj", 4), ("up_proj", 4), ("down_proj", 4)),
        (("lm_head", 12),),
    )
    linear = {name for row in rows[1:3] for name, _ in row}
    panels = {'["q_proj", "v_proj"]': {"q_proj", "v_proj"}, '"all-linear"': linear}
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    for axes, (title, chosen) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        axes.set(xlim=(0, 12), ylim=(len(rows), 0))
        axes.set_title(f"target_modules={title}", fontsize=9)
        axes.axis("off")
        for y, row in enumerate(rows):
            x = 0.0
            for name, width in row:
                color = BLUE if name in chosen else GREY
                axes.add_patch(
                    Rectangle((x, y + 0.1), width - 0.1, 0.75, facecolor=color, edgecolor="white")
                )
                text = "white" if name in chosen else BLACK
                middle = (x + width / 2, y + 0.5)
                axes.text(*middle, name, color=text, ha="center", va="center", fontsize=8)
                x += width
    return figure


def cost() -> Figure:
    """Draw the time of one Linear layer over its frozen layer, by r, width and tokens."""
    head, *rows = tables(ROOT / "docs/notes/speed.md")[1]
    ranks = [int(cell.removeprefix("r=")) for cell in head[1:]]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, row in zip(figure.subplots(1, len(rows), sharey=True), rows, strict=True):
        width, tokens = row[0].split(", ")
        ours, peft = zip(*(re.findall(r"[\d.]+", cell) for cell in row[1:]), strict=True)
        axes.axhline(1, color=GREY)
        axes.plot(ranks, [float(x) for x in peft], ".-", color=ORANGE, label="PEFT LoHa")
        axes.plot(ranks, [float(x) for x in ours], ".-", color=BLUE, label="loha-jax")
        axes.set(xscale="log", ylim=(0, 5.5), xlabel="r", title=f"{width}²\n{tokens} tokens")
        axes.title.set_fontsize(9)
        axes.set_xticks(ranks, [str(r) for r in ranks])
        axes.minorticks_off()
    figure.axes[0].set_ylabel("time over the frozen layer's")
    figure.axes[0].legend(fontsize=8)
    return figure


def memory() -> Figure:
    """Draw the time and the extra memory of a training step of the 6-layer Llama."""
    head, *rows = tables(ROOT / "docs/notes/speed.md")[0]
    columns = [head.index("time, training step"), head.index("extra memory, training")]
    figure = Figure(figsize=(9, 2.4), layout="constrained")
    names = [row[0].removesuffix(" (what auto chooses)") for row in rows]
    for axes, column, label in zip(
        figure.subplots(1, 2),
        columns,
        ("training step, over the frozen model's", "extra memory, MB"),
        strict=True,
    ):
        values = [float(row[column].split()[0]) for row in rows]
        colors = [BLUE, *[GREY] * (len(rows) - 1)]
        axes.bar_label(axes.barh(names, values, color=colors), fontsize=8, padding=2)
        axes.invert_yaxis()
        axes.set(xlabel=label, xlim=(0, max(values) * 1.15))
    figure.axes[1].set_yticks([])
    return figure


def learning() -> Figure:
    """Draw the training losses of the benchmark of learning, each at its own best rate."""
    import numpy as np

    from benchmarks.learning import records
    from benchmarks.learning.report import test_records
    from benchmarks.learning.tasks import TASKS
    from benchmarks.learning.training import WINDOW

    shown = {"lora": BLACK, "loha-calibrated": BLUE, "loha-peft": ORANGE, "loha-abba": GREEN}

    def draw(axes: Axes, name: str) -> None:
        done = records.read(ROOT / f"benchmarks/learning/results/{name}.jsonl")
        for method, color in shown.items():
            found = test_records(name, TASKS[name], method, done).values()
            curve = np.mean([record["losses"] for record in found], axis=0)
            steps = WINDOW * np.arange(1, len(curve) + 1)
            axes.plot(steps, curve, color=color, label=method)
        axes.set(xlabel="step", title=f"{name}, r = {TASKS[name].r}")

    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(TASKS)), TASKS, strict=True):
        draw(axes, name)
    figure.axes[0].set_ylabel("training loss")
    figure.axes[0].legend(fontsize=8)
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "idea": idea,
    "targets": targets,
    "cost": cost,
    "memory": memory,
    "learning": learning,
}


def main(folder: Path) -> None:
    """Write all figures into a folder."""
    for name, draw in FIGURES.items():
        draw().savefig(folder / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main(ROOT / "docs" / "figures")
