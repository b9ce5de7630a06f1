"""The part that the short examples share: their command line, and the table that they end with."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = (
    "1"  # read when transformers, diffusers or peft is imported: nothing here asks a hub
)

from movie_sentences import JobError
from report import console
from rich.table import Table

PEFT_VERSIONS = {"torch": "torch==2.13.0", "peft": "peft==0.21.2"}


def run_example(run: Callable[[argparse.Namespace], None], doc: str | None, name: str) -> None:
    """Reads --quick, --out and --seed, runs the example with them, and ends the process.

    Args:
        run: the example.
        doc: its module's docstring, which --help shows.
        name: of the folder that its files go to by default.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="the same on a slice, for continuous integration"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out") / name, help="folder for the results"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of weights, factors and the order of the data"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        run(options)
    except JobError as error:
        console.print(f"\n{error}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)


def missing(packages: Mapping[str, str] = PEFT_VERSIONS) -> str:
    """The modules that pip should install of `{module: pip argument}`; empty where all is there."""
    return " ".join(
        argument
        for module, argument in packages.items()
        if importlib.util.find_spec(module) is None
    )


def show_results(
    path: Path, title: str, header: Sequence[str], rows: Sequence[Sequence[object]]
) -> None:
    """Prints a table and writes it as JSON: `{first cell: {header: cell}}`.

    Args:
        path: the JSON file.
        title: of the table.
        header: the names of the columns.
        rows: a text and then numbers; None is a cell without one.
    """
    table = Table(*header, title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(_text, row))
    console.print(table)
    results = {str(first): dict(zip(header[1:], rest, strict=True)) for first, *rest in rows}
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _text(cell: object) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, float):
        return f"{cell:.1e}" if 0 < abs(cell) < 1e-3 else f"{cell:.3f}"
    return str(cell)
