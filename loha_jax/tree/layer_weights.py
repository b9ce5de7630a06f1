"""The type in which a framework's layers say what their weights are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import jax
from jaxtyping import PyTree

from loha_jax.lowrank.layout import Layout
from loha_jax.tree.own_paths import own_path

Role = Literal["kernel", "lookup", "transposed", "vector", "unclear"]


@dataclasses.dataclass(frozen=True)
class LayerWeight:
    """What a layer says of one of its weights.

    Attributes:
        path: of the weight, as `leaves_by_path` has it.
        layout: None for a vector, and where the layer does not say it.
        role: a lookup is a table of rows; the transposed kernel of a convolution has other axes in
            torch; a vector is a scale, whatever axes it has; of an unclear one only the axes' names
            are known.
        axes: the names of its axes, where they have names.
        stacks: see `OwnPath`.
        scale: the number by which the layer multiplies the weight.
    """

    path: tuple[str, ...]
    layout: Layout | None = None
    role: Role = "kernel"
    axes: tuple[str, ...] = ()
    stacks: tuple[int, ...] = ()
    scale: float = 1.0


def nodes_of(tree: PyTree, kinds: tuple[type, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield the nodes of these types in a tree, with their key paths."""
    for path, node in jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: isinstance(node, kinds)
    )[0]:
        if isinstance(node, kinds):
            yield path, node


def weight_of(tree: PyTree, path: tuple[Any, ...], **known: Any) -> LayerWeight:
    """Return a `LayerWeight` at a key path of a tree."""
    parts, stacks = own_path(tree, path)
    return LayerWeight(parts, stacks=stacks, **known)
