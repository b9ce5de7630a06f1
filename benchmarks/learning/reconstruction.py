"""How close a LoHa of rank r comes to a given matrix, beside the best LoRA of equal parameters.

    python -m benchmarks.learning.reconstruction [--quick]

The matrices are random ones of 256 x 256, of several kinds, and the changes that full fine-tuning
makes to the kernels of the tasks `image` and `text`. It writes results/reconstruction.json and .svg
and prints the table.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np

from benchmarks import measure
from benchmarks.learning.methods import targets
from benchmarks.learning.task import Run
from benchmarks.learning.tasks import TASKS
from benchmarks.learning.training import run_training
from benchmarks.report import table
from loha_jax import interop  # pyright: ignore[reportAttributeAccessIssue]  # pyright sees loha_jax/ alone

RESULTS = Path(__file__).parent / "results"
SIZE = 256
RANKS = (2, 4, 8, 16, 32)
SEEDS = 3
TUNED = {"image": 2.5e-4, "text": 1.25e-4}
"""The tasks whose full fine-tuning is taken, with its learning rate."""


class Target(NamedTuple):
    """A matrix to approximate."""

    kind: str
    name: str
    matrix: np.ndarray


def random_targets(size: int, seeds: int) -> Iterator[Target]:
    """Yield matrices of each kind."""
    for seed in range(seeds):
        rng = np.random.default_rng(seed)

        def low_rank(rank: int, rng: np.random.Generator = rng) -> np.ndarray:
            return rng.normal(size=(size, rank)) @ rng.normal(size=(rank, size))

        u, v = (np.linalg.qr(rng.normal(size=(size, size)))[0] for _ in range(2))
        falling = np.arange(1, size + 1) ** -0.5
        matrices = {
            "normal entries": rng.normal(size=(size, size)),
            "random signs": rng.choice([-1.0, 1.0], size=(size, size)),
            "5 % of the entries": rng.normal(size=(size, size)) * (rng.random((size, size)) < 0.05),
            "singular values 1/√k": (u * falling) @ v,
            "rank 64": low_rank(64),
            "a LoHa of rank 8": low_rank(8) * low_rank(8),
        }
        for kind, matrix in matrices.items():
            yield Target(kind, str(seed), matrix)


def tuned_targets(quick: bool) -> Iterator[Target]:
    """Yield what full fine-tuning has changed, kernel by kernel."""
    for name, rate in TUNED.items():
        facts = TASKS[name]
        task = facts.load(quick)
        done = run_training(task, Run(name, "validation", "full", facts.r, rate, 0))
        before, after = (targets(tree, task.config) for tree in (done.base, done.model))
        for path, kernel in before.items():
            change = np.asarray(after[path], np.float64) - np.asarray(kernel, np.float64)
            # [*in, out] -> [out, columns]
            matrix = change.reshape(-1, change.shape[-1]).T
            yield Target(f"full fine-tuning, {name}", "/".join(path), matrix)


def measured(target: Target, r: int) -> dict[str, object]:
    """Return one record."""
    start = time.perf_counter()
    fit = interop.fit_loha(target.matrix, r)
    return {
        "kind": target.kind,
        "name": target.name,
        "shape": target.matrix.shape,
        "r": r,
        "size": float(np.linalg.norm(target.matrix)),
        "loha": round(fit.error, 5),
        "lora": round(fit.lora_error, 5),
        "seconds": round(time.perf_counter() - start, 2),
    }


def overall(rows: list[dict[str, object]], method: str) -> float:
    """Return the relative error of several matrices together."""
    sizes = np.array([row["size"] for row in rows], np.float64)
    errors = np.array([row[method] for row in rows], np.float64)
    return float(np.linalg.norm(sizes * errors) / np.linalg.norm(sizes))


def cells(records: list[dict[str, object]]) -> dict[str, dict[int, tuple[float, float]]]:
    """Return the errors of LoHa and of LoRA by kind and rank."""
    found: dict[str, dict[int, tuple[float, float]]] = {}
    for kind in dict.fromkeys(str(row["kind"]) for row in records):
        of_kind = [row for row in records if row["kind"] == kind]
        found[kind] = {}
        for r in sorted({int(str(row["r"])) for row in of_kind}):
            rows = [row for row in of_kind if row["r"] == r]
            found[kind][r] = overall(rows, "loha"), overall(rows, "lora")
    return found


def as_table(records: list[dict[str, object]]) -> str:
    """Return the errors, LoHa's before LoRA's."""
    rows = []
    for kind, by_rank in cells(records).items():
        errors = {f"r={r}": f"{loha:.3f} / {lora:.3f}" for r, (loha, lora) in by_rank.items()}
        rows.append({"matrix": kind, **errors})
    return table(rows)


def plot(records: list[dict[str, object]], path: Path) -> None:
    """Draw LoHa's error over that of LoRA, by rank."""
    plt.rcParams["svg.hashsalt"] = "reconstruction"  # the same records give the same file
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for kind, by_rank in cells(records).items():
        # a LoRA of the matrix' own rank has no error
        ratios = {r: loha / lora for r, (loha, lora) in by_rank.items() if lora > 1e-3}
        axes.plot(list(ratios), list(ratios.values()), "o-", ms=3, label=kind)
    axes.axhline(1, color="black", lw=0.8)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="r", ylabel="error of LoHa / of LoRA", ylim=(0.1, 1.3))
    axes.legend(fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning.reconstruction",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a slice, to see that it works")
    quick = parser.parse_args().quick
    records: list[dict[str, object]] = []
    size, seeds, ranks = (32, 1, (2,)) if quick else (SIZE, SEEDS, RANKS)
    for target in (*random_targets(size, seeds), *tuned_targets(quick)):
        for r in ranks:
            records.append(measured(target, r))
            print(records[-1], file=sys.stderr, flush=True)
    print(as_table(records))
    if not quick:
        about = measure.machine()
        document = {"machine": about["cpu"], "packages": about["packages"], "records": records}
        lines = ",\n".join(json.dumps(record) for record in records)
        text = json.dumps(document | {"records": []})[:-2] + f"\n{lines}\n]}}"
        (RESULTS / "reconstruction.json").write_text(text + "\n", encoding="utf-8")
        plot(records, RESULTS / "reconstruction.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
