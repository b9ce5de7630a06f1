"""Several adapters in one tree: choose the active ones, scale and delete them."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import PyTree

from loha_jax.lowrank.hadamard import float32_or_wider
from loha_jax.runtime.scalars import plain_scalar
from loha_jax.tree.containers import takes_model
from loha_jax.tree.factors import Factors
from loha_jax.tree.leaves import (
    AdaptedLeaf,
    LoHaWeight,
    SavedWeight,
    leaves_of,
    map_adapted,
    map_factors,
)
from loha_jax.tree.provenance import Counters
from loha_jax.tree.quantised import unwrapped

T = TypeVar("T")


@takes_model(changes=False)
def adapter_names(params: PyTree) -> tuple[str, ...]:
    """Return the names of all adapters in a tree, sorted.

    Example:
        >>> import loha_jax
        >>> params = loha_jax.inject({"q": {"kernel": jnp.ones((3, 3))}},
        ...     loha_jax.LoHaConfig(r=2, target_modules=["q"]), key=jax.random.key(0))
        >>> adapter_names(params)
        ('default',)
    """
    factors = (leaf.adapters for leaf in leaves_of(LoHaWeight, params))
    copies = (leaf.copies for leaf in leaves_of(SavedWeight, params))
    return tuple(sorted(set().union(*factors, *copies)))


def check_adapters(params: PyTree, names: Sequence[str]) -> None:
    """Raise ValueError for the first name that no adapter of the tree has."""
    known = adapter_names(params)
    for name in names:
        if name not in known:
            raise ValueError(
                f"Adapter {name} not found. The tree has: {', '.join(known) or 'none'}."
            )


def check_new_adapter(params: PyTree, name: object) -> None:
    """Raise ValueError for a name that is invalid or taken by an adapter of the tree."""
    if (
        not isinstance(name, str)
        or not 0 < len(name) <= 200
        or re.search(r"[./\\:]|[^\x20-\x7e\x80-\U0010ffff]", name)
    ):
        raise ValueError(
            "An adapter's name is a string of 1 to 200 characters, none of them './\\:', got "
            f"{name!r}"
        )
    if name in adapter_names(params):
        raise ValueError(
            f"Adapter with name {name!r} already exists. Give the new one another adapter_name."
        )


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
def scale(params: T, weights: Mapping[str, float | jax.Array]) -> T:
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
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights should be {{adapter name: number}}, got {weights!r}.")
    check_adapters(params, list(weights))
    weights = {name: plain_scalar(weight) for name, weight in weights.items()}
    for name, weight in weights.items():
        check_number(f"the weight of {name}", weight)

    def scaled(_: LoHaWeight, name: str, factors: Factors) -> Factors:
        return _with_multiplier(factors, weights[name]) if name in weights else factors

    return map_factors(scaled, params)


def _with_multiplier(factors: Factors, weight: float | jax.Array) -> Factors:
    if isinstance(weight, Tracer):
        gate = jnp.broadcast_to(
            jnp.asarray(weight, float32_or_wider(factors.hada_w1_a.dtype)), factors.stack
        )
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


def without_adapters(leaf: AdaptedLeaf, names: Sequence[str]) -> Any:
    """Return a leaf without some adapters: a plain array if none is left."""
    active = tuple(n for n in leaf.active if n not in names)
    if isinstance(leaf, LoHaWeight):
        adapters = {n: f for n, f in leaf.adapters.items() if n not in names}
        left = dataclasses.replace(leaf, adapters=adapters, active=active)
        return left if adapters else unwrapped(leaf.kernel)
    copies = {n: c for n, c in leaf.copies.items() if n not in names}
    counters = Counters(counter for counter in leaf.counters if counter[0] not in names)
    left = dataclasses.replace(leaf, copies=copies, active=active, counters=counters)
    return left if copies else unwrapped(leaf.original)


def check_number(what: str, value: object) -> None:
    """Raise ValueError for a value, called `what`, that is no finite number or traced scalar."""
    if isinstance(value, Tracer):
        if value.shape:
            raise ValueError(f"{what} should be a number but is an array of shape {value.shape}")
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{what} should be a finite number but is {value!r}")
