"""`from_tree`: an adapter of a tree as the `AdapterFile` that every format writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import PyTree

from loha_jax.runtime.processes import on_host
from loha_jax.tree.adapters import adapter_names, check_adapters
from loha_jax.tree.before_saving import check_whole
from loha_jax.tree.leaves import LoHaWeight, SavedWeight, leaves_by_path, leaves_of
from loha_jax.tree.plan import Target

from ..formats.adapter_file import AdapterFile, AdapterModule
from .row_transforms import with_torch_rows


def from_tree(
    params: PyTree, adapter_name: str, others: Callable[[PyTree, str], dict[str, np.ndarray]]
) -> AdapterFile:
    """Return an adapter of a tree; its config is left out, since each format has its own.

    Args:
        params: an adapted tree.
        adapter_name: which adapter.
        others: what the format holds besides the factors, of the two arguments above.
    """
    leaves = [leaf for _, leaf in adapted_kernels(params, adapter_name)]
    modules = {m.name: m for leaf in leaves for m in module_factors(leaf, adapter_name)}
    return AdapterFile(Path(), "tree", modules, others(params, adapter_name), {}, {})


def adapted_kernels(params: PyTree, adapter_name: str) -> list[tuple[tuple[str, ...], LoHaWeight]]:
    """Return the kernels that an adapter adapts, each with its path."""
    return [
        (path, leaf)
        for path, leaf in leaves_by_path(params)
        if isinstance(leaf, LoHaWeight) and adapter_name in leaf.adapters
    ]


def required_kernels(params: PyTree, adapter_name: str) -> list[tuple[tuple[str, ...], LoHaWeight]]:
    """Return `adapted_kernels`; ValueError where there are none."""
    if kernels := adapted_kernels(params, adapter_name):
        return kernels
    raise ValueError(f"Adapter {adapter_name} adapts no kernel of this tree.")


def adapted_modules(leaf: LoHaWeight, adapter_name: str) -> list[str]:
    """Return the names of the modules of a kernel that the adapter adapts."""
    ranks = leaf.adapters[adapter_name].ranks
    return [name for name, r in zip(leaf.names, ranks, strict=True) if r]


def adapted_names(params: PyTree, adapter_name: str) -> set[str]:
    """Return the names of all modules of a tree that the adapter adapts."""
    kernels = adapted_kernels(params, adapter_name)
    return {name for _, leaf in kernels for name in adapted_modules(leaf, adapter_name)}


def saved_leaves(params: PyTree, adapter_name: str) -> list[SavedWeight]:
    """Return the leaves that an adapter has a changed copy of."""
    return [leaf for leaf in leaves_of(SavedWeight, params) if adapter_name in leaf.copies]


def module_factors(leaf: LoHaWeight, adapter_name: str) -> Iterator[AdapterModule]:
    """Yield the modules of a kernel that the adapter targets, without the padding of a stack.

    Rank stabilisation is folded into alpha, and the scalar, if any, into `hada_w1_a`. Rows are
    torch's.
    """
    leaf.require_whole()
    factors, shape = leaf.adapters[adapter_name], tuple(leaf.kernel.shape)
    names, layout = leaf.names, leaf.layout
    own = factors.ranks, factors.alphas, factors.is_cp
    target = Target((), names, layout, shape, None, *own, leaf.rows)
    axes = len(target.stack)
    # [*stack, ...] -> [modules, ...]
    trained = {n: on_host(t).reshape(-1, *t.shape[axes:]) for n, t in factors.trained.items()}
    in_shape = target.module_shape[1:]
    for index, (name, r, alpha) in enumerate(zip(names, target.ranks, target.alphas, strict=True)):
        if not r:
            continue
        own = {
            part: trained[part][index][tuple(map(slice, size))]
            for part, size in target.shapes(r).items()
        }
        if "scalar" in trained:
            scalar = trained["scalar"][index].astype(own["hada_w1_a"].dtype)
            own["hada_w1_a"] = own["hada_w1_a"] * scalar
        norms = trained["dora_scale"][index] if "dora_scale" in trained else None
        spatial = in_shape if len(in_shape) > 1 else None
        module = AdapterModule(name, "loha", r, alpha, own, norms, in_shape=spatial)
        yield with_torch_rows(module, target)


def chosen_adapter(params: PyTree, adapter_name: str | None) -> str:
    """Return `adapter_name`, or the name of the tree's only adapter.

    Raises:
        ValueError: the tree has no such adapter, or several and none is named, or is one half of
            `partition`.
    """
    check_whole(params)
    if adapter_name is not None:
        check_adapters(params, [adapter_name])
        return adapter_name
    known = adapter_names(params)
    if not known:
        raise ValueError(
            "This tree has no adapter to save. Call `loha_jax.inject(params, config, key=...)` "
            "first."
        )
    first, *others = known
    if others:
        raise ValueError(f"Say which adapter: the tree has {', '.join(known)}.")
    return first
