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
    is_whole,
    map_adapted,
)
from loha_jax.tree.placement import named_axes
from loha_jax.tree.quantised import QuantisedArray, is_quantised, unwrapped
from loha_jax.tree.unbox import content, is_box, unbox

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


@dataclasses.dataclass(frozen=True)
class _PackedBox:
    """The boxes around the arrays of a quantised kernel, as one box.

    Attributes:
        node: the quantised array with the boxes in it.
        outer: the box of the stored values, which says the kernel's axes.
    """

    node: Any
    outer: Any

    def unbox(self) -> Any:
        """Return the quantised array without boxes."""
        return unbox(self.node)

    def replace_boxed(self, val: Any) -> Any:
        """Return another quantised array in these boxes; anything else in the outer one."""
        if not is_quantised(val):
            return self.outer.replace_boxed(val)

        def put(box: Any, x: object) -> object:
            return box.replace_boxed(x) if is_box(box) else x

        node = jax.tree.map(put, self.node, unwrapped(val), is_leaf=is_box)
        return QuantisedArray(node, val.cast) if isinstance(val, QuantisedArray) else node


def box_of(leaf: object) -> Any:
    """Return the box of a parameter, or of the kernel of an adapted one; None without one."""
    held = base_of(leaf)
    if not is_quantised(held):
        return held if is_box(held) else None
    boxes = [x for x in jax.tree.leaves(held, is_leaf=is_box) if is_box(x)]
    if not boxes:
        return None
    outer = max(boxes, key=lambda box: getattr(content(box), "size", 0))
    return _PackedBox(unwrapped(held), outer)


def boxes_among(tree: PyTree) -> dict[KeyPath, Any]:
    """Return the boxes of a tree's parameters by path; {} if Flax' boxes are not in use."""
    if "flax.core.meta" not in sys.modules:
        return {}
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: is_box(x) or is_whole(x))
    return {path: box for path, leaf in flat if (box := box_of(leaf)) is not None}


def put_in_boxes(tree: T, boxes: Mapping[KeyPath, Box]) -> T:
    """Return a plain tree with the parameters at some paths in boxes again."""

    def put(path: KeyPath, leaf: object) -> object:
        return boxed(leaf, boxes[path]) if path in boxes else leaf

    return jax.tree_util.tree_map_with_path(put, tree, is_leaf=is_whole)


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
    box = box.outer if isinstance(box, _PackedBox) else box
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
        return boxed(content(box), box) if is_box(box) and is_adapted(content(box)) else box

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
