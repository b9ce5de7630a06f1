"""`as_lora`: an adapter as a LoRA in the model's own layout, under `jax.jit` too."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from loha_jax.lowrank.layout import Layout
from loha_jax.lowrank.truncated_svd import precise_product
from loha_jax.runtime.promotion import standard_promotion
from loha_jax.tree.containers import takes_model
from loha_jax.tree.factors import Factors
from loha_jax.tree.leaves import LoHaWeight

from ..updates.lora_conversion import check_limits
from .from_tree import chosen_adapter, required_kernels, saved_leaves


class _Pair(NamedTuple):
    """KA and KB with ΔW = KA @ KB, the scale included."""

    left: Float[Array, "*stack out k"]
    right: Float[Array, "*stack k in"]


@takes_model(changes=False)
def as_lora(
    params: PyTree, adapter_name: str | None = None, *, rank: int | None = None
) -> dict[str, Any]:
    """Return an adapter as LoRA arrays: exact, of rank r², or the best ones of a smaller rank.

    It is for rollouts and exporters that know only LoRA, and works under `jax.jit`. The scale is in
    the arrays: their scaling is 1. For files see `save_lora`.

    Args:
        params: an adapted tree, or an NNX model.
        adapter_name: which adapter; may be left out where the tree has only one.
        rank: at most this rank, by an SVD of matrices of r² rows. ΔW is not materialised.

    Returns:
        Nested dicts, whose keys are the tree's as strings ("0" for the first item of a list). For a
        kernel `w` they hold `w_lora_a` `[*in, k]` and `w_lora_b` `[k, *out]`, with the kernel's own
        axes of each kind, in float32 or wider. Axes of a stack are where the kernel has them: of
        MaxText's `[in, layers, out]` they are `[in, layers, k]` and `[k, layers, out]`. The product
        over k is ΔW, from inputs to outputs; k is r² where no smaller rank was asked for.

    Raises:
        ValueError: no such adapter, or several and none is named; rank is no positive integer; or
            an adapted kernel is a convolution or has a weight decomposition, or the adapter has
            `modules_to_save`.

    Named as the arrays of qwix' and tunix' LoRA are.

    Example:
        >>> import loha_jax
        >>> config = loha_jax.LoHaConfig(r=2, target_modules=["q"], init_weights=False)
        >>> base = {"q": {"kernel": jnp.ones((6, 5))}}
        >>> params = loha_jax.inject(base, config, key=jax.random.key(0))
        >>> jax.tree.map(jnp.shape, as_lora(params))
        {'q': {'kernel_lora_a': (6, 4), 'kernel_lora_b': (4, 5)}}
    """
    name = chosen_adapter(params, adapter_name)
    check_limits(rank, None)
    if saved := [leaf.name for leaf in saved_leaves(params, name)]:
        raise ValueError(
            f"The adapter {name} also has trained copies of {', '.join(saved)} (modules_to_save), "
            "which no LoRA holds: hand them over beside it, or `merge` the adapter"
        )
    result: dict[str, Any] = {}
    for path, leaf in required_kernels(params, name):
        _check(leaf, name)
        pair = _pair(leaf.adapters[name])
        pair = pair if rank is None or rank >= pair.left.shape[-1] else _best(pair, rank)
        node = result
        for part in path[:-1]:
            node = node.setdefault(part, {})
        a, b = _folded(pair, leaf.layout.strip(leaf.kernel.ndim), leaf.kernel.shape)
        node |= {f"{path[-1]}_lora_a": a, f"{path[-1]}_lora_b": b}
    return result


def _check(leaf: LoHaWeight, name: str) -> None:
    """Raise ValueError for what is no LoRA of a linear layer."""
    what = "is a convolution" if leaf.layout.axes("k") else None
    if leaf.adapters[name].dora_scale is not None:
        what = "has a weight decomposition"
    if what:
        raise ValueError(
            f"{leaf.label} {what}, of which `as_lora` makes no LoRA: write it with "
            "`save_lora`, or merge the adapter"
        )


@standard_promotion()
def _pair(factors: Factors) -> _Pair:
    left, right = factors.khatri_rao()
    return _Pair(left * factors.scale[..., None, None], right)


@standard_promotion()
def _best(pair: _Pair, rank: int) -> _Pair:
    """Return the best approximation of a rank: the SVD of the triangles of two QR decompositions.

    Both sides get the root of the singular values.
    """
    left, left_triangle = jnp.linalg.qr(pair.left)  # [*stack, out, m], [*stack, m, k]
    right, right_triangle = jnp.linalg.qr(jnp.swapaxes(pair.right, -1, -2))
    core = precise_product(left_triangle, jnp.swapaxes(right_triangle, -1, -2))  # [*stack, m, n]
    u, s, vt = jnp.linalg.svd(core, full_matrices=False)
    root = jnp.sqrt(s[..., :rank])
    kept = precise_product(left, u[..., :rank] * root[..., None, :])
    others = precise_product(vt[..., :rank, :], jnp.swapaxes(right, -1, -2))
    return _Pair(kept, root[..., :, None] * others)


def _folded(pair: _Pair, layout: Layout, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Return both matrices with the kernel's own in and out axes, and its stack where it is."""
    stack, k = layout.sizes("s", shape), pair.left.shape[-1]
    a = jnp.swapaxes(pair.right, -1, -2).reshape(*stack, *layout.sizes("i", shape), k)
    b = jnp.swapaxes(pair.left, -1, -2).reshape(*stack, k, *layout.sizes("o", shape))
    a = _in_kernel_order(layout.axes("i"), len(stack), a)
    b = _in_kernel_order(layout.axes("o"), len(stack) + 1, b)
    return _stacked_as(layout, a), _stacked_as(layout, b)


def _in_kernel_order(axes: tuple[int, ...], first: int, array: jax.Array) -> jax.Array:
    """Return an array with the axes from `first` on, which are in flattening order, as in a kernel.

    `axes` are their places in the kernel; a layout with indices gives them in another order.
    """
    places = [first + sorted(axes).index(axis) for axis in axes]
    return jnp.moveaxis(array, range(first, first + len(axes)), places)


def _stacked_as(layout: Layout, array: jax.Array) -> jax.Array:
    """Return an array whose leading axes are a kernel's stack, with these at the kernel's places.

    A place behind the array's last axis, of a stack at the end of a larger kernel, is the last one.
    """
    stack = layout.axes("s")
    first_last = array.ndim - len(stack)
    places = [min(axis, first_last + sorted(stack).index(axis)) for axis in stack]
    return jnp.moveaxis(array, range(len(stack)), places)
