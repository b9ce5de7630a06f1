"""Compares ways of fine-tuning on real tasks: LoHa with four initial values, LoRA, HiRA, full.

    python -m benchmarks.learning TASK [--r R] [--methods ...] [--seeds N] [--out FILE]
    python -m benchmarks.learning ranks [--task TASK] [--methods ...] [--out FILE]
    python -m benchmarks.learning report

Each run is added to FILE when it ends. The same command again goes on with what is missing.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from benchmarks.learning import plan, records
from benchmarks.learning.methods import METHODS
from benchmarks.learning.report import write_report
from benchmarks.learning.task import Run
from benchmarks.learning.tasks import TASKS
from benchmarks.learning.training import train

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    options = _arguments()
    if options.what == "report":
        print(write_report(RESULTS))
        return 0
    name = options.task if options.what == "ranks" else options.what
    if options.quick:
        return _quick(name, options.methods)
    facts, task = TASKS[name]._replace(**({"r": options.r} if options.r else {})), None
    path = options.out or RESULTS / f"{name}.jsonl"
    while True:
        done = records.read(path)
        if options.what == "ranks":
            missing = plan.ranks(facts, name, options.methods, done)
        else:
            seeds = options.seeds or facts.test_seeds
            missing = plan.comparison(facts, name, options.methods, seeds, done)
        run = next(missing, None)
        if run is None:
            return 0
        task = task or facts.load(False)
        outcome = train(task, run)
        records.append(path, run, outcome)
        _say(run, outcome)


def _quick(name: str, methods: list[str]) -> int:
    """Train each method once on a small slice; nothing is recorded."""
    facts = TASKS[name]
    task = facts.load(True)
    for method in methods:
        rate = 4e-3 * METHODS[method].rates
        run = Run(name, "validation", method, facts.r, rate, 0)
        _say(run, train(task, run))
    return 0


def _say(run: Run, outcome: dict[str, object]) -> None:
    said = f"{run.stage} {outcome['score']}, {outcome['seconds']} s"
    now = time.strftime("%H:%M:%S")
    print(f"{now} {run.task} {run.method} r={run.r} lr={run.rate:g} {run.seed}: {said}", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=[*TASKS, "ranks", "report"], metavar="TASK")
    parser.add_argument("--task", choices=list(TASKS), default="text", help="of `ranks`")
    parser.add_argument("--r", type=_positive, help="rank; by default the task's own")
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD"
    )
    parser.add_argument(
        "--seeds", type=_positive, help="of the test; by default the task's own number"
    )
    parser.add_argument("--out", type=Path, help="by default results/TASK.jsonl")
    parser.add_argument("--quick", action="store_true", help="a slice, to see that it works")
    return parser.parse_args()


def _positive(text: str) -> int:
    """Return a positive integer; argparse names the option of another value."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"should be a positive integer, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
