"""What XLA has to be told so that it keeps no more than it must between the forward and the backward pass.

None of this changes a value. XLA merges equal computations, even across `lax.optimization_barrier` on CPU, where the
barrier is dropped first: what the backward pass means to build again is then kept instead. And it repeats cheap
operations in every reader, so that of a sum it keeps both terms. Two numbers whose values it cannot know prevent that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from loha_jax.runtime.device_types import zeros_of_type


def _unknown_zero(source: jax.Array) -> jax.Array:
    """An int32 that is 0 for every value of `source`, which XLA does not see."""
    return _unknown_zeros(source[(slice(0, 1),) * source.ndim].sum())


def _unknown_zeros(x: jax.Array) -> jax.Array:
    """The same for each element of an array: `[*x.shape]`."""
    return jnp.minimum(lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32) & 1, 0)


def materialized(x: jax.Array, source: jax.Array) -> jax.Array:
    """`x`, a sum for example, as one array: XLA does not repeat a division by an unknown number, 1, in each reader.

    On several devices an element of `source` would be sent around; each then divides by numbers of its own.
    """
    if jax.device_count() > 1:
        return _divided_by_ones(x)
    return x / (1 + _unknown_zero(source)).astype(x.dtype)


@jax.custom_jvp
def _divided_by_ones(x: jax.Array) -> jax.Array:
    """`x`, divided by ones that XLA does not see, one per element: `[*x.shape]`."""
    return x / (1 + _unknown_zeros(x)).astype(x.dtype)


@_divided_by_ones.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Leaves the tangent as it is: to divide it too, the backward pass would recompute `x`."""
    return _divided_by_ones(*primals), tangents[0]


def wait_for(pending: jax.Array, values: Any) -> Any:
    """`values`, unchanged, as arrays that XLA can neither merge with others nor have before `pending` is there."""
    return jax.tree.map(lambda x: x + _unknown_zero(pending).astype(x.dtype), values)


def isolated(fn: Callable[..., Any], args: tuple[Any, ...], source: jax.Array) -> Any:
    """`fn(*args)`, started when all of `args` are there, and sharing nothing with the rest of the program.

    XLA:CPU starts whatever does not depend on a pending result, at the price of memory: it would build every layer's
    ΔW at once. A branch that it cannot foresee holds it back. Elsewhere a barrier does, at no cost; so it does on
    several devices, where an element of `source` would be sent around.
    """

    def branch(*args):
        result = jax.eval_shape(fn, *args)
        zeros = jax.tree.map(zeros_of_type, result)
        return lax.cond(_unknown_zero(source) == 0, fn, lambda *_: zeros, *args)

    def barrier(*args):
        return fn(*lax.optimization_barrier(args))

    return lax.platform_dependent(*args, cpu=branch if jax.device_count() == 1 else barrier, default=barrier)
