"""Parameters in Linen's metadata boxes (`nn.with_partitioning`, `nn.with_logical_partitioning`).

In an adapted tree each array of an adapter has a box like the kernel's, with the names of its own
axes. So `nn.get_partition_spec`, `nn.logical_to_mesh_sharding` and `nn.meta.unbox` work on it. The
library itself works on plain trees: it unboxes its arguments and boxes its results again.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import jax
from jaxtyping import PyTree

from loha_jax.tree.factors import Factors
from loha_jax.tree.leaves import (
    AdaptedLeaf,
    LoHaWeight,
    SavedWeight,
    base_of,
    is_adapted,
    map_adapted,
)
from loha_jax.tree.placement import named_axes

T = TypeVar("T")
P = ParamSpec("P")

KeyPath = tuple[Any, ...]
"""A key path of `jax.tree_util`."""


class Box(Protocol):
    """The part of `flax.core.meta.AxisMetadata` that is used here."""

    def unbox(self) -> Any:
        """Return the parameter."""
        ...

    def replace_boxed(self, val: Any) -> Any:
        """Return a box of the same kind around another parameter."""
        ...


def is_box(x: object) -> bool:
    """Return whether `x` is a box.

    Flax is not imported: whoever has a box has imported it.
    """
    meta = sys.modules.get("flax.core.meta")
    return meta is not None and isinstance(x, meta.AxisMetadata)


def box_of(leaf: object) -> Any:
    """Return the box of a parameter, or of the kernel of an adapted one; None without one."""
    held = base_of(leaf)
    return held if is_box(held) else None


def unbox(tree: T) -> T:
    """Return the tree without boxes; no sharding constraint is applied."""
    return jax.tree.map(lambda x: _content(x) if is_box(x) else x, tree, is_leaf=is_box)


def _content(box: Any) -> Any:
    return box.value if hasattr(box, "value") else box.unbox()


def boxes_among(tree: PyTree) -> dict[KeyPath, Any]:
    """Return the boxes of a tree's parameters by path; {} if Flax' boxes are not in use."""
    if "flax.core.meta" not in sys.modules:
        return {}
    flat, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: is_box(x) or is_adapted(x)
    )
    return {path: box for path, leaf in flat if (box := box_of(leaf)) is not None}


def put_in_boxes(tree: T, boxes: Mapping[KeyPath, Box]) -> T:
    """Return a plain tree with the parameters at some paths in boxes again."""

    def put(path: KeyPath, leaf: object) -> object:
        return boxed(leaf, boxes[path]) if path in boxes else leaf

    return jax.tree_util.tree_map_with_path(put, tree, is_leaf=is_adapted)


def boxed(leaf: object, box: Box) -> Any:
    """Put a parameter into its box.

    Each array of an adapted one gets a box with the names of its own axes.
    """
    if isinstance(leaf, LoHaWeight):
        adapters = {name: _boxed_factors(f, leaf, box) for name, f in leaf.adapters.items()}
        return dataclasses.replace(leaf, kernel=box.replace_boxed(leaf.kernel), adapters=adapters)
    if isinstance(leaf, SavedWeight):
        copies = {name: box.replace_boxed(copy) for name, copy in leaf.copies.items()}
        return dataclasses.replace(leaf, original=box.replace_boxed(leaf.original), copies=copies)
    return box.replace_boxed(leaf)


def _boxed_factors(factors: Factors, leaf: LoHaWeight, box: Any) -> Factors:
    # A box of some other kind says nothing of axes.
    axes = named_axes(getattr(box, "names", None), leaf, factors)
    boxes = {
        name: dataclasses.replace(box, value=getattr(factors, name), names=own)
        for name, own in axes.items()
    }
    return dataclasses.replace(factors, **boxes)


def boxes_outside(tree: T) -> T:
    """Return the tree with each adapted parameter in one box, as a model expects its kernel."""

    def turn(leaf: AdaptedLeaf) -> object:
        box = box_of(leaf)
        return leaf if box is None else box.replace_boxed(unbox(leaf))

    return map_adapted(turn, tree)


def boxes_inside(tree: T) -> T:
    """Undo `boxes_outside`."""

    def turn(box: Any) -> Any:
        return boxed(_content(box), box) if is_box(box) and is_adapted(_content(box)) else box

    return jax.tree.map(turn, tree, is_leaf=is_box)


def keeps_boxes(function: Callable[Concatenate[T, P], T]) -> Callable[Concatenate[T, P], T]:
    """Decorate a function from tree to tree so that its first argument may hold boxes."""

    @functools.wraps(function)
    def wrapper(tree: T, *args: P.args, **kwargs: P.kwargs) -> T:
        boxes = boxes_among(tree)
        if not boxes:
            return function(tree, *args, **kwargs)
        return put_in_boxes(function(unbox(tree), *args, **kwargs), boxes)

    return wrapper
