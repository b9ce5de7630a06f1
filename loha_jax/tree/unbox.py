"""Linen's metadata boxes, taken off."""

from __future__ import annotations

import sys
from typing import Any, TypeVar

import jax

T = TypeVar("T")


def is_box(x: object) -> bool:
    """Return whether `x` is a box.

    Flax is not imported: whoever has a box has imported it.
    """
    meta = sys.modules.get("flax.core.meta")
    return meta is not None and isinstance(x, meta.AxisMetadata)


def unbox(tree: T) -> T:
    """Return the tree without boxes; the tree itself if it has none.

    No sharding constraint is applied.
    """
    if not any(map(is_box, jax.tree.leaves(tree, is_leaf=is_box))):
        return tree
    return jax.tree.map(lambda x: content(x) if is_box(x) else x, tree, is_leaf=is_box)


def content(box: Any) -> Any:
    """Return what a box holds."""
    return box.value if hasattr(box, "value") else box.unbox()
