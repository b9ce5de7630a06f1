"""The tensors of each module in an adapted kernel, as every file format holds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from loha_jax.interop.formats.adapter_file import AdapterModule

from loha_jax.runtime.processes import on_host
from loha_jax.tree.adapters import adapter_names, check_adapters
from loha_jax.tree.before_saving import check_whole
from loha_jax.tree.inject import factor_dtype
from loha_jax.tree.leaves import LoHaWeight
from loha_jax.tree.plan import Target


def module_factors(leaf: LoHaWeight, adapter_name: str) -> Iterator[AdapterModule]:
    """The modules of a kernel that the adapter targets, without the padding of a stack.

    Rank stabilisation is folded into alpha, and the scalar, if any, into `hada_w1_a`.
    """
    leaf.require_whole()
    factors = leaf.adapters[adapter_name]
    stack = leaf.layout.sizes("s", leaf.kernel.shape)
    trained = {n: on_host(t).reshape(-1, *t.shape[len(stack) :]) for n, t in factors.trained.items()}
    target = Target(
        (), leaf.names, leaf.layout, tuple(leaf.kernel.shape), None, factors.ranks, factors.alphas, factors.is_cp
    )
    for index, (name, r, alpha) in enumerate(zip(leaf.names, factors.ranks, factors.alphas, strict=True)):
        if r:
            own = {n: trained[n][index][tuple(slice(size) for size in shape)] for n, shape in target.shapes(r).items()}
            if "scalar" in trained:
                own["hada_w1_a"] = own["hada_w1_a"] * trained["scalar"][index].astype(own["hada_w1_a"].dtype)
            dora_scale = trained["dora_scale"][index] if "dora_scale" in trained else None
            yield AdapterModule(name, "loha", r, alpha, own, dora_scale)


def stack_dora_scales(target: Target, modules: Mapping[str, AdapterModule]) -> dict[str, jax.Array]:
    """The norms of a kernel's weight decomposition, `{"dora_scale": [*stack, …]}`; {} where it has none.

    Args:
        target: the kernel.
        modules: of an adapter file, by torch name.
    """
    given = [modules[name].dora_scale if name in modules else None for name in target.names]
    first = next((scale for scale in given if scale is not None), None)
    if first is None:
        return {}
    stacked = np.stack([np.zeros(first.shape, first.dtype) if scale is None else scale for scale in given])
    return {"dora_scale": jnp.asarray(stacked.reshape(*target.stack, *first.shape), factor_dtype(target.dtype))}


def chosen_adapter(params: Any, adapter_name: str | None) -> str:
    """The adapter of that name, or the tree's only one; ValueError where there is no such, or more than one.

    ValueError also for one half of `partition`: all that is written of a tree is chosen here.
    """
    check_whole(params)
    if adapter_name is not None:
        check_adapters(params, [adapter_name])
        return adapter_name
    known = adapter_names(params)
    if len(known) != 1:
        raise ValueError(f"Say which adapter: the tree has {', '.join(known) or 'none'}.")
    return known[0]
