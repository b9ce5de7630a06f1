"""The factors of a Linen layer as its `init` draws them, with the kernel's partitioning."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax

from loha_jax.lowrank.initial_values import FACTOR_NAMES, init_factors
from loha_jax.targets.config import LoHaConfig
from loha_jax.tree.placement import factor_axes
from loha_jax.tree.plan import Target


def initial_factor(
    layer: Any,
    target: Target,
    config: LoHaConfig,
    name: str,
    shape: tuple[int, ...],
    key: jax.Array,
) -> jax.Array:
    """Draw one factor of all modules of the kernel: `[*stack, *shape]`."""
    dtype = target.factor_dtype
    if layer.fedpara:
        key = jax.random.fold_in(key, FACTOR_NAMES.index(name))
        return _fedpara_std(layer, target, config) * jax.random.normal(
            key, (*target.stack, *shape), dtype
        )
    names = [str(n) for n in range(len(target.names))]
    law, shapes = config.init_weights, target.shapes(max(target.ranks))
    return init_factors(key, names, shapes, law, dtype, target.stack, only=name)[name]


def _fedpara_std(layer: Any, target: Target, config: LoHaConfig) -> float:
    """Return the σ of every factor for which the weight has the variance variance_scale / fan_in.

    An element of w1_a @ w1_b is a sum of r products of two independent numbers of mean 0: its
    variance is r·σ⁴. The two pairs are independent: the variance of their product is r²·σ⁸. With
    cores the sums have r² terms of three numbers: r⁴·σ¹². The scaling alpha/r enters squared.
    """
    fan_in = math.prod(target.module_shape[1:])
    variance = layer.variance_scale / fan_in / (config.alpha / config.r) ** 2
    terms, numbers = (config.r**4, 12) if target.cp else (config.r**2, 8)
    return (variance / terms) ** (1 / numbers)


def boxed_factor(box: object, target: Target, name: str, factor: jax.Array) -> Any:
    """Put a factor into the kernel's partitioning box, with the names of its own axes."""
    if not isinstance(box, nn.Partitioned):
        return factor
    names = tuple(box.names)
    if len(names) != target.layout.ndim:
        raise ValueError(
            f"The kernel of {target.names[0]} has shape {target.shape}, but its partitioning names "
            f"{names}: give one name, or None, per axis."
        )
    axes = factor_axes(target.layout, target.shape, names, {name: factor}, cp=target.cp)
    return box.replace(value=factor, names=axes[name])
