"""Tries the adapters of the catalogue on third-party models and prints a Markdown table.

python -m tests.models [--seed 0] [--width 32] [--layers 2] [case ...]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import diffusers
import transformers

from tests.models.catalogue import CASES
from tests.models.trial import CHECKS, Trial
from tests.models.twins import Size

parser = argparse.ArgumentParser(prog="python -m tests.models", description=__doc__.splitlines()[0])
parser.add_argument("--seed", type=int, default=0, help="of weights, inputs and factors")
parser.add_argument("--width", type=int, default=32, help="of the models")
parser.add_argument("--layers", type=int, default=2, help="of the models")
parser.add_argument(
    "cases", nargs="*", metavar="case", help=f"any of: {', '.join(CASES)} (all by default)"
)


def main() -> int:
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.cases if name not in CASES]:
        parser.error(f"there is no case {', '.join(unknown)}")
    warnings.simplefilter("ignore")
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
    print("| model and adapter |", " | ".join(CHECKS), "| seconds | note |")
    print("|---|", "---|" * len(CHECKS), "---|---|", sep="")
    failures: list[str] = []
    for name in arguments.cases or CASES:
        start, case = time.perf_counter(), CASES[name]
        trial = Trial(case, Size(arguments.seed, arguments.width, arguments.layers))
        cells = []
        for check, run in CHECKS.items():
            try:
                cells.append(run(trial))
            except Exception as error:  # a table shows all that fails
                cells.append("FAILS")
                trace = "".join(traceback.format_exception(error))
                failures.append(f"{name}, {check}: {trace}")
        print(
            "|",
            " | ".join([name, *cells, f"{time.perf_counter() - start:.0f}", case.quirk]),
            "|",
            flush=True,
        )
    for failure in failures:
        print(f"\n{failure}", file=sys.stderr)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
