"""Hints that keep XLA from storing more than needed between the forward and the backward pass.

None of them changes a value. XLA merges equal computations, even across `lax.optimization_barrier`
on CPU, where the barrier is dropped first. A value that the backward pass should recompute is then
stored instead. XLA also repeats cheap operations in every reader: of a sum it stores both terms.
Numbers whose values it cannot know prevent both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from loha_jax.runtime.device_types import zeros_of_type

T = TypeVar("T")


def _unknown_zero(source: jax.Array) -> jax.Array:
    """Return an int32 that is 0 for every value of `source`, which XLA does not know."""
    return _unknown_zeros(source[(slice(0, 1),) * source.ndim].sum())


def _unknown_zeros(x: jax.Array) -> jax.Array:
    """Return such zeros for each element of an array: `[*x.shape]`."""
    return jnp.minimum(lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32) & 1, 0)


def computed_once(x: jax.Array, source: jax.Array) -> jax.Array:
    """Return `x`, a sum for example, as one array that its readers do not recompute.

    XLA does not repeat a division by an unknown number, 1, in each reader. On GPUs a barrier does
    it: there the kernel of a product can add to it, but not divide.

    On one CPU the cotangent is divided too. If it were not, all of its readers would recompute it
    from the terms of a sum, which would be stored: a Llama's training step took 26 % more memory.
    """
    backend, alone = jax.default_backend(), jax.device_count() == 1
    if backend == "gpu":
        return lax.optimization_barrier(x)
    if backend == "cpu" and alone:
        return _divided(x, _unknown_zero(source))
    return _with_plain_tangent(x, _unknown_zero(source) if alone else _unknown_zeros(x))


def _divided(x: jax.Array, unknown_zeros: jax.Array) -> jax.Array:
    return x / (1 + unknown_zeros).astype(x.dtype)


@jax.custom_jvp
def _with_plain_tangent(x: jax.Array, unknown_zeros: jax.Array) -> jax.Array:
    """Divide `x` alone.

    To divide the tangent too would be another pass over the cotangent on a TPU. On several devices
    each divides by its own numbers, and `x` would be recomputed for them: an element of another
    array would be sent around.
    """
    return _divided(x, unknown_zeros)


@_with_plain_tangent.defjvp
def _(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, object]
) -> tuple[jax.Array, jax.Array]:
    return _with_plain_tangent(*primals), tangents[0]


def wait_for(pending: jax.Array, values: T) -> T:
    """Return `values` as arrays that are computed after `pending` and merged with no others."""
    return jax.tree.map(lambda x: x + _unknown_zero(pending).astype(x.dtype), values)


def isolated(fn: Callable[..., T], args: tuple[Any, ...], source: jax.Array) -> T:
    """Compute `fn(*args)` when all of `args` are computed, sharing nothing with the rest.

    XLA:CPU starts everything that does not depend on a pending result, at the price of memory: it
    would materialise every layer's ΔW at once. A branch that it cannot foresee delays it.
    """

    def branch(*args):
        result = jax.eval_shape(fn, *args)
        zeros = jax.tree.map(zeros_of_type, result)
        return lax.cond(_unknown_zero(source) == 0, fn, lambda *_: zeros, *args)

    return behind_barrier(fn, args, on_one_cpu=branch)


def behind_barrier(
    fn: Callable[..., T], args: tuple[Any, ...], *, on_one_cpu: Callable[..., T]
) -> T:
    """Compute `fn(*args)` behind a barrier, or `on_one_cpu(*args)`, where a barrier does nothing.

    On several devices it is always the barrier: what stands in for it on CPU reads an element of an
    array, which would be sent around.
    """

    def barrier(*args):
        return fn(*lax.optimization_barrier(args))

    return lax.platform_dependent(
        *args, cpu=on_one_cpu if jax.device_count() == 1 else barrier, default=barrier
    )
