"""Dataclasses that keep their own flat form: flattening a tree of them runs no Python code."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, TypeVar

import jax
from jax.tree_util import GetAttrKey

N = TypeVar("N", bound="FlatNode")


class FlatNode:
    """A frozen dataclass that is a pytree node and keeps its children and auxiliary data ready."""

    _children: ClassVar[tuple[Any, ...]]
    _aux: ClassVar[tuple[Any, ...]]

    def __getstate__(self) -> dict[str, Any]:
        """Return only the fields, for `pickle` and `copy`."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


def keep(node: FlatNode, **values: object) -> None:
    """Set attributes of a frozen dataclass."""
    for name, value in values.items():
        object.__setattr__(node, name, value)


def register(
    kind: type[N],
    names: Callable[[N], Sequence[str]],
    unflatten: Callable[[tuple[Any, ...], Iterable[Any]], N],
) -> None:
    """Register a class as a pytree node; `names` gives the attributes of its children."""
    flat = operator.attrgetter("_children", "_aux")

    def with_keys(node: N) -> tuple[Iterable[tuple[Any, Any]], tuple[Any, ...]]:
        children, aux = flat(node)
        return tuple(zip(map(GetAttrKey, names(node)), children, strict=True)), aux

    jax.tree_util.register_pytree_with_keys(kind, with_keys, unflatten, flat)
