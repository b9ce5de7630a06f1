"""The tensors of each module in an adapted kernel, as every file format holds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from loha_jax.adapters import adapter_names, check_adapters
from loha_jax.plan import Target
from loha_jax.weight import LoHaWeight


@dataclasses.dataclass(frozen=True)
class ModuleFactors:
    """One module's share of an adapter.

    Attributes:
        index: of the module in the kernel's stack.
        name: torch module name.
        r, alpha: of the module.
        tensors: `hada_*` arrays in PEFT's shapes, without padding.
    """

    index: int
    name: str
    r: int
    alpha: float
    tensors: dict[str, np.ndarray]


def module_factors(leaf: LoHaWeight, adapter_name: str) -> Iterator[ModuleFactors]:
    """The modules of a kernel that the adapter targets."""
    factors = leaf.adapters[adapter_name]
    stack = leaf.layout.sizes("s", leaf.kernel.shape)
    tensors = {n: np.asarray(t).reshape(-1, *t.shape[len(stack) :]) for n, t in factors.tensors.items()}
    target = Target(
        (), leaf.names, leaf.layout, tuple(leaf.kernel.shape), None, factors.ranks, factors.alphas, factors.is_cp
    )
    for index, (name, r, alpha) in enumerate(zip(leaf.names, factors.ranks, factors.alphas, strict=True)):
        if r:
            own = {n: tensors[n][index][tuple(slice(size) for size in shape)] for n, shape in target.shapes(r).items()}
            yield ModuleFactors(index, name, r, alpha, own)


def chosen_adapter(params: Any, adapter_name: str | None) -> str:
    """The adapter of that name, or the tree's only one; ValueError where there is no such, or more than one."""
    if adapter_name is not None:
        check_adapters(params, [adapter_name])
        return adapter_name
    known = adapter_names(params)
    if len(known) != 1:
        raise ValueError(f"Say which adapter: the tree has {', '.join(known) or 'none'}.")
    return known[0]
