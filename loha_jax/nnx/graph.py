"""The parts of an NNX graph: modules, what they hold, and variables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeGuard

import jax
from flax import nnx
from flax.typing import Key
from flax.typing import PathParts as Path
from jaxtyping import PyTree

from loha_jax.runtime._compat import attributes
from loha_jax.tree.quantised_types import quantised_type


def is_node(x: object) -> TypeGuard[nnx.Pytree | nnx.Variable]:
    """Return whether x is a part of an NNX graph."""
    return isinstance(x, nnx.Pytree | nnx.Variable)


def is_variable(x: object) -> TypeGuard[nnx.Variable]:
    """Return whether x is a variable (for `is_leaf=`)."""
    return isinstance(x, nnx.Variable)


def is_packed(x: object) -> bool:
    """Return whether x is a quantised kernel as qwix holds it: a tree of variables."""
    return (
        not is_variable(x)
        and quantised_type(x) is not None
        and any(map(is_variable, jax.tree.leaves(x, is_leaf=is_variable)))
    )


def slots(node: object) -> list[tuple[Key, object]]:
    """Return the attributes, entries or elements of a node of a graph, by key."""
    if isinstance(node, nnx.List):
        return list(enumerate(node))
    if isinstance(node, nnx.Pytree):
        return list(attributes(node).items())
    if isinstance(node, nnx.Variable):
        return []
    inside, _ = jax.tree.flatten_with_path(node, is_leaf=lambda x: x is not node)
    return [(_key(path[0]), value) for path, value in inside if path]


def _key(entry: object) -> Key:
    """Return the key of an entry of a JAX path, as `nnx.iter_graph` gives it."""
    return next(getattr(entry, name) for name in ("key", "idx", "name") if hasattr(entry, name))


def is_owner(node: object) -> TypeGuard[nnx.Pytree]:
    """Return whether a node has attributes: a module, or any `nnx.Pytree` but a list."""
    return isinstance(node, nnx.Pytree) and not isinstance(node, nnx.List)


def held_variables(owner: nnx.Pytree) -> Iterator[tuple[Path, PyTree[nnx.Variable]]]:
    """Yield the variables of a module, itself or in lists and dicts, with the way to each.

    The variables of a quantised kernel are one tree.
    """

    def inside(path: Path, node: object) -> Iterator[tuple[Path, PyTree[nnx.Variable]]]:
        for key, value in slots(node):
            if is_variable(value) or is_packed(value):
                yield (*path, key), value
            elif not is_owner(value):
                yield from inside((*path, key), value)

    return inside((), owner)


def steps(node: object, path: Path) -> Iterator[tuple[object, Key]]:
    """Yield the nodes on a path from a node, each with the key that leads on."""
    for key in path:
        yield node, key
        node = dict(slots(node))[key]


def follow(node: object, path: Path) -> object:
    """Return what is found on a path from a node."""
    for key in path:
        node = dict(slots(node))[key]
    return node


def replace(owner: nnx.Pytree, path: Path, value: object) -> None:
    """Put something else where a path from a module leads to."""
    holder: Any = follow(owner, path[:-1])
    if is_owner(holder):
        setattr(holder, str(path[-1]), value)
    else:
        holder[path[-1]] = value
