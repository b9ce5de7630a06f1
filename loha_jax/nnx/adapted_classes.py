"""Subclasses of a model's modules whose methods run through `adapt`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from flax import nnx

from loha_jax.nnx.variables import AdaptedVariable, slots
from loha_jax.transform.adapt import adapt

M = TypeVar("M", bound=nnx.Module)

_NOT_CALLS = ("set_view", "set_mode", "init_cache")
"""NNX's names of methods that change a module instead of computing."""


def adapted_class(cls: type[M], owner: bool) -> type[M]:
    """Return the subclass whose `__call__` runs through `adapt`.

    For the owner of a kernel its other public methods do too.
    """
    return _adapted_class(cls, owner)


@functools.cache  # one subclass per class, so that equal models have equal graph definitions
def _adapted_class(cls: type[Any], owner: bool) -> type[Any]:
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
    methods: dict[str, Any] = {name: _through_adapt(cls, name) for name in names}
    methods["__module__"] = cls.__module__
    methods["__doc__"] = cls.__doc__
    methods["_loha_base"] = cls
    methods["__reduce__"] = lambda self: (_rebuild, (cls, owner), self.__getstate__())
    metaclass: Any = type(cls)
    return metaclass(f"LoHa{cls.__name__}", (cls,), methods)


def _rebuild(cls: type[nnx.Module], owner: bool) -> nnx.Module:
    return object.__new__(adapted_class(cls, owner))


def _is_method(value: Any) -> bool:
    return callable(value) and not isinstance(value, type | staticmethod | classmethod)


def _through_adapt(cls: type[nnx.Module], name: str) -> Callable[..., Any]:
    method = getattr(cls, name)

    @functools.wraps(method)
    def call(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        return adapt(lambda self, *args, **kwargs: method(self, *args, **kwargs))(
            self, *args, **kwargs
        )

    return call


def dress(model: nnx.Module) -> None:
    """Set the class of each module: the adapted one if it holds adapted variables, else its own."""
    known: dict[int, bool] = {}

    def holds(node: Any) -> bool:
        if isinstance(node, AdaptedVariable):
            return True
        if id(node) not in known:
            known[id(node)] = False  # for cycles
            known[id(node)] = any(holds(value) for _, value in slots(node))
        return known[id(node)]

    for _, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Module) and not isinstance(node, AdaptedVariable):
            base = base_class(node)
            owner = any(isinstance(value, AdaptedVariable) for _, value in slots(node))
            if not holds(node):
                set_class(node, base)
            elif type(node) is base and (owner or "__call__" in dir(base)):
                set_class(node, adapted_class(base, owner))


def base_class(node: Any) -> type:
    """Return the class that a module had before it was adapted."""
    return getattr(type(node), "_loha_base", type(node))


def set_class(node: Any, cls: type) -> None:
    """Set the class of a module in place."""
    if type(node) is not cls:
        object.__setattr__(node, "__class__", cls)
