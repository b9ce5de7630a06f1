"""Weight decompositions (DoRA) inside `adapt`: multiples of the base weight besides ΔW.

A decomposed adapter adds `first · ΔW + second · W` (`Factors.gains`). The first multiple is in the
factors of the view already. The second, the *gain*, is constant along the in or along the out
axes, so that it can be multiplied into x or into the result: W is read as it is.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from loha_jax.transform.kernel_view import KernelView
from loha_jax.transform.packed_kernel import frozen_product

if TYPE_CHECKING:
    from loha_jax.transform.operation import Operation


class BaseScaling(NamedTuple):
    """The gains of an operation's kernel, as multiples of its result and of its input x.

    Attributes:
        of_result: an array that broadcasts against the result, or None.
        of_input: an array that broadcasts against x, or None.
    """

    of_result: jax.Array | None = None
    of_input: jax.Array | None = None


def base_scaling(operation: Operation, x: jax.Array, view: KernelView) -> BaseScaling | None:
    """Return the gains of a view; None where one can be neither of the result nor of x."""
    scaling = BaseScaling()
    for side in "oi":
        if (gain := gain_along(view, side)) is None:
            continue
        placed = operation.place_gain(x, gain)
        pairs = [] if placed is None else list(zip(scaling, placed, strict=True))
        if not pairs or any(old is not None and new is not None for old, new in pairs):
            return None
        scaling = BaseScaling(*(new if old is None else old for old, new in pairs))
    return scaling


def scaled_base(
    operation: Operation, x: jax.Array, view: KernelView, forward_mode: bool
) -> jax.Array:
    """Return the frozen operation, with the gains: y = x·W ⊙ (1 + of_result) + (x ⊙ of_input)·W."""
    scaling = base_scaling(operation, x, view)
    assert scaling is not None, "the rule has asked before"
    of_result, of_input = scaling

    def product(x: jax.Array) -> jax.Array:
        return frozen_product(
            operation.apply,
            x,
            view.kernel,
            branches=operation.branches,
            forward_mode=forward_mode,
        )

    if of_result is None:
        scaled = x if of_input is None else (x * (1 + of_input)).astype(x.dtype)
        return product(scaled)
    plain = product(x)
    base = (plain * (1 + of_result)).astype(plain.dtype)
    return base if of_input is None else base + product((x * of_input).astype(x.dtype))


def gain_along(view: KernelView, side: str) -> jax.Array | None:
    """Return the sum of the adapters' gains along the out axes ("o") or the in axes ("i").

    Returns:
        An array that broadcasts against the view, of size 1 along its other axes; None without such
        adapters.
    """
    gains = [g for f in view.factors if (g := f.out_gain if side == "o" else f.in_gain) is not None]
    if not gains:
        return None
    size = [atom.size for atom in view.atoms]
    own = [n for n in (*view.of_kind("s"), *view.of_kind(side)) if size[n] > 1]
    present = [n for axis in view.dims for n in axis]
    # [*stack, features]: one axis per atom, in the order in which the view has them
    total = functools.reduce(jnp.add, gains).reshape([size[n] for n in own])
    total = jnp.transpose(total, [own.index(n) for n in present if n in own])
    # [*atoms of the view], 1 for those that the gain does not vary along …
    total = total.reshape([size[n] if n in own else 1 for n in present])
    # … but for those that share an axis of the view with one it does vary along
    mixed = [axis for axis in view.dims if set(axis) & set(own) and set(axis) - set(own)]
    whole = {*own, *(n for axis in mixed for n in axis)}
    total = jnp.broadcast_to(total, [size[n] if n in whole else 1 for n in present])
    # [*axes of the view]
    return total.reshape(
        [math.prod(size[n] for n in axis) if set(axis) & set(own) else 1 for axis in view.dims]
    )


def has_gain(view: KernelView) -> bool:
    """Return whether an adapter decomposes the weight."""
    return any(f.out_gain is not None or f.in_gain is not None for f in view.factors)
