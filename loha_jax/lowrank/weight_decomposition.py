"""Weight decomposition (DoRA): the norms of W + ΔW, from the factors, without forming ΔW.

With ΔW = KA @ KB (Khatri-Rao factors of inner size r²), ‖W + ΔW‖² of a row is ‖W‖² + 2 Σ (W KBᵀ) ⊙ KA +
Σ (KA KB KBᵀ) ⊙ KA: products with r² columns. The gradient flows through the norm, as in LyCORIS (PEFT's DoRA, for LoRA,
takes it for a constant).

Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024 (arXiv:2402.09353), and LyCORIS'
`LohaModule.apply_weight_decompose`.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from loha_jax.lowrank.hadamard import float32_or_wider, khatri_rao_columns, khatri_rao_rows
from loha_jax.lowrank.layout import Layout


def is_on_out(dora_shape: Sequence[int], kernel_shape: Sequence[int], stack: int) -> bool:
    """Whether norms of this shape belong to out features (else to in features), as a file's shape alone shows.

    Args:
        dora_shape: `[*stack, out, 1, ...]` or `[*stack, 1, in, 1, ...]`.
        kernel_shape: `[*stack, out, in, *spatial]`.
        stack: number of stack axes.
    """
    return dora_shape[stack] == kernel_shape[stack] and dora_shape[stack + 1] == 1


def weight_norms(kernel: jax.Array, layout: Layout, on_out: bool) -> jax.Array:
    """‖W‖ per out or per in feature: what `dora_scale` starts at.

    Args:
        kernel: as its layout says.
        layout: of the kernel.
        on_out: which.

    Returns:
        `[*stack, out, 1, ...]` or `[*stack, 1, in, 1, ...]`, in float32 or wider.
    """
    return jnp.sqrt(_squares(kernel.astype(float32_or_wider(kernel.dtype)), layout, on_out))


def _squares(kernel: jax.Array, layout: Layout, on_out: bool) -> jax.Array:
    """Sums of the squares, in the shape of norms. The kernel is not transposed, which would copy it."""
    summed = layout.axes("i" if on_out else "o") + layout.axes("k")
    sums = jnp.sum(kernel**2, summed, keepdims=True)
    return layout.unfold(sums)


def adapted_norms(
    kernel: jax.Array, layout: Layout, w1_a: Any, w1_b: Any, w2_a: Any, w2_b: Any, scale: Any, *, on_out: bool
) -> jax.Array:
    """‖W + ΔW‖ per out or per in feature, differentiable in the factors and the scale.

    Where the norm is less than a thousandth of W's, ΔW nearly cancels W, and what is left of the difference of squares
    has few right digits.

    Args:
        kernel: as its layout says.
        layout: of the kernel.
        w1_a, w2_a: `[*stack, out, r]`.
        w1_b, w2_b: `[*stack, r, in·prod(spatial)]`.
        scale: `[*stack]`.
        on_out: which.

    Returns:
        As `weight_norms`.
    """
    dtype = float32_or_wider(kernel.dtype, w1_a.dtype)
    kernel, w1_a, w1_b, w2_a, w2_b = (x.astype(dtype) for x in (kernel, w1_a, w1_b, w2_a, w2_b))
    sizes = {kind: layout.sizes(kind, kernel.shape) for kind in "soik"}
    scale = jnp.asarray(scale, dtype).reshape(*sizes["s"], 1, 1)
    ka, kb = khatri_rao_rows(w1_a, w2_a) * scale, khatri_rao_columns(w1_b, w2_b)
    squared = kb.shape[-2]
    # One letter for each axis of the kernel, so that it is contracted as it lies.
    letters = string.ascii_lowercase[: kernel.ndim]
    s, o, i, k = ("".join(letters[axis] for axis in layout.axes(kind)) for kind in "soik")
    if on_out:
        columns = kb.reshape(*sizes["s"], squared, *sizes["i"], *sizes["k"])
        both = jnp.einsum(f"{letters},{s}R{i}{k}->{s}{o}R", kernel, columns).reshape(ka.shape) * ka
        own = jnp.einsum("...oR,...RS->...oS", ka, jnp.einsum("...Ri,...Si->...RS", kb, kb)) * ka
        added = jnp.sum(2 * both + own, -1)
    else:
        rows = ka.reshape(*sizes["s"], *sizes["o"], squared)
        both = jnp.einsum(f"{s}{o}R,{letters}->{s}R{i}{k}", rows, kernel).reshape(kb.shape) * kb
        own = jnp.einsum("...RS,...Si->...Ri", jnp.einsum("...oR,...oS->...RS", ka, ka), kb) * kb
        added = jnp.sum(2 * both + own, -2).reshape(*sizes["s"], math.prod(sizes["i"]), -1).sum(-1)
    squares = _squares(kernel, layout, on_out)
    total = squares + added.reshape(squares.shape)
    positive = total > 0  # the square root has no gradient at 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, total, 1)), 0)


def gain(norms: jax.Array, dora_scale: Any) -> jax.Array:
    """What the rows (or columns) of W + ΔW are multiplied by; LyCORIS adds the same ε to the norm."""
    return dora_scale.astype(norms.dtype) / (norms + float(jnp.finfo(norms.dtype).eps))


def on_flat(gains: jax.Array, stack: int, spatial: Sequence[int]) -> jax.Array:
    """`[*stack, 1, in, 1, ...]` repeated for the columns of flat factors: `[*stack, 1, in·prod(spatial)]`."""
    return jnp.repeat(gains.reshape(*gains.shape[:stack], 1, -1), math.prod(spatial), -1)
