"""The paths that frameworks give their parameters themselves.

haliax says how its fields are called in torch, and penzai labels its parameters. Neither is
imported: whoever has such a tree has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from loha_jax.targets.module_names import module_name, path_parts

_PENZAI_LEAVES = {"weights": "weight", "embeddings": "embedding"}


class OwnPath(NamedTuple):
    """A path of strings.

    Attributes:
        parts: as `path_parts` gives them.
        stacks: how many parts of the module's name stand in front of each index of a stack.
    """

    parts: tuple[str, ...]
    stacks: tuple[int, ...] = ()


def own_path(tree: object, path: Sequence[Any]) -> OwnPath:
    """Return a key path of a tree as strings, with the names that its framework has for it.

    - haliax: `_state_dict_key_map` renames fields and leaves some out, such as the one in which
      `Stacked` keeps its block. A `NamedArray` is no part of the path to its array.
    - penzai: the path of a parameter is its label, with `weight` for `weights`.

    Other trees have `path_parts`.
    """
    if not sys.modules.keys() & {"haliax", "penzai"}:
        return OwnPath(path_parts(path))
    node, keys, stacks = tree, [], []
    for key in path:
        label = _label(node)
        if label is not None:
            keys = [DictKey(label)]
        if _holds_stack(node):
            stacks.append(len(module_name((*path_parts(keys), "_")).split(".")) - 1)
        keys += _renamed(node, key)
        node = _child(node, key)
    return OwnPath(path_parts(keys), tuple(stacks))


def is_named_array(node: object) -> bool:
    """Return whether a node is a `NamedArray` of haliax or penzai."""
    kinds = (
        getattr(sys.modules.get("haliax"), "NamedArray", None),
        getattr(sys.modules.get("penzai.core.named_axes"), "NamedArrayBase", None),
    )
    return any(kind is not None and isinstance(node, kind) for kind in kinds)


def is_penzai_value(node: object) -> bool:
    """Return whether a node is a frozen parameter of penzai."""
    kind = getattr(sys.modules.get("penzai.core.variables"), "LabeledVariableValue", None)
    return kind is not None and isinstance(node, kind)


def _label(node: Any) -> str | None:
    """Return the path that the label of a frozen parameter of penzai says."""
    if not is_penzai_value(node) or not isinstance(node.label, str):
        return None
    module, dot, last = node.label.rpartition(".")
    return module + dot + _PENZAI_LEAVES.get(last, last)


def _holds_stack(node: object) -> bool:
    stacked = getattr(sys.modules.get("haliax.nn"), "Stacked", None)
    return stacked is not None and isinstance(node, stacked)


def _renamed(node: Any, key: Any) -> list[Any]:
    """Return the key of a child of a node under the name that the framework has for it."""
    if is_named_array(node) or (is_penzai_value(node) and _label(node) is not None):
        return []
    known = getattr(type(node), "_state_dict_key_map", None)
    if known is None or not isinstance(key, GetAttrKey):
        return [key]
    name = known(node).get(key.name, key.name)
    return [] if name is None else [GetAttrKey(name)]


def _child(node: Any, key: Any) -> Any:
    """Return the child of a node at a key; None where the key does not say which it is.

    JAX takes other nodes than containers apart. Their attributes are not read, which may be
    properties that warn.
    """
    if isinstance(key, DictKey | SequenceKey) and isinstance(node, dict | list | tuple):
        return node[key.key if isinstance(key, DictKey) else key.idx]
    if isinstance(key, FlattenedIndexKey):
        return node.array if is_named_array(node) else None
    children, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    return next((child for path, child in children if path == (key,)), None)
