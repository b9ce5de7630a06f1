"""Dotted module names of a tree's leaves, which targets match and PEFT's keys hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jax.tree_util import FlattenedIndexKey, GetAttrKey

from loha_jax.lowrank.layout import Layout

Names = Callable[[str], "str | Sequence[str]"] | Mapping[str, "str | Sequence[str]"]
"""How `inject` takes names: a function of the default name, or `{regex: template}`.

The function may be a `NamesWithLayouts`, such as `loha_jax.interop.NameMap`.
"""


@runtime_checkable
class NamesWithLayouts(Protocol):
    """A function of the default name that also knows layouts.

    Attributes:
        layouts: used where the caller gives none. None says that a leaf is no kernel, but a stack
            of scales.
    """

    layouts: Mapping[str, str | Layout | None] | None

    def __call__(self, name: str, /) -> str | Sequence[str]:
        """Return the torch module name, or one name per stack index."""
        ...


KERNEL_LEAVES = ("kernel", "embedding", "w", "weight")
"""Leaf names that stand for the module that holds them."""

_OTHER_LEAVES = {
    *("bias", "b", "scale", "offset", "mean", "var"),  # Flax, Haiku
    *("running_mean", "running_var", "num_batches_tracked"),  # torch
}
_WRAPPERS = ("value", "raw_value")  # they hold the array of an nnx.Variable or nn.Partitioned
_HELD = ("data", *_WRAPPERS)  # the same as keys: "q.weight.data", a State as a dictionary
_BOXED = ("weight", "bias")
_BOXES = (FlattenedIndexKey(0), GetAttrKey("array"))  # haliax' NamedArray
_COLLECTIONS = ("params", "batch_stats")
_CONTAINER = re.compile(r"layers?|blocks?|h|resblocks|.*[Ss]can.*")


class UnknownNameError(ValueError):
    """The error of a `names` function that cannot tell a kernel's torch name.

    `inject` passes it on if the config may target that kernel, and leaves the kernel alone
    otherwise.

    Attributes:
        candidates: torch module names that it could be.
    """

    def __init__(self, message: str, candidates: Sequence[str] = ()):
        super().__init__(message)
        self.candidates = tuple(candidates)


def path_parts(path: Sequence[Any]) -> tuple[str, ...]:
    """Return a `jax.tree_util` key path as strings.

    The keys of flat dictionaries ("layers.0.q_proj.weight", "decoder/q/kernel", tuples) give
    several parts, like those of the nested tree. An attribute or index that only boxes the array
    gives none, nor does the end of "q.weight.data".

    Example:
        >>> import jax
        >>> [(path, _)] = jax.tree_util.tree_flatten_with_path({"layers.0.q_proj.weight": 1.0})[0]
        >>> path_parts(path)
        ('layers', '0', 'q_proj', 'weight')
    """
    parts: list[str] = []
    for key in path:
        for attribute in ("key", "idx", "name"):
            if hasattr(key, attribute):
                parts += _key_parts(getattr(key, attribute))
                break
        else:
            parts.append(str(key))
    while len(parts) > 1 and parts[-1] in _WRAPPERS and getattr(path[-1], "name", None) is not None:
        parts.pop()
    if len(parts) > 1 and parts[-2] in _BOXED and path[-1] in _BOXES:
        parts.pop()
    if len(parts) > 1 and parts[-2] in (*KERNEL_LEAVES, "bias") and parts[-1] in _HELD:
        parts.pop()
    return tuple(parts)


def _key_parts(key: object) -> list[str]:
    """Return the parts of one key: several if the dictionary is flat."""
    if isinstance(key, tuple):
        return [part for inner in key for part in _key_parts(inner)]
    parts = re.split(r"/~/|[/.]", key) if isinstance(key, str) else [str(key)]
    return parts if all(parts) else [str(key)]


def is_kernel_leaf(parts: Sequence[str]) -> bool:
    """Return whether a leaf can hold a kernel, by its name.

    Biases and normalisation scales cannot.
    """
    return bool(parts) and parts[-1] not in _OTHER_LEAVES


def module_name(parts: Sequence[str]) -> str:
    """Return the default dotted module name of a leaf.

    It is the path joined with dots, without a leading collection ("params") and without a trailing
    "kernel", "embedding", "w" or "weight" (or "bias", "scale", …). Haiku's "linear/~/sub" counts as
    dots.

    Example:
        >>> module_name(("params", "encoder", "layer", "0", "query", "kernel"))
        'encoder.layer.0.query'
    """
    parts = list(parts)
    if len(parts) > 1 and parts[0] in _COLLECTIONS:
        parts = parts[1:]
    if len(parts) > 1 and (parts[-1] in KERNEL_LEAVES or parts[-1] in _OTHER_LEAVES):
        parts = parts[:-1]
    return re.sub(r"/~/|/", ".", ".".join(parts))


def torch_parameter(parts: Sequence[str]) -> str:
    """Return the name of a leaf inside its torch module.

    Kernel, scale and embedding are `weight`, mean is `running_mean`.
    """
    last = parts[-1]
    if last in KERNEL_LEAVES or last == "scale":
        return "weight"
    others = {"b": "bias", "offset": "bias", "mean": "running_mean", "var": "running_var"}
    return others.get(last, last)


def stack_names(
    name: str,
    stack: Sequence[int],
    names: Names | None,
    places: Sequence[int] | None = None,
) -> tuple[str, ...]:
    """Return the torch module names of a leaf, one per stack index in row-major order.

    Without `names`, a stack index is inserted after the first part of the name that is called like
    a container of layers ("layers", "blocks", "h", "ScanBlock_0", …), or else after the first part.

    Args:
        name: the default name (`module_name`).
        stack: sizes of the stack axes; () for a kernel that is one module.
        names: a function of the default name or `{regex: template}` (fullmatch, `\\1` for groups).
            A stacked leaf takes a list with one name per index, or one name with `{}` (or `{0}`,
            `{1}`) in the places of the stack indices.
        places: how many parts of the name stand in front of each index, where the model says it.
            The index of a stack that it does not say comes before the last part.

    Raises:
        ValueError: the number of names is not the number of stack indices, or they are not
            distinct.

    Example:
        >>> stack_names("layers.q", (2,), {r"layers\\.(.*)": r"model.layers.{}.\\1"})
        ('model.layers.0.q', 'model.layers.1.q')
    """
    given = _given_name(name, names)
    count = int(np.prod(stack, dtype=int))
    if given is None and places is not None:
        return tuple(_with_indices(name, index, places) for index in np.ndindex(*stack))
    if given is None:
        *above, last = name.split(".")
        at = stack_place(name)
        indices = (map(str, index) for index in np.ndindex(*stack))
        return tuple(".".join([*above[:at], *i, *above[at:], last]) for i in indices)
    if isinstance(given, str):
        result = tuple(given.format(*index) for index in np.ndindex(*stack)) if stack else (given,)
    else:
        result = tuple(given)
    if len(result) != count or len(set(result)) != count:
        raise ValueError(
            f"`names` gives {name} {given!r}, but its kernel holds {count} module(s), one per "
            f"index of its stack axes {tuple(stack)}: give a list of {count} names, or one name "
            "with {} where the index goes"
        )
    return result


def stack_place(name: str) -> int:
    """Return how many parts of a module's name stand in front of the index of a stack.

    Example:
        >>> stack_place("model.layers.q"), stack_place("mlp.q")
        (2, 1)
    """
    above = name.split(".")[:-1]
    return next((n for n, part in enumerate(above, 1) if _CONTAINER.fullmatch(part)), 1)


def _with_indices(name: str, index: Sequence[int], places: Sequence[int]) -> str:
    parts = name.split(".")
    missing = [len(parts) - 1] * (len(index) - len(places))
    for place, n in reversed([*zip([*places, *missing], index, strict=False)]):
        parts.insert(place, str(n))
    return ".".join(parts)


def all_names(name: str, names: Names | None) -> tuple[str, ...]:
    """Return the torch module names of a leaf that is no kernel, stacked or not."""
    given = _given_name(name, names)
    return (given,) if isinstance(given, str) else tuple(given or (name,))


def _given_name(name: str, names: Names | None) -> str | Sequence[str] | None:
    if names is None:
        return None
    if callable(names):
        return names(name)
    for pattern, template in names.items():
        if found := re.fullmatch(pattern, name):
            if isinstance(template, str):
                return found.expand(template)
            return [found.expand(t) for t in template]
    return None
