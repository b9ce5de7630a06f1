"""Subclasses of a model's modules whose methods run through `adapt`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import CodeType
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
def adapted_class(cls: type[M], kernels: frozenset[str] | None = None, /) -> type[M]:
    """Return the subclass whose `__call__` runs through `adapt`, as do further public methods.

    Args:
        cls: the class of a module with adapted variables in it.
        kernels: names of the attributes that are adapted in the modules below it. Methods whose
            code names one, itself or in a method that it calls, run through `adapt`. None for a
            module that owns an adapted variable: all of its public methods do.

    Returns:
        The subclass; the class itself if it has no such method.
    """
    methods = {
        name: value
        for base in reversed(cls.__mro__)
        if base not in nnx.Module.__mro__
        for name, value in vars(base).items()
        if callable(value) and not isinstance(value, type | staticmethod | classmethod)
    }
    chosen = set(methods) if kernels is None else _readers(methods, kernels)
    names = {n for n in chosen if not n.startswith("_") and n not in _NOT_CALLS}
    names |= {"__call__"} & set(dir(cls))
    if not names:
        return cls
    members: dict[str, object] = {name: _through_adapt(getattr(cls, name)) for name in names}
    members["__module__"] = cls.__module__
    members["__doc__"] = cls.__doc__
    members["_loha_base"] = cls
    members["__reduce__"] = lambda self: (_rebuild, (cls, kernels), self.__getstate__())
    return type(cls)(f"LoHa{cls.__name__}", (cls,), members)


def _rebuild(cls: type[nnx.Module], kernels: frozenset[str] | None) -> nnx.Module:
    return object.__new__(adapted_class(cls, kernels))


def _readers(methods: dict[str, Callable[..., object]], kernels: frozenset[str]) -> set[str]:
    """Return the methods whose code names one of the attributes, or another such method."""
    codes = {n: getattr(inspect.unwrap(m), "__code__", None) for n, m in methods.items()}
    named = {n: set(kernels) if code is None else _names_in(code) for n, code in codes.items()}
    found: set[str] = set()
    while more := {n for n, names in named.items() if n not in found and names & (kernels | found)}:
        found |= more
    return found


def _names_in(code: CodeType) -> set[str]:
    """Return the names of attributes in a function's code, that of functions in it included."""
    inner = (_names_in(const) for const in code.co_consts if isinstance(const, CodeType))
    return set(code.co_names).union(*inner)


def _through_adapt(method: Callable[..., R]) -> Callable[..., R]:
    @functools.wraps(method)
    def call(self: nnx.Module, *args: object, **kwargs: object) -> R:
        return adapt(lambda self, *args, **kwargs: method(self, *args, **kwargs))(
            self, *args, **kwargs
        )

    return call


def dress(model: nnx.Module) -> None:
    """Set the class of each module: the adapted one if it holds adapted variables, else its own."""
    known: dict[int, frozenset[str]] = {}

    def adapted_below(node: object) -> frozenset[str]:
        """Return the names of the attributes of a node, and of all below it, that are adapted."""
        if not isinstance(node, nnx.Pytree):
            return frozenset().union(*(adapted_below(value) for _, value in slots(node)))
        if id(node) not in known:
            known[id(node)] = frozenset()  # for cycles
            own = (str(adapted.settings.path[0]) for adapted in called_in(node))
            below = (adapted_below(value) for _, value in slots(node))
            known[id(node)] = frozenset(own).union(*below)
        return known[id(node)]

    for _, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Module):
            base, kernels = base_class(node), adapted_below(node)
            if not kernels:
                set_class(node, base)
            elif not _is_author_layer(node):
                set_class(node, adapted_class(base, None if called_in(node) else kernels))


def end_interception(model: nnx.Module) -> None:
    """Set the classes that modules had before qwix began to run them."""
    for _, node in nnx.iter_graph(model):
        if (plain := getattr(type(node), "_unquantized_type", None)) is not None:
            set_class(node, plain)


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
