"""Adapted trees in `flax.serialization`: `to_bytes`, `from_bytes` and state dicts.

Flax keeps a table of types. Ours are added to it once `flax.serialization` is imported, before or
after this library. As with Flax' own dataclasses, static fields are not stored: they come from the
target. This module does not import Flax.
"""

from __future__ import annotations

import dataclasses
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, TypeVar

import jax

from loha_jax.tree.factors import Factors
from loha_jax.tree.leaves import AdaptedLeaf, LoHaWeight, SavedWeight
from loha_jax.tree.quantised import QuantisedArray

N = TypeVar("N", LoHaWeight, SavedWeight, Factors, QuantisedArray)

_MODULE = "flax.serialization"


def children_of(node: AdaptedLeaf | Factors | QuantisedArray) -> dict[str, Any]:
    """Return the children of an adapted leaf, or of an adapter, by name."""
    if isinstance(node, QuantisedArray):
        return {str(n): array for n, array in enumerate(jax.tree.leaves(node))}
    flat = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
    return {path[0].name: child for path, child in flat}


def _register(serialization: ModuleType) -> None:
    def to_state(node: AdaptedLeaf | Factors | QuantisedArray) -> dict[str, Any]:
        return {
            name: serialization.to_state_dict(child) for name, child in children_of(node).items()
        }

    def from_state(node: N, state: object) -> N:
        where, children = serialization.current_path(), children_of(node)
        if not isinstance(state, Mapping) or state.keys() != children.keys():
            found = list(state) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(
                f"{where}: a {type(node).__name__} with {list(children)} was given, the state has "
                f"{found}"
            )
        for name, child in children.items():
            _check(f"{where}/{name}", child, state[name])
        new = {
            name: serialization.from_state_dict(child, state[name], name)
            for name, child in children.items()
        }
        if isinstance(node, QuantisedArray):
            return jax.tree.unflatten(jax.tree.structure(node), list(new.values()))
        return dataclasses.replace(node, **new)

    for kind in (LoHaWeight, SavedWeight, Factors, QuantisedArray):
        serialization.register_serialization_state(kind, to_state, from_state, override=True)


def _check(where: str, given: object, held: object) -> None:
    """Raise ValueError if an array of the target, or None, has another shape in the state."""
    if isinstance(given, Mapping):
        if isinstance(held, Mapping) and given.keys() == held.keys():
            for name, child in given.items():
                _check(f"{where}/{name}", child, held[name])
        return  # other differences are Flax' own to report
    apart = isinstance(given, Factors | QuantisedArray)  # their own arrays are checked
    if apart or not (given is None or hasattr(given, "shape")):
        return
    if (ours := _shown(given)) != (theirs := _shown(held)):
        raise ValueError(
            f"{where}: {ours} was given, the state has {theirs}. Give the tree, or the half of "
            "`partition`, that the state was made from."
        )


def _shown(x: object) -> str:
    if x is None:
        return "nothing"
    other = "a dict" if isinstance(x, Mapping) else "a value"
    return f"shape {x.shape}" if hasattr(x, "shape") else other  # type: ignore[attr-defined]


def register() -> None:
    """Add the types to Flax' table, now or as soon as Flax is imported."""
    if _MODULE in sys.modules:
        _register(sys.modules[_MODULE])
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


class _WhenImported(importlib.abc.MetaPathFinder):
    """A finder that runs `_register` after the one import of `flax.serialization`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the module's own spec, whose loader registers the types at the end."""
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)

            spec.loader.exec_module = exec_module  # this import's own loader
        return spec
