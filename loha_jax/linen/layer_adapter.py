"""The adapter of one layer: what it adapts, its leaf of a tree, and FedPara's weight."""

from __future__ import annotations

from collections.abc import Mapping

import jax

from loha_jax.targets.config import LoHaConfig
from loha_jax.tree.leaves import LoHaWeight
from loha_jax.tree.plan import Target


def loha_weight(
    target: Target,
    config: LoHaConfig,
    kernel: jax.Array,
    tensors: Mapping[str, jax.Array],
    adapter_name: str,
) -> LoHaWeight:
    """Return the kernel with its factors as a leaf of a tree."""
    adapters = {adapter_name: target.factors(tensors, config)}
    return LoHaWeight(kernel, adapters, target.layout, target.names, (adapter_name,), target.rows)


def product(
    target: Target,
    config: LoHaConfig,
    tensors: Mapping[str, jax.Array],
    forward_mode: bool = False,
) -> jax.Array:
    """Return FedPara's weight, in the kernel's shape and dtype."""
    delta = target.factors(tensors, config).delta(forward_mode=forward_mode)
    return target.layout.fold(delta, target.shape).astype(target.dtype)
