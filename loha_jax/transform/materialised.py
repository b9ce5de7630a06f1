"""Arrays made from a view: W + ΔW as a whole, or the rows of ΔW that an embedding lookup reads."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from loha_jax.lowrank.hadamard import float32_or_wider, hada_weight
from loha_jax.transform.decomposed_base import gain_along, has_gain
from loha_jax.transform.kernel_view import KernelView
from loha_jax.transform.packed_kernel import plain


def dense_kernel(view: KernelView, *, forward_mode: bool) -> jax.Array:
    """Return W + ΔW in W's dtype, added in float32 or wider.

    Args:
        view: the kernel.
        forward_mode: plain products that `jax.jvp` can differentiate.
    """
    base = plain(view.kernel)
    if not view.factors:
        return base
    size = [atom.size for atom in view.atoms]
    kind = [atom.kind for atom in view.atoms]
    present = [n for axis in view.dims for n in axis]
    # ΔW is made in the orientation of the view, to be transposed as little as possible.
    in_first = [kind[n] for n in present if kind[n] in "io"][:1] == ["i"]
    atoms = [
        n for side in ("sio" if in_first else "soi") for n in view.of_side(side) if size[n] > 1
    ]
    total = None
    for f in view.factors:
        f = f.flat().astype(f.dtype)
        a1, b1, a2, b2 = f.w1_a, f.w1_b, f.w2_a, f.w2_b
        if in_first:
            a1, b1, a2, b2 = (jnp.swapaxes(w, -1, -2) for w in (b1, a1, b2, a2))
        delta = hada_weight(a1, b1, a2, b2, f.scaling, forward_mode=forward_mode)
        total = delta if total is None else total + delta
    assert total is not None
    # [*stack, out, in] -> one axis per atom, as the factors flatten
    total = total.reshape([size[n] for n in atoms])
    # -> in the order of the view; broadcast atoms are not in the factors
    total = jnp.transpose(total, [atoms.index(n) for n in present if kind[n] != "b"])
    total = total.reshape([1 if kind[n] == "b" else size[n] for n in present])
    # -> [*axes of the view]
    total = jnp.broadcast_to(total, [size[n] for n in present]).reshape(view.shape)
    wide = float32_or_wider(base.dtype, total.dtype)
    kernel = base.astype(wide)
    for side in "oi":
        if (gain := gain_along(view, side)) is not None:
            total = total + gain.astype(wide) * kernel
    return (kernel + total.astype(wide)).astype(base.dtype)


def update_rows(
    view: KernelView, axis: int, gather: Callable[[jax.Array], jax.Array], *, forward_mode: bool
) -> jax.Array | None:
    """Return ΔW at some positions of one in or out axis; only the rows that are read are computed.

    Args:
        view: the kernel.
        axis: of the view.
        gather: takes those positions from axis 0 of a matrix: `[n, r]` to `[*positions, r]`.
        forward_mode: plain products that `jax.jvp` can differentiate.

    Returns:
        `[*positions, *other axes]`, or None where the view has stack axes or the axis is not all of
        the in or out axes.
    """
    plain = not (view.of_kind("s") or view.of_kind("b") or view.of_kind("k") or has_gain(view))
    if not plain or len(view.dims[axis]) != 1:
        return None
    size = [atom.size for atom in view.atoms]
    (atom,) = view.dims[axis]
    kind = view.atoms[atom].kind
    if any(size[n] > 1 for n in view.of_kind(kind) if n != atom):
        return None
    others = [n for n in view.of_kind("i" if kind == "o" else "o") if size[n] > 1]
    total, positions = None, ()
    for f in view.factors:
        tables, whole = (f.w1_a, f.w2_a), (f.w1_b, f.w2_b)
        if kind == "i":
            tables, whole = tuple(x.T for x in whole), tuple(x.T for x in tables)
        rows = [gather(table) for table in tables]  # [*positions, r]
        positions = rows[0].shape[:-1]
        flat = [row.reshape(-1, row.shape[-1]) for row in rows]  # [prod(positions), r]
        delta = hada_weight(
            flat[0], whole[0], flat[1], whole[1], f.scaling, forward_mode=forward_mode
        )
        total = delta if total is None else total + delta
    assert total is not None
    # [prod(positions), others as they flatten] -> [prod(positions), others as the view has them]
    total = total.reshape(-1, *(size[n] for n in others))
    rest = [atoms for n, atoms in enumerate(view.dims) if n != axis]
    total = jnp.transpose(total, [0, *(1 + others.index(n) for atoms in rest for n in atoms)])
    return total.reshape(*positions, *(size for n, size in enumerate(view.shape) if n != axis))
