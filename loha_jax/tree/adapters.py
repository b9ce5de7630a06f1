"""Several adapters in one tree: choose the active ones, scale, delete and add them up."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
from jax.core import Tracer

from loha_jax.lowrank.hadamard import float32_or_wider, khatri_rao_columns, khatri_rao_rows
from loha_jax.runtime.promotion import standard_promotion
from loha_jax.runtime.scalars import plain_scalar
from loha_jax.targets.config import LoHaConfig
from loha_jax.tree.containers import takes_model
from loha_jax.tree.leaves import Factors, LoHaWeight, SavedWeight, leaves_of, map_adapted, map_factors
from loha_jax.tree.placement import follow_kernel

T = TypeVar("T")


@takes_model(changes=False)
def adapter_names(params: Any) -> tuple[str, ...]:
    """Return the names of all adapters in a tree, sorted.

    Example:
        >>> import loha_jax
        >>> config = loha_jax.LoHaConfig(r=2, target_modules=["q"])
        >>> adapter_names(loha_jax.inject({"q": {"kernel": jnp.ones((3, 3))}}, config, key=jax.random.key(0)))
        ('default',)
    """
    factors = (leaf.adapters for leaf in leaves_of(LoHaWeight, params))
    copies = (leaf.copies for leaf in leaves_of(SavedWeight, params))
    return tuple(sorted(set().union(*factors, *copies)))


def check_adapters(params: Any, names: Sequence[str]) -> None:
    """Raise ValueError for the first name that no adapter of the tree has."""
    known = adapter_names(params)
    for name in names:
        if name not in known:
            raise ValueError(f"Adapter {name} not found. The tree has: {', '.join(known) or 'none'}.")


def check_new_adapter(params: Any, name: Any) -> None:
    """Raise ValueError for a name that is invalid or taken by an adapter of the tree."""
    if not isinstance(name, str) or not 0 < len(name) <= 200 or re.search(r"[./\\:]|[^\x20-\x7e\x80-\U0010ffff]", name):
        raise ValueError(f"An adapter's name is a string of 1 to 200 characters, none of them './\\:', got {name!r}")
    if name in adapter_names(params):
        raise ValueError(f"Adapter with name {name!r} already exists.")


@takes_model
def set_adapter(params: T, names: str | Sequence[str]) -> T:
    """Return the tree with other adapters active: one, several or none.

    Args:
        params: an adapted tree.
        names: the name or names; () for the base model. The updates of several are summed in this
            order.

    Raises:
        ValueError: no leaf of the tree has an adapter of that name.

    Mirrors PEFT's `set_adapter`, and `disable_adapter` with (). Leaves that lack an adapter are not
    adapted by it. If several active adapters hold a copy of one module (`modules_to_save`), only
    `adapt(fn, adapter_index=ids)` can use that module; elsewhere its use is an error.

    Example:
        >>> import loha_jax
        >>> params = loha_jax.inject({"q": {"kernel": jnp.ones((3, 3))}},
        ...     loha_jax.LoHaConfig(r=2, target_modules=["q"]), key=jax.random.key(0))
        >>> set_adapter(params, ())["q"]["kernel"].active
        ()
    """
    active = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
    check_adapters(params, active)
    return map_adapted(lambda leaf: dataclasses.replace(leaf, active=active), params)


@takes_model
def scale(params: T, weights: Mapping[str, Any]) -> T:
    """Return the tree with each named adapter's update multiplied by a number: `s · alpha/r · ΔW`.

    The numbers count from alpha/r, not from an earlier call: `scale(params, {"style": 1.0})` undoes
    one. They hold for every use (`adapt`, `merge`, active or not) and stay in the tree. Files have
    no place for them: to keep them, merge, or call `add_weighted_adapter`. Copies of
    `modules_to_save` are not scaled. With a weight decomposition (DoRA) the difference from the
    base weight is multiplied, `s · (W' - W)`.

    Args:
        params: an adapted tree.
        weights: numbers by adapter name. They are a part of the tree's structure: a jitted function
            of the tree compiles again for each new number. To compile only once, pass the number to
            the function and call `scale` inside with the traced scalar.

    Raises:
        ValueError: no leaf has an adapter of that name, or a number is not finite.

    Mirrors PEFT's `set_scale(adapter, s)` on every layer.

    Example:
        >>> import loha_jax
        >>> params = loha_jax.inject({"q": {"kernel": jnp.ones((3, 3))}},
        ...     loha_jax.LoHaConfig(r=2, alpha=4, target_modules=["q"]), key=jax.random.key(0))
        >>> scale(params, {"default": 0.5})["q"]["kernel"].adapters["default"].scaling.item()
        1.0
    """
    check_adapters(params, list(weights))
    weights = {name: plain_scalar(weight) for name, weight in weights.items()}
    for name, weight in weights.items():
        _check_number(f"the weight of {name}", weight)

    def scaled(_: LoHaWeight, name: str, factors: Factors) -> Factors:
        return _with_multiplier(factors, weights[name]) if name in weights else factors

    return map_factors(scaled, params)


def _with_multiplier(factors: Factors, weight: Any) -> Factors:
    if isinstance(weight, Tracer):
        gate = jnp.broadcast_to(jnp.asarray(weight, float32_or_wider(factors.hada_w1_a.dtype)), factors.stack)
        return dataclasses.replace(factors, multiplier=1.0, gate=gate)
    parts = tuple(name for name in factors.parts if name != "gate")
    return dataclasses.replace(factors, multiplier=float(weight), gate=None, parts=parts)


@takes_model
def delete_adapter(params: T, name: str) -> T:
    """Return the tree without an adapter.

    Leaves that held only this one are plain arrays again, the very same ones.

    Args:
        params: an adapted tree.
        name: the adapter. If it was active, the other active ones stay so; no other one takes its
            place.

    Raises:
        ValueError: no leaf of the tree has an adapter of that name.

    Mirrors PEFT's `delete_adapter`, which activates another adapter in its place, layer by layer.

    Example:
        >>> import loha_jax
        >>> base = {"q": {"kernel": jnp.ones((3, 3))}}
        >>> config = loha_jax.LoHaConfig(r=2, target_modules=["q"])
        >>> params = loha_jax.inject(base, config, key=jax.random.key(0))
        >>> delete_adapter(params, "default")["q"]["kernel"] is base["q"]["kernel"]
        True
    """
    check_adapters(params, [name])
    return map_adapted(lambda leaf: without_adapters(leaf, [name]), params)


def without_adapters(leaf: LoHaWeight | SavedWeight, names: Sequence[str]) -> Any:
    """Return a leaf without some adapters: a plain array if none is left."""
    if isinstance(leaf, LoHaWeight):
        adapters = {n: f for n, f in leaf.adapters.items() if n not in names}
        if not adapters:
            return leaf.kernel
        active = tuple(n for n in leaf.active if n not in names)
        return dataclasses.replace(leaf, adapters=adapters, active=active)
    copies = {n: c for n, c in leaf.copies.items() if n not in names}
    if not copies:
        return leaf.original
    active = tuple(n for n in leaf.active if n not in names)
    counters = tuple(counter for counter in leaf.counters if counter[0] not in names)
    return dataclasses.replace(leaf, copies=copies, active=active, counters=counters)


@takes_model
def add_weighted_adapter(params: T, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> T:
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
        raise ValueError(f"One weight per adapter, each adapter once: got adapters={adapters} and weights={weights}")
    for name, weight in zip(adapters, weights, strict=True):
        _check_number(f"the weight of {name}", weight)
    by_name = dict(zip(adapters, weights, strict=True))
    config = _sum_config(params, adapters)

    def add(leaf: Any) -> Any:
        if isinstance(leaf, LoHaWeight):
            held = {name: weight for name, weight in by_name.items() if name in leaf.adapters}
            added = {adapter_name: follow_kernel(_sum_of(leaf, held, config), leaf.kernel, leaf.layout)} if held else {}
            return dataclasses.replace(leaf, adapters={**leaf.adapters, **added}, active=(adapter_name,))
        source = leaf.copy_of(adapters)
        added = {} if source is None else {adapter_name: leaf.copies[source]}
        counters = tuple((adapter_name, key, value) for name, key, value in leaf.counters if name == source)
        return dataclasses.replace(
            leaf,
            copies={**leaf.copies, **added},
            active=(adapter_name,),
            counters=(*leaf.counters, *counters),
        )

    return map_adapted(add, params)


@standard_promotion()
def _sum_of(leaf: LoHaWeight, weights: Mapping[str, float], config: LoHaConfig) -> Factors:
    if decomposed := [name for name in weights if leaf.adapters[name].dora_scale is not None]:
        raise ValueError(
            f"{', '.join(decomposed)} decompose(s) the weight of {leaf.label} (DoRA): such an update depends on the "
            "weight and is no LoHa, so a sum with it is none. Merge the adapters instead."
        )
    ka, kb = [], []
    for name, weight in weights.items():
        f = leaf.adapters[name].flat()
        dtype = float32_or_wider(f.hada_w1_a.dtype)
        w1_a, w1_b, w2_a, w2_b = (w.astype(dtype) for w in f.tensors.values())
        factor = (f.scale * jnp.asarray(weight, f.scale.dtype))[..., None, None]
        ka.append(khatri_rao_rows(w1_a, w2_a) * factor)  # [*stack, out, r^2]
        kb.append(khatri_rao_columns(w1_b, w2_b))  # [*stack, r^2, in]
    w1_a, w1_b = jnp.concatenate(ka, -1), jnp.concatenate(kb, -2)
    r = w1_a.shape[-1]
    stack = leaf.layout.sizes("s", leaf.kernel.shape)
    sources = [leaf.adapters[name] for name in weights]
    ranks = tuple(r if any(of_one) else 0 for of_one in zip(*(f.ranks for f in sources), strict=True))
    targeted = jnp.array([bool(rank) for rank in ranks], w1_a.dtype).reshape(*stack, 1)  # the others stay zero
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


def _sum_config(params: Any, adapters: Sequence[str]) -> LoHaConfig:
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
    (r, _), *_ = Counter(ranks.values()).most_common(1)
    others = dict(sorted((f"^{re.escape(name)}", own) for name, own in ranks.items() if own != r))
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


def _check_number(what: str, value: Any) -> None:
    if isinstance(value, Tracer):
        if value.shape:
            raise ValueError(f"{what} should be a number but is an array of shape {value.shape}")
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{what} should be a finite number but is {value!r}")
