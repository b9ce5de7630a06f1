"""Adapted trees in `flax.serialization`: `to_bytes`, `from_bytes`, `to_state_dict`, `from_state_dict`.

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
from typing import Any

import jax

from loha_jax.tree.factors import Factors
from loha_jax.tree.leaves import LoHaWeight, SavedWeight
from loha_jax.tree.quantised import QuantisedArray

_MODULE = "flax.serialization"


def children_of(node: Any) -> dict[str, Any]:
    """Return the children of an adapted leaf, or of an adapter, by name."""
    if isinstance(node, LoHaWeight):
        return {"kernel": node.kernel, "adapters": node.adapters}
    if isinstance(node, QuantisedArray):
        return {str(n): array for n, array in enumerate(jax.tree.leaves(node))}
    if isinstance(node, SavedWeight):
        return {"original": node.original, "copies": node.copies}
    return {name: getattr(node, name) for name in node.parts}


def _register(serialization: ModuleType) -> None:
    def to_state(node: Any) -> dict[str, Any]:
        return {
            name: serialization.to_state_dict(child) for name, child in children_of(node).items()
        }

    def from_state(node: Any, state: Any) -> Any:
        where, children = serialization.current_path(), children_of(node)
        if not isinstance(state, Mapping) or state.keys() != children.keys():
            found = list(state) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(
                f"{where}: a {type(node).__name__} with {list(children)} was given, the state has {found}"
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


def _check(where: str, given: Any, held: Any) -> None:
    """Raise ValueError if an array of the target, or None, has another shape in the state."""
    if isinstance(given, Mapping):
        if isinstance(held, Mapping) and given.keys() == held.keys():
            for name, child in given.items():
                _check(f"{where}/{name}", child, held[name])
        return  # other differences are Flax' own to report
    ours, theirs = (
        None
        if x is None
        else getattr(x, "shape", "a value" if not isinstance(x, Mapping) else "a dict")
        for x in (given, held)
    )
    if isinstance(given, Factors | QuantisedArray) or not (
        given is None or isinstance(ours, tuple)
    ):
        return
    if ours != theirs:
        shown = [
            ("nothing" if x is None else f"shape {x}" if isinstance(x, tuple) else x)
            for x in (ours, theirs)
        ]
        raise ValueError(
            f"{where}: {shown[0]} was given, the state has {shown[1]}. Give the tree, or the half of `partition`, that "
            "the state was made from."
        )


def register() -> None:
    """Add the types to Flax' table, now or as soon as Flax is imported."""
    if _MODULE in sys.modules:
        _register(sys.modules[_MODULE])
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


class _WhenImported(importlib.abc.MetaPathFinder):
    """A finder that runs `_register` after the one import of `flax.serialization`."""

    _is_looking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the module's own spec, with a loader that registers the types at the end."""
        if fullname != _MODULE or self._is_looking:
            return None
        self._is_looking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._is_looking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(importlib.abc.Loader):
    def __init__(self, loader: Any):
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Create the module with its own loader."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, then add the types to its table."""
        self._loader.exec_module(module)
        _register(module)
        sys.meta_path[:] = [
            finder for finder in sys.meta_path if not isinstance(finder, _WhenImported)
        ]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
