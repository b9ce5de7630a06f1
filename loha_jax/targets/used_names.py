"""`check_used`: patterns of `names` that match nothing in a tree."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from loha_jax.runtime.caller import warn_caller
from loha_jax.targets.matching import near_misses
from loha_jax.targets.module_names import Names
from loha_jax.targets.row_transforms import NamesWithRows


def check_used(names: Names | None, modules: Collection[str]) -> None:
    """Check that each pattern of `names` matches a module.

    Patterns of names that match none are a warning: the same ones may be for several trees.

    Args:
        names: as for `inject`.
        modules: default names of the modules of the tree.

    Raises:
        ValueError: a transform of rows matches none of them.
    """
    if isinstance(names, Mapping) and (unused := _unused(names, modules)):
        warn_caller(
            f"names= has {', '.join(map(repr, unused))}, which match no module of the tree. They "
            "are matched with whole default names, dotted paths without the parameter's own name."
            f"{near_misses(unused, sorted(modules))}"
        )
    check_rows_used(names, modules)


def check_rows_used(names: Names | None, modules: Collection[str]) -> None:
    """Check that each transform of rows matches a module.

    Args:
        names, modules: as for `check_used`.

    Raises:
        ValueError: one matches none of them.
    """
    if isinstance(names, NamesWithRows) and (unused := _unused(names.rows, modules)):
        raise ValueError(
            f"The name map has transforms of rows for {', '.join(map(repr, unused))}, which match "
            f"no module of the tree. `rows` takes patterns of default names, dotted paths without "
            f"the parameter's own name.{near_misses(unused, sorted(modules))}"
        )


def _unused(patterns: Iterable[str], modules: Collection[str]) -> list[str]:
    return [p for p in patterns if not any(re.fullmatch(p, name) for name in modules)]
