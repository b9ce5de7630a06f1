"""The methods that are compared. All train the same kernels, and all but `full` as many numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

import loha_jax

Tree = dict[str, Any]
"""A tree of arrays; some of its kernels may be `LoHaWeight`s."""

Kernels = dict[tuple[str, ...], jax.Array]
"""Kernels by their paths."""

FASTER = 4
DECAY = 1.0
CLIP = 1.0


class Method(NamedTuple):
    """A way of fine-tuning the kernels that a config names."""

    start: Callable[[Tree, loha_jax.LoHaConfig, jax.Array], tuple[Tree, Tree]]
    """From a model, the config and a key to what is trained, and to what is frozen."""
    tree: Callable[[Tree, Tree], Tree]
    """From what is trained and what is frozen to the model's tree."""
    rates: float = 1.0
    """The factor that the grid of learning rates is multiplied by."""
    faster: str = ""
    """The last name of the arrays that learn at `FASTER` times the rate: LoRA+ (2402.12354)."""
    decays: str = ""
    """How the names of the arrays begin that decay, at `DECAY` times the rate, to their start."""
    clips: bool = False
    """Whether the gradient of the factors is clipped to the norm `CLIP` before Adam."""


def targets(base: Tree, config: loha_jax.LoHaConfig) -> Kernels:
    """Return the kernels that the config names. Their last axis is the output."""
    plain: Kernels = flatten_dict(base)  # type: ignore[assignment]  # no empty nodes are kept
    adapted = flatten_dict(loha_jax.inject(base, config, key=jax.random.key(0)))
    return {
        path: plain[path]
        for path, leaf in sorted(adapted.items())
        if isinstance(leaf, loha_jax.LoHaWeight)
    }


def replaced(base: Tree, kernels: Kernels) -> Tree:
    """Return the tree with other kernels."""
    return unflatten_dict(flatten_dict(base) | kernels)


def loha(init_weights: bool | str) -> Method:
    """Return LoHa with these initial values, through `loha_jax.adapt`."""

    def start(base: Tree, config: loha_jax.LoHaConfig, key: jax.Array) -> tuple[Tree, Tree]:
        config = dataclasses.replace(config, init_weights=init_weights)
        return loha_jax.partition(loha_jax.inject(base, config, key=key))

    return Method(start, loha_jax.combine)


def low_rank(update: Callable[[jax.Array, jax.Array], jax.Array]) -> Method:
    """Return a method whose kernel is `update(W, A B · alpha/r)`, with A B of rank 2r.

    A is uniform in ±1/√fan_in, B is zero: PEFT's LoRA. A convolution's kernel is flattened.
    """

    def start(base: Tree, config: loha_jax.LoHaConfig, key: jax.Array) -> tuple[Tree, Tree]:
        pairs: Tree = {}
        for n, (path, kernel) in enumerate(targets(base, config).items()):
            fan_in, out = math.prod(kernel.shape[:-1]), kernel.shape[-1]
            bound, shape = fan_in**-0.5, (fan_in, 2 * config.r)
            a = jax.random.uniform(jax.random.fold_in(key, n), shape, minval=-bound, maxval=bound)
            pairs["/".join(path)] = {"a": a, "b": jnp.zeros((2 * config.r, out))}
        return pairs, {"base": base, "scale": jnp.float32(config.alpha / config.r)}

    def tree(pairs: Tree, frozen: Tree) -> Tree:
        plain: Kernels = flatten_dict(frozen["base"])  # type: ignore[assignment]
        kernels = {}
        for name, pair in pairs.items():
            kernel = plain[path := tuple(name.split("/"))]
            product = (pair["a"] @ pair["b"] * frozen["scale"]).reshape(kernel.shape)
            kernels[path] = update(kernel, product)
        return replaced(frozen["base"], kernels)

    return Method(start, tree)


def full() -> Method:
    """Return full fine-tuning of the kernels.

    Each entry of W moves by the learning rate itself, so its grid lies 16 times lower.
    """

    def start(base: Tree, config: loha_jax.LoHaConfig, key: jax.Array) -> tuple[Tree, Tree]:
        return {"/".join(path): w for path, w in targets(base, config).items()}, base

    def tree(kernels: Tree, base: Tree) -> Tree:
        return replaced(base, {tuple(name.split("/")): w for name, w in kernels.items()})

    return Method(start, tree, rates=1 / 16)


METHODS = {
    "loha-calibrated": loha("calibrated"),
    "lora": low_rank(lambda w, product: w + product),
    "loha-peft": loha(True),
    "loha-lycoris": loha("lycoris"),
    "loha-abba": loha("abba"),
    "hira": low_rank(lambda w, product: w + w * product),
    "full": full(),
    "loha-calibrated-plus": loha("calibrated")._replace(faster="hada_w2_a"),
    "lora-plus": low_rank(lambda w, product: w + product)._replace(faster="b"),
    "loha-calibrated-decay": loha("calibrated")._replace(decays="hada_w1"),
    "loha-calibrated-clip": loha("calibrated")._replace(clips=True),
    "lora-clip": low_rank(lambda w, product: w + product)._replace(clips=True),
}
