"""Subclasses of a model's modules whose methods run through `adapt`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

from flax import nnx

from loha_jax.nnx.graph import slots
from loha_jax.nnx.siblings import called_in
from loha_jax.transform.adapt import adapt

M = TypeVar("M", bound=nnx.Module)
R = TypeVar("R")

_NOT_CALLS = ("set_view", "set_mode", "init_cache")
"""NNX's names of methods that change a module instead of computing."""


@functools.cache  # one subclass per class, so that equal models have equal graph definitions
def adapted_class(cls: type[M], owner: bool, /) -> type[M]:
    """Return the subclass whose `__call__` runs through `adapt`.

    For the owner of a kernel its other public methods do too.
    """
    names = {"__call__"} & set(dir(cls))
    if owner:
        for base in cls.__mro__:
            if base in nnx.Module.__mro__:
                break
            names |= {
                name
                for name, value in vars(base).items()
                if not name.startswith("_") and name not in _NOT_CALLS and _is_method(value)
            }
    members: dict[str, object] = {name: _through_adapt(getattr(cls, name)) for name in names}
    members["__module__"] = cls.__module__
    members["__doc__"] = cls.__doc__
    members["_loha_base"] = cls
    members["__reduce__"] = lambda self: (_rebuild, (cls, owner), self.__getstate__())
    return type(cls)(f"LoHa{cls.__name__}", (cls,), members)


def _rebuild(cls: type[nnx.Module], owner: bool) -> nnx.Module:
    return object.__new__(adapted_class(cls, owner))


def _is_method(value: object) -> bool:
    return callable(value) and not isinstance(value, type | staticmethod | classmethod)


def _through_adapt(method: Callable[..., R]) -> Callable[..., R]:
    @functools.wraps(method)
    def call(self: nnx.Module, *args: object, **kwargs: object) -> R:
        return adapt(lambda self, *args, **kwargs: method(self, *args, **kwargs))(
            self, *args, **kwargs
        )

    return call


def dress(model: nnx.Module) -> None:
    """Set the class of each module: the adapted one if it holds adapted variables, else its own."""
    known: dict[int, bool] = {}

    def holds(node: object) -> bool:
        if not isinstance(node, nnx.Pytree):
            return any(holds(value) for _, value in slots(node))
        if id(node) not in known:
            known[id(node)] = False  # for cycles
            known[id(node)] = bool(called_in(node)) or any(holds(value) for _, value in slots(node))
        return known[id(node)]

    for _, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Module):
            base, owner = base_class(node), bool(called_in(node))
            if not holds(node):
                set_class(node, base)
            elif (owner or "__call__" in dir(base)) and not _is_author_layer(node):
                set_class(node, adapted_class(base, owner))


def _is_author_layer(node: nnx.Module) -> bool:
    """Return whether a module's class was derived from an adapted class, and stays."""
    return base_class(node) is not vars(type(node)).get("_loha_base", type(node))


def base_class(node: object) -> type:
    """Return the class that a module had before it was adapted."""
    return getattr(type(node), "_loha_base", type(node))


def set_class(node: object, cls: type) -> None:
    """Set the class of a module in place."""
    if type(node) is not cls:
        object.__setattr__(node, "__class__", cls)
