"""Weight decomposition (DoRA): the norms of W + ΔW, from the factors, without materialising ΔW.

With ΔW = KA @ KB (Khatri-Rao factors of inner size r²), the norm of a row takes products with r²
columns:

    ‖W + ΔW‖² = ‖W‖² + 2 Σ (W KBᵀ) ⊙ KA + Σ (KA KB KBᵀ) ⊙ KA

The gradient flows through the norm, as in LyCORIS; PEFT's DoRA, for LoRA, takes it for a constant.

Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024 (arXiv:2402.09353), and
LyCORIS' `LohaModule.apply_weight_decompose`.
"""

# JAX's own functions are only partly typed.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from loha_jax.lowrank.hadamard import float32_or_wider, khatri_rao_columns, khatri_rao_rows
from loha_jax.lowrank.layout import Layout

A = TypeVar("A", Array, np.ndarray)


def is_on_out(dora_shape: Sequence[int], kernel_shape: Sequence[int], stack: int) -> bool:
    """Return whether norms of this shape belong to output features, and not to input features.

    Args:
        dora_shape: `[*stack, out, 1, ...]` or `[*stack, 1, in, 1, ...]`.
        kernel_shape: `[*stack, out, in, *spatial]`.
        stack: number of stack axes.

    Example:
        >>> is_on_out((5, 1), (5, 3), 0), is_on_out((1, 3), (5, 3), 0)
        (True, False)
    """
    return dora_shape[stack] == kernel_shape[stack] and dora_shape[stack + 1] == 1


def weight_norms(kernel: jax.Array, layout: Layout, on_out: bool) -> jax.Array:
    """Return ‖W‖ per output or per input feature, which `dora_scale` starts at.

    Args:
        kernel: as its layout says.
        layout: of the kernel.
        on_out: per output feature.

    Returns:
        `[*stack, out, 1, ...]` or `[*stack, 1, in, 1, ...]`, in float32 or wider.
    """
    return jnp.sqrt(_squares(kernel.astype(float32_or_wider(kernel.dtype)), layout, on_out))


def _squares(kernel: jax.Array, layout: Layout, on_out: bool) -> jax.Array:
    """Return sums of squares in the shape of norms, without a transposed copy of the kernel."""
    summed = layout.axes("i" if on_out else "o") + layout.axes("k")
    sums = jnp.sum(kernel**2, summed, keepdims=True)
    return layout.unfold(sums)


def adapted_norms(
    kernel: Float[Array | np.ndarray, "*kernel"],
    layout: Layout,
    w1_a: Float[Array, "*stack out r1"],
    w1_b: Float[Array, "*stack r1 columns"],
    w2_a: Float[Array, "*stack out r2"],
    w2_b: Float[Array, "*stack r2 columns"],
    scale: Float[Array | np.ndarray, "*stack"] | float,
    *,
    on_out: bool,
) -> jax.Array:
    """Return ‖W + ΔW‖ per output or per input feature, differentiable in the factors and the scale.

    Where the norm is less than a thousandth of W's, ΔW nearly cancels W, and the difference of
    squares has few correct digits.

    Args:
        kernel: as its layout says.
        layout: of the kernel.
        w1_a, w1_b, w2_a, w2_b: flat factors: columns = in·prod(spatial).
        scale: of ΔW.
        on_out: per output feature.

    Returns:
        As `weight_norms`.
    """
    weight = jnp.asarray(kernel)
    dtype = float32_or_wider(weight.dtype, w1_a.dtype)
    weight, w1_a, w1_b, w2_a, w2_b = (x.astype(dtype) for x in (weight, w1_a, w1_b, w2_a, w2_b))
    sizes = {kind: layout.sizes(kind, weight.shape) for kind in "soik"}
    scale = jnp.asarray(scale, dtype).reshape(*sizes["s"], 1, 1)
    # [*stack, out, r²] and [*stack, r², in·prod(spatial)]
    ka, kb = khatri_rao_rows(w1_a, w2_a) * scale, khatri_rao_columns(w1_b, w2_b)
    squared = kb.shape[-2]
    # One letter for each axis of the kernel: contracted as stored, it needs no transposed copy.
    letters = string.ascii_lowercase[: weight.ndim]
    s, o, i, k = ("".join(letters[axis] for axis in layout.axes(kind)) for kind in "soik")
    if on_out:
        columns = kb.reshape(*sizes["s"], squared, *sizes["i"], *sizes["k"])
        # (W KBᵀ) ⊙ KA and (KA (KB KBᵀ)) ⊙ KA: [*stack, out, r²]
        both = jnp.einsum(f"{letters},{s}R{i}{k}->{s}{o}R", weight, columns).reshape(ka.shape) * ka
        own = jnp.einsum("...oR,...RS->...oS", ka, jnp.einsum("...Ri,...Si->...RS", kb, kb)) * ka
        added = jnp.sum(2 * both + own, -1)
    else:
        rows = ka.reshape(*sizes["s"], *sizes["o"], squared)
        # (KAᵀ W) ⊙ KB and ((KAᵀ KA) KB) ⊙ KB: [*stack, r², in·prod(spatial)]
        both = jnp.einsum(f"{s}{o}R,{letters}->{s}R{i}{k}", rows, weight).reshape(kb.shape) * kb
        own = jnp.einsum("...RS,...Si->...Ri", jnp.einsum("...oR,...oS->...RS", ka, ka), kb) * kb
        added = jnp.sum(2 * both + own, -2).reshape(*sizes["s"], math.prod(sizes["i"]), -1).sum(-1)
    squares = _squares(weight, layout, on_out)
    total = squares + added.reshape(squares.shape)
    positive = total > 0  # the square root has no gradient at 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, total, 1)), 0)


def gain(norms: Float[A, "*norms"], dora_scale: Float[A, "*norms"]) -> Float[A, "*norms"]:
    """Return the multiple of the rows (or columns) of W + ΔW, with the ε of LyCORIS."""
    eps = float(cast(float, jnp.finfo(norms.dtype).eps))
    return dora_scale.astype(norms.dtype) / (norms + eps)


def on_flat(
    gains: Float[Array, "*gains"], stack: int, spatial: Sequence[int]
) -> Float[Array, "*stack 1 columns"]:
    """Repeat gains `[*stack, 1, in, 1, ...]` for flat factors: columns = in·prod(spatial)."""
    return jnp.repeat(gains.reshape(*gains.shape[:stack], 1, -1), math.prod(spatial), -1)
