"""`dropout`: LoHa's two dropouts as a function from tree to tree."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TypeVar

import jax
import jax.numpy as jnp

from loha_jax.lowrank.hadamard import float32_or_wider
from loha_jax.runtime.promotion import standard_promotion
from loha_jax.runtime.scalars import check_key
from loha_jax.tree.boxes import keeps_boxes
from loha_jax.tree.containers import refuse_loose_factors, refuse_model
from loha_jax.tree.factors import Factors
from loha_jax.tree.forgotten_dropout import note_dropout
from loha_jax.tree.leaves import LoHaWeight, map_factors

T = TypeVar("T")


@keeps_boxes
def dropout(params: T, key: jax.Array) -> T:
    """Apply the dropouts of each active adapter's config, for one training step.

    Both are masks on `hada_w1_a`, so the model itself needs no random state. `rank_dropout` (PEFT's
    name) drops rows of ΔW, that is outputs, with one mask for the whole batch, and multiplies the
    kept rows by out/kept. `module_dropout` drops the whole ΔW, without rescaling. Each module of a
    stack has its own draws. A `LycorisConfig` rescales the kept rows if it has
    `rank_dropout_scale`. With its `weight_decompose`, a dropped row is the base's row at the
    trained norm, and a dropped module the base's.

    Args:
        params: an adapted tree.
        key: JAX PRNG key, a new one for every step. The same key gives the same masks whatever the
            tree's order.

    Returns:
        The tree, with other values in `hada_w1_a` if a config asks for dropout. If all rows of a
        module are dropped, its update is zero (PEFT divides 0 by 0 there).

    Mirrors the training mode of PEFT's LoHa layers. Draws come from JAX, so masks differ from
    torch's.

    Example:
        >>> import loha_jax
        >>> config = loha_jax.LoHaConfig(r=2, module_dropout=0.5, target_modules=["q"])
        >>> base = {"q": {"kernel": jnp.ones((3, 3))}}
        >>> params = loha_jax.inject(base, config, key=jax.random.key(0))
        >>> dropout(params, jax.random.key(1))["q"]["kernel"].shape
        (3, 3)
    """
    note_dropout()
    refuse_model(
        params,
        "A model drops out by itself in training: an NNX model after "
        "loha_jax.nnx.set_dropout(model, rngs), a Keras model when it is called with "
        "training=True.",
    )
    refuse_loose_factors(params)
    check_key(key)

    def drop(leaf: LoHaWeight, name: str, factors: Factors) -> Factors:
        if name not in leaf.active:
            return factors
        return _drop(factors, _named_key(key, name, leaf.names[0]))

    return map_factors(drop, params)


def _named_key(key: jax.Array, *names: str) -> jax.Array:
    digest = hashlib.sha256("/".join(names).encode()).digest()
    for n in (0, 4):
        key = jax.random.fold_in(key, int.from_bytes(digest[n : n + 4], "big"))
    return key


@standard_promotion()
def _drop(factors: Factors, key: jax.Array) -> Factors:
    rank_dropout, module_dropout, rescaled = factors.config.computing
    if not rank_dropout and not module_dropout:
        return factors
    w1_a = factors.hada_w1_a
    out_axis = w1_a.ndim - (1 if factors.is_cp else 2)
    stack, out = w1_a.shape[:-2], w1_a.shape[out_axis]
    module_key, rank_key = jax.random.split(key)
    mask = jnp.ones((*stack, out), w1_a.dtype)
    if rank_dropout:
        kept = jax.random.bernoulli(rank_key, 1 - rank_dropout, mask.shape)
        mask = kept.astype(mask.dtype)
        if rescaled:
            count = jnp.maximum(kept.sum(-1, keepdims=True), 1)
            mask *= (out / count).astype(mask.dtype)
    if module_dropout:
        present = jax.random.bernoulli(module_key, 1 - module_dropout, (*stack, 1))
        mask *= present
        if factors.dora_scale is not None:  # the whole difference from W is dropped, not only ΔW
            gate = present[..., 0].astype(float32_or_wider(w1_a.dtype))
            gate = gate if factors.gate is None else factors.gate * gate
            factors = dataclasses.replace(factors, gate=gate)
    mask = mask[..., None, :] if factors.is_cp else mask[..., :, None]
    return dataclasses.replace(factors, hada_w1_a=w1_a * mask.astype(w1_a.dtype))
