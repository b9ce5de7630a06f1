"""Each row of a batch through its own adapter: several LoHa adapters of one model in one call."""

# JAX's own functions are only partly typed.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.core
import jax.numpy as jnp
from jax.typing import ArrayLike

from loha_jax.runtime.promotion import standard_promotion
from loha_jax.transform.arguments import TreeDef, flatten
from loha_jax.transform.rows import Rows, spread
from loha_jax.tree.factors import Factors
from loha_jax.tree.leaves import LoHaWeight, SavedWeight, is_adapted

_ROW = "row"
R = TypeVar("R")

RowAdapter = dict[str, jax.Array] | jax.Array | None
"""The arrays of one row's adapter of a kernel (None without one), or its copy of a saved weight."""


def check_index(adapter_index: ArrayLike | Sequence[int]) -> jax.Array:
    """Return `adapter_index` as an array, `[batch]`.

    Raises:
        ValueError: it is not a vector of integers.
    """
    index = jnp.asarray(adapter_index)
    if index.ndim != 1 or not (jnp.issubdtype(index.dtype, jnp.integer) or not index.size):
        raise ValueError(
            f"adapter_index is one integer per row of the batch, got {index.dtype} of shape "
            f"{index.shape}"
        )
    return index.astype(jnp.int32)


def run_per_example(
    run: Callable[[tuple[object, ...], dict[str, object]], R],
    args: tuple[object, ...],
    kwargs: dict[str, object],
    index: jax.Array,
    out_axes: object,
) -> R:
    """Call `run(args, kwargs)` for every row, vectorised, with the row's adapter as the only one.

    Args:
        run: applies the model to arguments with one active adapter; its products are factored.
        args, kwargs: of the model, with `Rows` where arrays have rows.
        index: integers `[batch]`.
        out_axes: the axis of each result along which rows are joined, as a prefix of its tree.

    Raises:
        ValueError: no adapter is active, the index is out of range, the adapters differ in shape,
            or `out_axes` does not fit the results.
    """
    leaves, treedef = flatten((args, kwargs), is_leaf=is_adapted)
    adapted = {n: leaf for n, leaf in enumerate(leaves) if is_adapted(leaf)}
    count = max((len(leaf.active) for leaf in adapted.values()), default=0)
    if not count:
        raise ValueError("adapter_index chooses among active adapters, and the arguments hold none")
    if bad := [i for i in _known(index) if not -1 <= i < count]:
        raise ValueError(
            f"adapter_index {bad[0]} is out of range: the tree has {count} active adapters (0 to "
            f"{count - 1}), and -1 stands for the base model"
        )

    chosen = {n: _choose(leaf, index) for n, leaf in adapted.items()}
    marked = {n: leaf for n, leaf in enumerate(leaves) if isinstance(leaf, Rows)}
    rows = {n: leaf.array for n, leaf in marked.items()}
    axes = {n: leaf.axis for n, leaf in marked.items()}
    structures: list[TreeDef] = []

    def one(chosen: dict[int, RowAdapter], rows: dict[int, jax.Array]) -> list[jax.Array]:
        filled = list(leaves)
        for n, leaf in adapted.items():
            filled[n] = _with_row(leaf, chosen[n])
        for n, row in rows.items():
            filled[n] = jnp.expand_dims(row, axes[n])
        outputs, structure = flatten(run(*treedef.unflatten(filled)))
        structures.append(structure)
        return outputs

    outputs = jax.vmap(one, in_axes=(0, axes))(chosen, rows)
    structure = structures[0]
    places = spread(out_axes, structure.unflatten(outputs), "out_axes")
    return structure.unflatten([_joined(o, axis) for o, axis in zip(outputs, places, strict=True)])


def _known(index: jax.Array) -> list[int]:
    """Return the integers of an array; none of one that is traced."""
    return [] if isinstance(index, jax.core.Tracer) else index.tolist()


