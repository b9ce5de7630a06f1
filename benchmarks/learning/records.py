"""The file of records: one line of JSON for each run, appended when the run ends."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.learning.task import Run

Records = dict[Run, dict[str, Any]]


def read(path: Path) -> Records:
    """Return all records; of equal runs the first. A missing file has none.

    Raises:
        ValueError: a line is no record.
    """
    found: Records = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            run = Run(*(record.pop(field) for field in Run._fields))
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{path}, line {number} is no record of a run ({error!r}). Delete the line: its "
                "run is done again."
            ) from error
        found.setdefault(run, record)
    return found


def append(path: Path, run: Run, outcome: Mapping[str, Any]) -> None:
    """Add a record with one write: a process that is interrupted leaves whole lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = measure.machine()
    where = {
        "machine": f"{about['cpu']}, {about['cores']} CPU(s)",
        "versions": {"python": about["python"]}
        | {name: about["packages"][name] for name in ("jax", "flax", "loha-jax")},
    }
    line = json.dumps({**run._asdict(), **outcome, **where})
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, (line + "\n").encode())
        os.fsync(file)
    finally:
        os.close(file)
