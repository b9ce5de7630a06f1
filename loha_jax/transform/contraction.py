"""`contract`: an einsum of two arrays as one `dot_general`."""

# JAX's own functions are only partly typed.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from loha_jax.lowrank.hadamard import float32_or_wider
from loha_jax.runtime.device_types import result_sharding


def contract(
    a: Float[Array, "*a"],
    a_labels: str,
    b: Float[Array, "*b"],
    b_labels: str,
    out: str,
    precision: lax.PrecisionLike = None,
    like: Float[Array, "*result"] | None = None,
    dtype: jnp.dtype | None = None,
) -> Float[Array, "*result"]:
    """Return a two-operand einsum, accumulated in float32 or wider.

    Labels in both operands and in `out` are batch axes; those in both and not in `out` are
    contracted. Unlike `jnp.einsum`, it never swaps the operands: XLA:CPU runs some orientations
    several times faster than others.

    Args:
        a, b: the operands.
        a_labels, b_labels: one letter for each of their axes.
        out: the letters of the result's axes.
        precision: of the `dot_general`.
        like: on a mesh with explicit axes, an array that the result is sharded like. By default it
            is sharded like the operands; where both say something of an axis, like `a`.
        dtype: of the result, by default float32 or wider. A narrower result is rounded once, from
            sums in float32.
    """
    batch = [c for c in a_labels if c in b_labels and c in out]
    summed = [c for c in a_labels if c in b_labels and c not in out]
    numbers = (
        (tuple(map(a_labels.index, summed)), tuple(map(b_labels.index, summed))),
        (tuple(map(a_labels.index, batch)), tuple(map(b_labels.index, batch))),
    )
    # dot_general orders its result: batch axes, free axes of a, free axes of b.
    labels = [
        *batch,
        *(c for c in a_labels if c not in b_labels),
        *(c for c in b_labels if c not in a_labels),
    ]
    sources = [(like, out)] if like is not None else [(a, a_labels), (b, b_labels)]
    result = lax.dot_general(
        a,
        b,
        numbers,
        precision=precision,
        preferred_element_type=dtype or float32_or_wider(a.dtype, b.dtype),
        out_sharding=result_sharding(labels, sources),
    )
    order = [labels.index(c) for c in out]
    return result if order == sorted(order) else lax.transpose(result, order)
