"""The file of a checkpoint that describes it, as JSON with a digest of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loha_jax.runtime.untrusted import FileError, json_object

if TYPE_CHECKING:
    from etils.epath import Path as EPath

ITEM, NAME = "description", "description.json"
"""Orbax' name of the item, and the name of the file in the item's folder."""

_FORMAT = 1


def content(step: int, described: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of the file."""
    body = {"format": _FORMAT, "step": step, **described}
    return {"digest": _digest(body), "content": body}


def read(folder: EPath, step: int) -> dict[str, Any]:
    """Return the description in the folder of a checkpoint.

    Raises:
        FileError: the file is corrupted, or of another format or step.
    """
    path = folder / ITEM / NAME
    written = json_object(path.read_text(), str(path))
    body = written.get("content")
    if not isinstance(body, dict) or written.get("digest") != _digest(body):
        raise FileError(f"{path} is not as it was written")
    if body["format"] != _FORMAT:
        raise FileError(f"{path} is of format {body['format']!r}, not {_FORMAT}")
    if body["step"] != step:
        raise FileError(f"{path} is of step {body['step']}")
    return body


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()
