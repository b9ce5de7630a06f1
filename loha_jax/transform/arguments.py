"""The arguments of a call as leaves, some of which are traced arrays."""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeGuard, cast

import jax
import numpy as np

IsLeaf = Callable[[object], bool]
KeyPath = tuple[Any, ...]


class TreeDef(Protocol):
    """The structure of a pytree."""

    def unflatten(self, leaves: Iterable[object], /) -> Any:
        """Return a tree of this structure."""
        ...


def flatten(tree: object, is_leaf: IsLeaf | None = None) -> tuple[list[Any], TreeDef]:
    """`jax.tree.flatten`, with the type of its result."""
    return cast("tuple[list[Any], TreeDef]", jax.tree.flatten(tree, is_leaf))


def flatten_with_path(
    tree: object, is_leaf: IsLeaf | None = None
) -> tuple[list[tuple[KeyPath, Any]], TreeDef]:
    """`jax.tree_util.tree_flatten_with_path`, with the type of its result."""
    return cast(
        "tuple[list[tuple[KeyPath, Any]], TreeDef]",
        jax.tree_util.tree_flatten_with_path(tree, is_leaf),
    )


def is_array(leaf: object) -> TypeGuard[jax.Array]:
    """Return whether a leaf is an array; tracing makes JAX's arrays of numpy's."""
    return isinstance(leaf, jax.Array | np.ndarray)


def has_shape(leaf: object) -> TypeGuard[jax.Array | jax.ShapeDtypeStruct]:
    """Return whether a leaf is an array or stands for one."""
    return is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


class FlatArguments(NamedTuple):
    """The flat arguments of a call.

    Attributes:
        leaves: all of them.
        treedef: the structure of `(args, kwargs)`.
        traced: positions of the leaves that are traced.
    """

    leaves: Sequence[Any]
    treedef: TreeDef
    traced: Sequence[int]

    @property
    def arrays(self) -> list[Any]:
        """The traced leaves."""
        return [self.leaves[n] for n in self.traced]

    def fill(self, arrays: Iterable[object]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return `(args, kwargs)` with these arrays in the place of the traced leaves."""
        filled = list(self.leaves)
        for n, array in zip(self.traced, arrays, strict=True):
            filled[n] = array
        return self.treedef.unflatten(filled)


def flat_arguments(*args: object, **kwargs: object) -> FlatArguments:
    """Return the arguments of a call, of which all arrays are traced."""
    leaves, treedef = flatten((args, kwargs))
    return FlatArguments(leaves, treedef, [n for n, leaf in enumerate(leaves) if has_shape(leaf)])
