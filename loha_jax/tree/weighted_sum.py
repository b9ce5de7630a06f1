"""The weighted sum of several adapters as one more adapter, exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeVar

import jax.numpy as jnp
from jaxtyping import PyTree

from loha_jax.runtime.promotion import standard_promotion
from loha_jax.runtime.scalars import plain_scalar
from loha_jax.targets.config import LoHaConfig
from loha_jax.targets.matching import exact_patterns, most_common
from loha_jax.tree.adapters import check_adapters, check_new_adapter, check_number
from loha_jax.tree.containers import takes_model
from loha_jax.tree.factors import Factors
from loha_jax.tree.leaves import AdaptedLeaf, LoHaWeight, SavedWeight, leaves_of, map_adapted
from loha_jax.tree.placement import follow_kernel
from loha_jax.tree.provenance import Counters

T = TypeVar("T")


@takes_model
def add_weighted_adapter(
    params: T, adapters: Sequence[str], weights: Sequence[float], adapter_name: str
) -> T:
    """Add the weighted sum of several adapters as one more LoHa adapter, exactly.

    A sum of Hadamard products is none of low rank. But each of them is a product KA @ KB of inner
    size r² (Khatri-Rao). These are concatenated in the first pair of factors of the new adapter,
    whose second pair is a matrix of ones. Its rank is the sum of the squares of the others' ranks:
    two adapters of r=4 give one of r=32. It can be trained, saved and opened by PEFT like any
    other. Cores (CP form) are multiplied into the flat form.

    Args:
        params: an adapted tree with values.
        adapters: names of the adapters, with their present scales. A module that lacks one goes
            without it.
        weights: one number per adapter.
        adapter_name: of the new adapter, which becomes the active one.

    Returns:
        The tree with one more adapter. A module in `modules_to_save` keeps the copy of the one
        adapter that has it.

    Raises:
        ValueError: an adapter is missing, the new name is taken, the weights do not fit, or two
            adapters have a copy of one module.

    Named after PEFT's function for LoRA, which has none for LoHa.

    Example:
        >>> import loha_jax
        >>> base = {"q": {"kernel": jnp.ones((3, 3))}}
        >>> config = loha_jax.LoHaConfig(r=2, target_modules=["q"], init_weights=False)
        >>> params = loha_jax.inject(base, config, key=jax.random.key(0), adapter_name="a")
        >>> params = loha_jax.inject(params, config, key=jax.random.key(1), adapter_name="b")
        >>> both = add_weighted_adapter(params, ["a", "b"], [0.7, 0.3], "mix")
        >>> both["q"]["kernel"].adapters["mix"].hada_w1_a.shape
        (3, 8)
    """
    adapters, weights = tuple(adapters), tuple(map(plain_scalar, weights))
    check_adapters(params, adapters)
    check_new_adapter(params, adapter_name)
    if not adapters or len(weights) != len(adapters) or len(set(adapters)) != len(adapters):
        raise ValueError(
            f"One weight per adapter, each adapter once: got adapters={adapters} and "
            f"weights={weights}"
        )
    for name, weight in zip(adapters, weights, strict=True):
        check_number(f"the weight of {name}", weight)
    by_name = dict(zip(adapters, weights, strict=True))
    config = _config_of_sum(params, adapters)

    def add(leaf: AdaptedLeaf) -> AdaptedLeaf:
        if isinstance(leaf, LoHaWeight):
            held = {name: weight for name, weight in by_name.items() if name in leaf.adapters}
            if not held:
                return dataclasses.replace(leaf, active=(adapter_name,))
            factors = follow_kernel(_sum(leaf, held, config), leaf.kernel, leaf.layout)
            return leaf.with_adapter(adapter_name, factors)
        if (source := leaf.copy_of(adapters)) is None:
            return dataclasses.replace(leaf, active=(adapter_name,))
        added = ((adapter_name, key, n) for name, key, n in leaf.counters if name == source)
        leaf = leaf.with_copy(adapter_name, leaf.copies[source])
        return dataclasses.replace(leaf, counters=Counters((*leaf.counters, *added)))

    return map_adapted(add, params)


@standard_promotion()
def _sum(leaf: LoHaWeight, weights: Mapping[str, float], config: LoHaConfig) -> Factors:
    """Return the sum of a kernel's adapters: Σ w·KA·KB = ([w₁KA₁ w₂KA₂ …] · [KB₁; KB₂; …]) ⊙ 1."""
    if decomposed := [name for name in weights if leaf.adapters[name].dora_scale is not None]:
        raise ValueError(
            f"{', '.join(decomposed)} decompose(s) the weight of {leaf.label} (DoRA). Such an "
            "update depends on the weight and is no LoHa, nor is a sum with it. Merge the "
            "adapters instead."
        )
    ka, kb = [], []
    for name, weight in weights.items():
        factors = leaf.adapters[name]
        left, right = factors.khatri_rao()
        scale = factors.scale
        ka.append(left * (scale * jnp.asarray(weight, scale.dtype))[..., None, None])
        kb.append(right)
    # [*stack, out, Σ r²] and [*stack, Σ r², in]
    w1_a, w1_b = jnp.concatenate(ka, -1), jnp.concatenate(kb, -2)
    r = w1_a.shape[-1]
    stack = leaf.layout.sizes("s", leaf.kernel.shape)
    sources = [leaf.adapters[name] for name in weights]
    ranks = tuple(
        r if any(of_one) else 0 for of_one in zip(*(f.ranks for f in sources), strict=True)
    )
    # [*stack, 1]: ones make the second product a matrix of ones; modules of rank 0 stay zero
    targeted = jnp.array([bool(rank) for rank in ranks], w1_a.dtype).reshape(*stack, 1)
    return Factors(
        hada_w1_a=w1_a,
        hada_w1_b=w1_b,
        hada_w2_a=jnp.zeros_like(w1_a).at[..., 0].set(targeted),
        hada_w2_b=jnp.zeros_like(w1_b).at[..., 0, :].set(targeted),
        ranks=ranks,
        alphas=ranks,
        config=config,
        base=sources[0].base,
    )


def _config_of_sum(params: PyTree, adapters: Sequence[str]) -> LoHaConfig:
    """Return the config from which PEFT makes the summed adapter.

    It names the modules in full and has alpha = r in each.
    """
    configs: list[LoHaConfig] = []
    ranks: dict[str, int] = {}
    for leaf in leaves_of(LoHaWeight, params):
        held = [leaf.adapters[name] for name in adapters if name in leaf.adapters]
        configs += [f.config for f in held]
        r = sum(f.hada_w1_b.shape[-2] ** 2 for f in held)
        for n, name in enumerate(leaf.names):
            if any(f.ranks[n] for f in held):
                ranks[name] = r
    copied = [leaf for leaf in leaves_of(SavedWeight, params) if leaf.copies.keys() & set(adapters)]
    saved = {leaf.name.rpartition(".")[0] for leaf in copied}
    r = most_common(ranks.values())
    others = dict(sorted(exact_patterns(ranks, r).items()))
    return LoHaConfig(
        r=r,
        alpha=r,
        rank_pattern=others,
        alpha_pattern=others,
        target_modules=sorted(ranks),
        modules_to_save=sorted(saved) or None,
        task_type=configs[0].task_type,
        base_model_name_or_path=configs[0].base_model_name_or_path,
    )
