"""`from_tree`: an adapter of a tree as the `AdapterFile` that every format writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree

from loha_jax.runtime.processes import on_host
from loha_jax.targets.module_names import path_parts
from loha_jax.tree.adapters import adapter_names, check_adapters
from loha_jax.tree.before_saving import check_whole
from loha_jax.tree.leaves import LoHaWeight, is_adapted
from loha_jax.tree.plan import Target

from ..formats.adapter_file import AdapterFile, AdapterModule
from .saved_modules import saved_tensors


def from_tree(
    params: PyTree,
    adapter_name: str,
    others: Callable[[PyTree, str], dict[str, np.ndarray]] = saved_tensors,
) -> AdapterFile:
    """Return an adapter of a tree; its config is left out, since each format has its own.

    Args:
        params: an adapted tree.
        adapter_name: which adapter.
        others: what the format holds besides the factors, of the two arguments above.
    """
    leaves = [leaf for _, leaf in adapted_kernels(params, adapter_name)]
    modules = {
        module.name: module for leaf in leaves for module in module_factors(leaf, adapter_name)
    }
    return AdapterFile(Path(), "tree", modules, others(params, adapter_name), {}, {})


def adapted_kernels(params: PyTree, adapter_name: str) -> list[tuple[tuple[str, ...], LoHaWeight]]:
    """Return the kernels that an adapter adapts, each with its path."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_adapted)
    return [
        (path_parts(path), leaf)
        for path, leaf in flat
        if isinstance(leaf, LoHaWeight) and adapter_name in leaf.adapters
    ]


def module_factors(leaf: LoHaWeight, adapter_name: str) -> Iterator[AdapterModule]:
    """Yield the modules of a kernel that the adapter targets, without the padding of a stack.

    Rank stabilisation is folded into alpha, and the scalar, if any, into `hada_w1_a`.
    """
    leaf.require_whole()
    factors = leaf.adapters[adapter_name]
    stack = leaf.layout.sizes("s", leaf.kernel.shape)
    trained = {
        n: on_host(t).reshape(-1, *t.shape[len(stack) :]) for n, t in factors.trained.items()
    }
    target = Target(
        (),
        leaf.names,
        leaf.layout,
        tuple(leaf.kernel.shape),
        None,
        factors.ranks,
        factors.alphas,
        factors.is_cp,
    )
    in_shape = leaf.layout.torch_shape(leaf.kernel.shape)[len(stack) + 1 :]
    for index, (name, r, alpha) in enumerate(
        zip(leaf.names, factors.ranks, factors.alphas, strict=True)
    ):
        if r:
            own = {
                n: trained[n][index][tuple(slice(size) for size in shape)]
                for n, shape in target.shapes(r).items()
            }
            if "scalar" in trained:
                own["hada_w1_a"] = own["hada_w1_a"] * trained["scalar"][index].astype(
                    own["hada_w1_a"].dtype
                )
            dora_scale = trained["dora_scale"][index] if "dora_scale" in trained else None
            yield AdapterModule(
                name,
                "loha",
                r,
                alpha,
                own,
                dora_scale,
                in_shape=in_shape if len(in_shape) > 1 else None,
            )


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
    if len(known) != 1:
        raise ValueError(f"Say which adapter: the tree has {', '.join(known) or 'none'}.")
    return known[0]