def _joined(outputs: jax.Array, axis: int | None) -> jax.Array:
    """Return batches of one, `[batch, ...]`, as one batch along an axis; scalars as one per row."""
    if outputs.ndim == 1:
        return outputs
    if axis is None or not 1 - outputs.ndim <= axis < outputs.ndim - 1:
        raise ValueError(
            f"out_axes says {axis} for a result of shape {outputs.shape[1:]} of one row"
        )
    axis %= outputs.ndim - 1
    moved = jnp.moveaxis(outputs, 0, axis)  # [..., batch, own, ...] -> [..., batch·own, ...]
    batch, own, *rest = moved.shape[axis:]
    return moved.reshape(*moved.shape[:axis], batch * own, *rest)


@standard_promotion()
def _choose(leaf: LoHaWeight | SavedWeight, index: jax.Array) -> RowAdapter:
    """Return the factors, or the trained copy, of each row's adapter, `[batch, ...]`."""
    if isinstance(leaf, SavedWeight):
        copies = jnp.stack(
            [*(leaf.copies.get(name, leaf.original) for name in leaf.active), leaf.original]
        )
        return _take(copies, index)
    held = leaf.active_adapters
    if not held:
        return None
    shapes = [{name: w.shape for name, w in f.trained.items()} for f in held]
    if any(s != shapes[0] for s in shapes):
        names = [name for name in leaf.active if name in leaf.adapters]
        listed = "; ".join(f"{name}: {s}" for name, s in zip(names, shapes, strict=True))
        raise ValueError(
            f"The adapters of {leaf.names[0]} differ in shape, so they cannot share a batch: "
            f"{listed}"
        )

    def stacked(*values: jax.Array) -> jax.Array:
        present = iter(values)
        zeros = jnp.zeros_like(values[0])
        rows = [next(present) if name in leaf.adapters else zeros for name in leaf.active]
        return _take(jnp.stack([*rows, zeros]), index)

    return jax.tree.map(stacked, *_arrays_of(held))


def _scalings_differ(held: Sequence[Factors]) -> bool:
    return len({(f.ranks, f.alphas, f.multiplier, f.parts) for f in held}) > 1 or bool(
        held[0].untrained
    )


def _arrays_of(held: Sequence[Factors]) -> list[dict[str, jax.Array]]:
    """Return the arrays of adapters of one shape, with their scaling as an array where it differs.

    A weight decomposition always has its strength as an array, because that of the base model is 0.
    """
    differ, result = _scalings_differ(held), list[dict[str, jax.Array]]()
    for f in held:
        arrays = f.trained
        if f.dora_scale is not None:
            arrays["gate"] = f.strength
            if differ:
                scaling = f.scaling[..., None, None]
                arrays["hada_w1_a"] = f.hada_w1_a.astype(scaling.dtype) * scaling
        elif differ:
            arrays["gate"] = f.scaling
        result.append(arrays)
    return result


def _take(table: jax.Array, index: jax.Array) -> jax.Array:
    """Return rows of a table by index: -1 is the last one, and NaN stands for one out of range."""
    size = table.shape[0]
    rows = jnp.where(
        index == -1, size - 1, jnp.where((index >= 0) & (index < size - 1), index, size)
    )
    return jnp.take(table, rows, axis=0, mode="fill")


def _with_row(leaf: LoHaWeight | SavedWeight, chosen: RowAdapter) -> object:
    """Return the leaf with the adapter of one row."""
    if isinstance(leaf, SavedWeight):
        return chosen
    if not isinstance(chosen, dict):
        return dataclasses.replace(leaf, active=())
    held = leaf.active_adapters
    if _scalings_differ(held) or "gate" in chosen:
        # One rank for all modules of a stack, and the alpha/r of those that are adapted.
        r = max(held[0].ranks)
        ranks = (r,) * len(held[0].ranks)
        ratios = [a / n for a, n in zip(held[0].alphas, held[0].ranks, strict=True) if n]
        alphas = ranks if _scalings_differ(held) or not ratios else (ratios[0] * r,) * len(ranks)
        new = dataclasses.replace(
            held[0],
            **chosen,
            ranks=ranks,
            alphas=alphas,
            multiplier=1.0,
            module_index=None,
            parts=(),
        )
    else:
        new = dataclasses.replace(held[0], **chosen)
    return dataclasses.replace(leaf, adapters={_ROW: new}, active=(_ROW,))
