"""Functions of JAX with the types of their arguments and results, which its own stubs lack."""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, TypeVarTuple, cast

import jax
from jax.core import Tracer
from jax.extend.core import Literal, Var

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")

Operand = Var | Literal


def array_type(operand: Operand) -> jax.ShapeDtypeStruct:
    """Return the shape and dtype of an operand."""
    return cast(jax.ShapeDtypeStruct, operand.aval)


def is_traced(tree: object) -> bool:
    """Return whether a tree holds a traced array."""
    return any(isinstance(array, Tracer) for array in jax.tree.leaves(tree))


def map_arrays(fn: Callable[[jax.Array], object], tree: T) -> T:
    """Return a tree of a node's type, such as a view, with `fn` of each array."""
    return jax.tree.map(fn, tree)


def jit(fn: Callable[P, R], static: tuple[int, ...] = ()) -> Callable[P, R]:
    """`jax.jit`, with the positions of arguments that are static."""
    return cast("Callable[P, R]", jax.jit(fn, static_argnums=static))


def checkpoint(fn: Callable[P, R]) -> Callable[P, R]:
    """`jax.checkpoint`."""
    return cast("Callable[P, R]", jax.checkpoint(cast(Any, fn)))


def with_vjp(
    fn: Callable[P, R], forward: Callable[..., tuple[R, Any]], backward: Callable[..., Any]
) -> Callable[P, R]:
    """Return a function with a derivative of its own: `jax.custom_vjp`."""
    differentiable = cast(Any, jax.custom_vjp(fn))
    differentiable.defvjp(forward, backward)
    return cast("Callable[P, R]", differentiable)


def vjp(fn: Callable[[*Ts], R], *primals: *Ts) -> tuple[R, Callable[[R], tuple[*Ts]]]:
    """`jax.vjp`."""
    return cast("tuple[R, Callable[[R], tuple[*Ts]]]", jax.vjp(fn, *primals))
