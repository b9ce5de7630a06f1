"""Weight decomposition (DoRA): the norms of W + ΔW, from the factors, without forming ΔW.

With ΔW = KA @ KB (Khatri-Rao factors of inner size r²), ‖W + ΔW‖² of a row is ‖W‖² + 2 Σ (W KBᵀ) ⊙ KA +
Σ (KA KB KBᵀ) ⊙ KA: products with r² columns. The gradient flows through the norm, as in LyCORIS (PEFT's DoRA, for LoRA,
takes it for a constant).

Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024 (arXiv:2402.09353), and LyCORIS'
`LohaModule.apply_weight_decompose`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from loha_jax.hadamard import float32_or_wider, khatri_rao_columns, khatri_rao_rows


def is_on_out(dora_shape: Sequence[int], kernel_shape: Sequence[int], stack: int) -> bool:
    """Whether norms of this shape belong to out features (else to in features), as a file's shape alone shows.

    Args:
        dora_shape: `[*stack, out, 1, ...]` or `[*stack, 1, in, 1, ...]`.
        kernel_shape: `[*stack, out, in, *spatial]`.
        stack: number of stack axes.
    """
    return dora_shape[stack] == kernel_shape[stack] and dora_shape[stack + 1] == 1


def weight_norms(kernel: jax.Array, on_out: bool, stack: int) -> jax.Array:
    """‖W‖ per out or per in feature: what `dora_scale` starts at.

    Args:
        kernel: `[*stack, out, in, *spatial]`.
        on_out: which.
        stack: number of stack axes.

    Returns:
        `[*stack, out, 1, ...]` or `[*stack, 1, in, 1, ...]`, in float32 or wider.
    """
    kernel = kernel.astype(float32_or_wider(kernel.dtype))
    return jnp.sqrt(jnp.sum(kernel**2, _summed(kernel, on_out, stack), keepdims=True))


def _summed(kernel: jax.Array, on_out: bool, stack: int) -> tuple[int, ...]:
    kept = stack if on_out else stack + 1
    return tuple(axis for axis in range(stack, kernel.ndim) if axis != kept)


def adapted_norms(
    kernel: jax.Array, w1_a: Any, w1_b: Any, w2_a: Any, w2_b: Any, scale: Any, *, on_out: bool
) -> jax.Array:
    """‖W + ΔW‖ per out or per in feature, differentiable in the factors and the scale.

    Where the norm is less than a thousandth of W's, ΔW nearly cancels W, and what is left of the difference of squares
    has few right digits.

    Args:
        kernel: `[*stack, out, in, *spatial]`.
        w1_a, w2_a: `[*stack, out, r]`.
        w1_b, w2_b: `[*stack, r, in·prod(spatial)]`.
        scale: `[*stack]`.
        on_out: which.

    Returns:
        As `weight_norms`.
    """
    stack = jnp.ndim(w1_a) - 2
    dtype = float32_or_wider(kernel.dtype, w1_a.dtype)
    kernel, w1_a, w1_b, w2_a, w2_b = (x.astype(dtype) for x in (kernel, w1_a, w1_b, w2_a, w2_b))
    scale = jnp.asarray(scale, dtype).reshape(*kernel.shape[:stack], 1, 1)
    ka, kb = khatri_rao_rows(w1_a, w2_a) * scale, khatri_rao_columns(w1_b, w2_b)
    matrix = kernel.reshape(*kernel.shape[:stack], kernel.shape[stack], -1)
    if on_out:
        both = jnp.einsum("...oi,...Ri->...oR", matrix, kb) * ka
        own = jnp.einsum("...oR,...RS->...oS", ka, jnp.einsum("...Ri,...Si->...RS", kb, kb)) * ka
        added = jnp.sum(2 * both + own, -1)
    else:
        both = jnp.einsum("...oR,...oi->...Ri", ka, matrix) * kb
        own = jnp.einsum("...RS,...Si->...Ri", jnp.einsum("...oR,...oS->...RS", ka, ka), kb) * kb
        added = jnp.sum(2 * both + own, -2).reshape(*kernel.shape[:stack], kernel.shape[stack + 1], -1).sum(-1)
    squares = jnp.sum(kernel**2, _summed(kernel, on_out, stack), keepdims=True)
    total = squares + added.reshape(squares.shape)
    positive = total > 0  # the square root has no gradient at 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, total, 1)), 0)


def gain(norms: jax.Array, dora_scale: Any) -> jax.Array:
    """What the rows (or columns) of W + ΔW are multiplied by; LyCORIS adds the same ε to the norm."""
    return dora_scale.astype(norms.dtype) / (norms + float(jnp.finfo(norms.dtype).eps))


def on_flat(gains: jax.Array, stack: int, spatial: Sequence[int]) -> jax.Array:
    """`[*stack, 1, in, 1, ...]` repeated for the columns of flat factors: `[*stack, 1, in·prod(spatial)]`."""
    return jnp.repeat(gains.reshape(*gains.shape[:stack], 1, -1), math.prod(spatial), -1)
