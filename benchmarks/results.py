"""The results' file: machine, options, one record per line; written anew after each record."""

import json
import os
from pathlib import Path
from typing import Any


def write(
    path: Path, machine: dict[str, Any], settings: dict[str, Any], records: list[dict[str, Any]]
) -> None:
    """Writes the file under another name and renames it: an interrupted run leaves all of it."""
    head = json.dumps({"machine": machine, "settings": settings}, indent=1)[:-2]
    lines = ",\n".join(f"  {json.dumps(record, ensure_ascii=False)}" for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(f'{head},\n "records": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    os.replace(temporary, path)


def read(path: Path) -> dict[str, Any]:
    """The file's "machine", "settings" and "records"."""
    return json.loads(path.read_text(encoding="utf-8"))
