"""`apply_max_norm`: keep the norm of each module's update below a limit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from loha_jax.runtime.promotion import standard_promotion
from loha_jax.tree.adapters import check_adapters
from loha_jax.tree.containers import takes_model
from loha_jax.tree.factors import Factors
from loha_jax.tree.leaves import LoHaWeight, map_factors

T = TypeVar("T")


@takes_model
def apply_max_norm(params: T, max_norm: float, adapters: Sequence[str] | None = None) -> T:
    """Scale down the update of each module whose Frobenius norm ‖ΔW‖ exceeds `max_norm`.

    Call it after an optimizer step, as kohya's `scale_weight_norms`. It changes the scalar if there
    is one (`LycorisConfig.use_scalar`), else `hada_w1_a`. The norm is computed from Khatri-Rao
    factors; ΔW is not materialised.

    Args:
        params: an adapted tree, also under `jax.jit`.
        max_norm: the limit, > 0. Each module of a stack has its own norm.
        adapters: names of the adapters; the active ones by default.

    Returns:
        The tree. A module below the limit keeps its values bit for bit.

    Raises:
        ValueError: no leaf has an adapter of that name, or the limit is not positive.

    Mirrors LyCORIS' `LohaModule.apply_max_norm`. In LyCORIS 4.1.3 a merge before the next save
    discards it.

    Example:
        >>> import loha_jax
        >>> config = loha_jax.LoHaConfig(r=2, target_modules=["q"], init_weights=False)
        >>> base = {"q": {"kernel": jnp.zeros((8, 8))}}
        >>> params = loha_jax.inject(base, config, key=jax.random.key(0))
        >>> merged = loha_jax.merge(apply_max_norm(params, 0.01))
        >>> jnp.linalg.norm(merged["q"]["kernel"]).round(4).item()
        0.009999999776482582
    """
    if not isinstance(max_norm, jax.Array) and not (math.isfinite(max_norm) and max_norm > 0):
        raise ValueError(f"max_norm should be a positive number, got {max_norm!r}")
    check_adapters(params, adapters or ())

    def limited(leaf: LoHaWeight, name: str, factors: Factors) -> Factors:
        chosen = leaf.active if adapters is None else adapters
        return _limited(factors, max_norm) if name in chosen else factors

    return map_factors(limited, params)


@standard_promotion()
def _limited(factors: Factors, max_norm: ArrayLike) -> Factors:
    norm = update_norm(factors)
    ratio = jnp.where(norm > max_norm, max_norm / jnp.maximum(norm, max_norm), 1)
    if factors.scalar is not None:
        return dataclasses.replace(
            factors, scalar=factors.scalar * ratio.astype(factors.scalar.dtype)
        )
    w1_a = factors.hada_w1_a
    return dataclasses.replace(factors, hada_w1_a=w1_a * ratio.astype(w1_a.dtype)[..., None, None])


@standard_promotion()
def update_norm(factors: Factors) -> jax.Array:
    """Compute ‖ΔW‖ of each module of a stack, `[*stack]`, from products of inner size r²."""
    ka, kb = factors.khatri_rao()
    squares = jnp.einsum("...oR,...oS->...RS", ka, ka) * jnp.einsum("...Ri,...Si->...RS", kb, kb)
    return jnp.sqrt(jnp.maximum(squares.sum((-1, -2)), 0)) * jnp.abs(factors.scale)
