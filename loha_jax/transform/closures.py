"""Adapted weights that a function closes over instead of taking them as arguments.

`adapt` does not see them.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator

import jax

from loha_jax.tree.leaves import LoHaWeight, is_adapted


def closed_over(fn: Callable[..., object]) -> list[str]:
    """Return the names of variables outside of `fn` through which it reaches adapted kernels."""
    return list(dict.fromkeys(name for name, value in _outside(fn) if _holds_adapted(value)))


def _outside(fn: object) -> Iterator[tuple[str, object]]:
    """Yield the variables outside of a function that it reads, with their names."""
    if isinstance(fn, functools.partial):
        yield from (
            (f"argument {n} of functools.partial", value) for n, value in enumerate(fn.args)
        )
        yield from fn.keywords.items()
        yield from _outside(fn.func)
        return
    if (owner := getattr(fn, "__self__", None)) is not None:
        yield "self", owner
    function = getattr(fn, "__func__", fn)
    if not isinstance(function, types.FunctionType):
        return
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    variables = function.__globals__
    yield from ((name, variables[name]) for name in code.co_names if name in variables)


def _holds_adapted(value: object) -> bool:
    return any(isinstance(leaf, LoHaWeight) for leaf in jax.tree.leaves(value, is_leaf=is_adapted))
