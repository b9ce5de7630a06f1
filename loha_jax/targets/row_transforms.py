"""Which modules of a tree have other rows in torch, as a `NameMap` says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from loha_jax.lowrank.row_transform import RowTransform
from loha_jax.targets.module_names import Names

Rows = Mapping[str, RowTransform]
"""`{regex: transform}`, fullmatched against the default name of a module."""


@runtime_checkable
class NamesWithRows(Protocol):
    """A function of the default name that also knows transforms, such as `interop.NameMap`.

    Attributes:
        rows: see `Rows`.
    """

    rows: Rows

    def __call__(self, name: str, /) -> object:
        """Return the torch module name, or one name per stack index."""
        ...


def checked_rows(rows: Rows | None) -> dict[str, RowTransform]:
    """Return transforms by pattern; TypeError for another value."""
    for pattern, value in (rows or {}).items():
        if not isinstance(value, RowTransform):
            raise TypeError(f"rows[{pattern!r}] is a RowTransform, got {value!r}")
    return dict(rows or {})


def row_transform(name: str, names: Names | None) -> RowTransform | None:
    """Return the transform of a module by its default name; None where `names` has none."""
    if not isinstance(names, NamesWithRows):
        return None
    return next((own for p, own in names.rows.items() if re.fullmatch(p, name)), None)
