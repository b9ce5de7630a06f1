"""The update of a product whose frozen part is computed elsewhere.

A quantised kernel has no array W that `adapt` could read: its product is computed from integers and
scales. A product or convolution is linear in the kernel, so x·(W + ΔW) is that product plus x·ΔW.
"""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from loha_jax.transform.adapt import run
from loha_jax.transform.options import Options
from loha_jax.tree.leaves import LoHaWeight


def update_alone(
    fn: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    leaf: LoHaWeight,
    options: Options,
) -> jax.Array:
    """Return fn(x, ΔW), computed from the factors by the strategy that costs least.

    Args:
        fn: linear in the kernel, its second argument: a product, an einsum, a convolution.
        x: the plain operand.
        leaf: the adapted kernel; of the kernel itself only the shape is used.
        options: of the evaluation.

    Returns:
        An array of the shape and dtype of `fn`'s result for a kernel of x's dtype.

    Example:
        >>> import loha_jax
        >>> params = loha_jax.inject({"q": {"kernel": jnp.ones((3, 4))}},
        ...     loha_jax.LoHaConfig(r=2, target_modules=["q"]), key=jax.random.key(0))
        >>> update_alone(jnp.dot, jnp.ones((5, 3)), params["q"]["kernel"], Options()).shape
        (5, 4)
    """
    zero = dataclasses.replace(leaf, kernel=jnp.zeros(leaf.kernel.shape, x.dtype))
    return run(fn, (x, zero), {}, dataclasses.replace(options, update_alone=True))
