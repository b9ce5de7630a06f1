"""The arguments and options that the commands share, and how their texts are read."""

from __future__ import annotations

import contextlib
import enum
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer


class Dtype(enum.StrEnum):
    """The dtypes that tensors are written in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document instead of tables.")
]
OnlyOption = Annotated[
    str | None,
    typer.Option(
        metavar="REGEX",
        help="Only modules whose whole name in the adapter's file matches, such as 'lora_unet_.*'.",
    ),
]
NamesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--names",
        metavar="REGEX=TEMPLATE",
        help="Other names for modules, where the base model's have changed since: for those whose "
        "whole name in the adapter's file matches, such as 'enc(.*)=encoder\\1'; may be given "
        "several times.",
    ),
]
FormOption = Annotated[
    str, typer.Option(help="--to lora: peft for a folder; kohya or diffusers for one file.")
]
PrefixOption = Annotated[
    str | None,
    typer.Option(help="Of a file: what keys begin with (lycoris_, lora_unet_, transformer.)."),
]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option(help="Of the floating tensors that are written; their own by default."),
]
ForceOption = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Replace what is there, when the new one is whole; merge: also write float8 without "
        "scales where rounding loses most of the update.",
    ),
]


def check_finite(name: str, value: float) -> float:
    """Return a number; raise ValueError if it is NaN or infinite."""
    if not math.isfinite(value):
        raise ValueError(f"{name} should be a finite number, got {value}")
    return value


def parse_with(text: str) -> tuple[Path, float]:
    """Return the path and the weight of "PATH=0.5", or of a path without weight.

    Example:
        >>> parse_with("adapter=0.5")[1], parse_with("adapter")[1]
        (0.5, 1.0)
    """
    path, separator, weight = text.rpartition("=")
    if separator:
        with contextlib.suppress(ValueError):
            return Path(path), check_finite(f"the weight of --with {path}", float(weight))
    return Path(text), 1.0


def parse_names(given: Sequence[str]) -> dict[str, str] | None:
    """Return `{regex: template}` for texts "REGEX=TEMPLATE"; None if there are none.

    Example:
        >>> parse_names([r"visual\\.(.*)=model.visual.\\1"])
        {'visual\\\\.(.*)': 'model.visual.\\\\1'}
    """
    result: dict[str, str] = {}
    for text in given:
        pattern, separator, template = text.rpartition("=")
        if not separator or not pattern or not template:
            raise ValueError(
                "--names takes REGEX=TEMPLATE, such as 'visual\\.(.*)=model.visual.\\1', got "
                f"{text!r}"
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"--names {pattern!r} is not a regular expression: {error}") from error
        result[pattern] = template
    return result or None
