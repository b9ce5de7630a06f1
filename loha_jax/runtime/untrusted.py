"""Reading of untrusted files, JSON and regular expressions in bounded time and memory.

Adapters are passed from hand to hand. Each fault in one is a `FileError` that names the file.
"""

from __future__ import annotations

import functools
import json
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import regex

MAX_JSON_BYTES = 32 << 20
"""The index of a checkpoint with 100,000 tensors has about 10 MB."""

_MAX_JSON_DEPTH = 64
_MAX_PATTERN = 10_000
_SECONDS_PER_MATCH = 1.0


class FileError(ValueError):
    """A file is broken, hostile, or not of the kind that it should be.

    The message names the file and says what is wrong.

    Example:
        >>> import tempfile, loha_jax
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "adapter.safetensors").write_bytes(b"nothing")
        ...     try:
        ...         loha_jax.interop.load_lycoris(f"{folder}/adapter.safetensors", {})
        ...     except loha_jax.interop.FileError as error:
        ...         "is not a readable safetensors file" in str(error)
        True
    """


def check_regular(path: str | Path) -> int:
    """Return the size of a file in bytes; symbolic links are followed.

    Raises:
        FileNotFoundError: it is not there.
        FileError: it is a folder, a pipe, a device: reading it could fail oddly, or never end.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # links in a circle, a name with a null byte
        raise FileError(f"{path} cannot be read: {error}") from error
    if not stat.S_ISREG(found.st_mode):
        kinds = (("a folder", stat.S_ISDIR), ("a pipe", stat.S_ISFIFO), ("a device", stat.S_ISCHR))
        kind = next((name for name, test in kinds if test(found.st_mode)), "something else")
        raise FileError(f"{path} should be a file and is {kind}")
    return found.st_size


def read_text(path: str | Path, limit: int = MAX_JSON_BYTES) -> str:
    """Read the text of a UTF-8 file of at most `limit` bytes.

    Raises:
        FileNotFoundError: it is not there.
        FileError: it is no regular file, too large, or not UTF-8.
    """
    if (size := check_regular(path)) > limit:
        raise FileError(f"{path} has {size:,} bytes; a file of its kind has no more than {limit:,}")
    try:
        with open(path, "rb") as file:
            return file.read(limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is not UTF-8 text: {error}") from None


def parse_json(text: str | bytes, origin: str | Path) -> Any:
    """Return the value of a JSON text.

    Args:
        text: of bounded length.
        origin: where it comes from, for messages.

    Raises:
        FileError: it is not JSON, or is nested more than 64 deep.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise FileError(f"{origin}: JSON nested too deep") from None
    except ValueError as error:  # also numbers of thousands of digits, and bytes that are no text
        raise FileError(f"{origin} is not JSON: {error}") from None
    level = [value]
    for _ in range(_MAX_JSON_DEPTH):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return value
    raise FileError(f"{origin}: JSON nested more than {_MAX_JSON_DEPTH} deep")


def _children(value: Any) -> Iterable[Any]:
    """Return the values inside a JSON value."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def json_object(text: str | bytes, origin: str | Path) -> dict[str, Any]:
    """Return the JSON object of a text; FileError as in `parse_json`, or if it is no object."""
    value = parse_json(text, origin)
    if not isinstance(value, dict):
        raise FileError(f"{origin} should hold a JSON object and holds a {type(value).__name__}")
    return value


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a file's JSON object; errors as in `read_text` and `json_object`."""
    return json_object(read_text(path), path)


def check_pattern(pattern: str) -> None:
    """Raise ValueError for a string that is no regular expression."""
    if len(pattern) > _MAX_PATTERN:
        raise ValueError(f"it has {len(pattern):,} characters, more than {_MAX_PATTERN:,}")
    try:
        re.compile(pattern)  # PEFT's engine
        _compiled(pattern)
    except (re.error, regex.error, OverflowError) as error:
        raise ValueError(str(error)) from None
    except (RecursionError, MemoryError):
        raise ValueError("it is nested too deep") from None


@functools.lru_cache(maxsize=1 << 14)
def _compiled(pattern: str) -> Any:
    return regex.compile(pattern, regex.VERSION0)


def match(pattern: str, name: str) -> Any:
    """Call `re.match` with a time limit: ValueError after more than a second."""
    return _timed("match", pattern, name)


def fullmatch(pattern: str, name: str) -> Any:
    """Call `re.fullmatch` with a time limit: ValueError after more than a second."""
    return _timed("fullmatch", pattern, name)


def _timed(method: str, pattern: str, name: str) -> Any:
    try:
        return getattr(_compiled(pattern), method)(name, timeout=_SECONDS_PER_MATCH)
    except TimeoutError:
        shown = pattern if len(pattern) <= 200 else f"{pattern[:200]}…"
        raise ValueError(
            f"Matching {shown!r} against {name!r} takes more than a second: the pattern repeats "
            "what is repeated already. Write it without nested repetition."
        ) from None
