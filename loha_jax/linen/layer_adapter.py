"""The adapter of one layer: what it adapts, its leaf of a tree, and FedPara's weight."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from loha_jax.lowrank.layout import Layout
from loha_jax.targets.config import LoHaConfig
from loha_jax.targets.module_names import Names, stack_names
from loha_jax.tree.leaves import LoHaWeight
from loha_jax.tree.placement import ArrayOrShape
from loha_jax.tree.plan import Target, has_cores


def make_target(
    path: tuple[str, ...],
    name: str,
    layout: Layout,
    kernel: ArrayOrShape,
    config: LoHaConfig,
    names: Names | None,
) -> Target:
    """Return what a layer adapts, with its module names in the model."""
    module_names = stack_names(name, layout.sizes("s", kernel.shape), names)
    return Target(
        path=path,
        names=module_names,
        layout=layout,
        shape=tuple(kernel.shape),
        dtype=jnp.dtype(kernel.dtype),
        ranks=(config.r,) * len(module_names),
        alphas=(config.alpha,) * len(module_names),
        cp=has_cores(config, layout, kernel.shape),
    )


def loha_weight(
    target: Target,
    config: LoHaConfig,
    kernel: jax.Array,
    tensors: Mapping[str, jax.Array],
    adapter_name: str,
) -> LoHaWeight:
    """Return the kernel with its factors as a leaf of a tree."""
    adapters = {adapter_name: target.factors(tensors, config)}
    return LoHaWeight(kernel, adapters, target.layout, target.names, (adapter_name,))


def product(
    target: Target,
    config: LoHaConfig,
    tensors: Mapping[str, jax.Array],
    forward_mode: bool = False,
) -> jax.Array:
    """Return FedPara's weight, in the kernel's shape and dtype."""
    delta = target.factors(tensors, config).delta(forward_mode=forward_mode)
    return target.layout.fold(delta, target.shape).astype(target.dtype)
