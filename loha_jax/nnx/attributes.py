"""Changes that a call makes to attributes of its models that are neither variables nor arrays.

A call is traced. The value of an attribute set there may hold traced values, which are invalid
afterwards (`functools.cached_property` keeps them). So only plain data is set in the caller's
model.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, cast

import numpy as np
from flax import nnx
from jaxtyping import PyTree

from loha_jax.nnx.graph import Path
from loha_jax.runtime import _compat

T = TypeVar("T")

_PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    type(...),
    enum.Enum,
    np.generic,
    np.dtype,
    np.ndarray,
)


def is_plain(value: object) -> bool:
    """Return whether a value cannot hold traced ones: numbers, strings, containers of them."""
    if isinstance(value, Mapping):
        return all(is_plain(key) and is_plain(item) for key, item in value.items())
    if isinstance(value, tuple | list | set | frozenset):
        return all(map(is_plain, value))
    return isinstance(value, _PLAIN)


def detach_attributes(clone: nnx.Pytree) -> None:
    """Copy a clone's containers, and delete the properties that it caches of its weights."""
    for name, value in _compat.attributes(clone).items():
        if clone._pytree__nodes.get(name, False):
            continue
        of_class = getattr(type(clone), str(name), None)
        if isinstance(of_class, functools.cached_property) and not is_plain(value):
            del vars(clone)[name]
        elif (copy := _copied(value)) is not value:
            vars(clone)[name] = copy


def _copied(value: T) -> T:
    """Copy lists, dicts and sets, and those inside them; return anything else as it is."""
    copy: object = value
    if type(value) is dict:
        copy = {key: _copied(item) for key, item in value.items()}
    elif type(value) is list:
        copy = [_copied(item) for item in value]
    elif type(value) is set:
        copy = set(value)
    return cast(T, copy)


def changed_attributes(
    clones: Mapping[Path, object], originals: Mapping[Path, object]
) -> Iterator[tuple[nnx.Pytree, str | int, object]]:
    """Yield the attributes set to plain data in the clones: original node, name and value."""
    for path, clone in clones.items():
        if not isinstance(clone, nnx.Pytree):
            continue
        if path not in originals:
            raise ValueError(
                f"A call of an adapted module adds the module {'.'.join(map(str, path[1:]))}. Make "
                "modules in `__init__`, or before `inject`."
            )
        original = cast(nnx.Pytree, originals[path])
        for name, value in _compat.attributes(clone).items():
            if clone._pytree__nodes.get(name, False) or not is_plain(value):
                continue
            old = vars(original).get(name, originals)
            if old is not value and not (
                type(old) is type(value) in (list, dict, set) and repr(old) == repr(value)
            ):
                yield original, name, value


def new_data_attributes(
    clones: Mapping[Path, object], originals: Mapping[Path, object]
) -> Iterator[tuple[Path, PyTree]]:
    """Yield the attributes with arrays that were added to the clones: path and value."""
    for path, clone in clones.items():
        if isinstance(clone, nnx.Pytree) and path in originals:
            for name, value in vars(clone).items():
                if clone._pytree__nodes.get(name, False) and name not in vars(originals[path]):
                    yield (*path, name), value


def set_attribute(node: nnx.Pytree, name: str | int, value: object) -> None:
    """Set an attribute. A list, dict or set, which others may hold too, is changed in place."""
    held: dict[Any, Any] = vars(node)
    old: Any = held.get(name)
    if type(old) is type(value) is list:
        old[:] = value
    elif type(old) is type(value) in (dict, set):
        old.clear()
        old.update(value)
    else:
        _compat.set_attribute(node, name, value)
