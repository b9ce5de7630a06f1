"""Checks before a tree is written: whole leaves, an unchanged base, trained adapters."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import PyTree

from loha_jax.runtime.caller import warn_caller
from loha_jax.targets.module_names import module_name
from loha_jax.tree.adapters import adapter_names
from loha_jax.tree.containers import takes_model
from loha_jax.tree.factors import Factors
from loha_jax.tree.frozen_leaves import STATISTICS, frozen_leaves
from loha_jax.tree.kernel_samples import KernelSample, sample_kernels
from loha_jax.tree.leaves import (
    LoHaWeight,
    SavedWeight,
    is_adapted,
    leaves_by_path,
    leaves_of,
)


def check_whole(params: PyTree) -> None:
    """Raise ValueError for one half of `partition`."""
    for leaf in (*leaves_of(LoHaWeight, params), *leaves_of(SavedWeight, params)):
        leaf.require_whole()


@takes_model(changes=False)
def check_before_saving(params: PyTree, adapters: Sequence[str] | None = None) -> None:
    """Check a tree, or an NNX model, before some of its adapters are written to a file.

    By default all adapters are checked.

    Raises:
        ValueError: it is one half of `partition`, or statistics of a module in `modules_to_save`
            have lost their copies.

    Warns:
        UserWarning: a frozen leaf has changed since an adapter was made, or an adapter is
            untrained.
    """
    check_whole(params)
    _check_statistics(params, adapters)
    warn_of_changed_base(params, adapters)
    for name in adapter_names(params) if adapters is None else adapters:
        weights = leaves_of(LoHaWeight, params)
        held = [weight.adapters[name] for weight in weights if name in weight.adapters]
        if held and all(map(_is_untrained, held)):
            warn_caller(
                f"The adapter {name!r} is untrained: its update is exactly zero in every module. "
                "Train it first; after training, save the tree that `loha_jax.combine(trainable, "
                "frozen)` makes of the new `trainable`."
            )


def _check_statistics(params: PyTree, adapters: Sequence[str] | None) -> None:
    """Raise ValueError for plain statistics beside the saved weights of their module."""
    found = leaves_by_path(params)
    adapter_of = {
        module_name(path): name
        for path, leaf in found
        if isinstance(leaf, SavedWeight)
        for name in leaf.copies
        if adapters is None or name in adapters
    }
    lost = [
        path
        for path, leaf in found
        if not is_adapted(leaf) and path[-1] in STATISTICS and module_name(path) in adapter_of
    ]
    if lost:
        name = adapter_of[module_name(lost[0])]
        raise ValueError(
            f"{', '.join(map('.'.join, lost))}: plain arrays, where the adapter {name!r} saves the "
            "whole module (modules_to_save), so its file would lack them. Put the statistics that "
            f"a call returns into the leaves of the tree: leaf.with_copy({name!r}, array)."
        )


@takes_model(changes=False)
def warn_of_scales(params: PyTree, adapters: Sequence[str] | None = None) -> None:
    """Warn of numbers set by `loha_jax.scale`, in files that have no place for them.

    By default all adapters count.
    """
    scaled = {
        (name, factors.multiplier)
        for leaf in leaves_of(LoHaWeight, params)
        for name, factors in leaf.adapters.items()
        if factors.multiplier != 1 and (adapters is None or name in adapters)
    }
    for name, multiplier in sorted(scaled):
        warn_caller(
            f"The adapter {name!r} is scaled by {multiplier:g} (loha_jax.scale), and the file has "
            "no place for that number: it holds the adapter as it was before. An adapter that "
            f"contains it: loha_jax.add_weighted_adapter(params, [{name!r}], [1.0], 'scaled')."
        )


def warn_of_changed_base(params: PyTree, adapters: Sequence[str] | None = None) -> None:
    """Warn, by name, of frozen leaves that have changed since some adapters were made.

    By default all adapters count.
    """
    made_on: dict[int, list[KernelSample]] = {}  # by position among the kernels
    weights = leaves_of(LoHaWeight, params)
    for n, leaf in enumerate(weights):
        for name, factors in leaf.adapters.items():
            if factors.base is not None and (adapters is None or name in adapters):
                made_on.setdefault(n, []).append(factors.base)
    old = [base for bases in made_on.values() for base in bases]
    frozen = frozen_leaves(params)
    beside = {id(base.beside): base.beside for base in old}.values()
    known = {path: [s[path] for s in beside if path in s] for path in frozen}
    kernels = {n: weights[n].kernel for n in made_on}
    others = {path: leaf for path, leaf in frozen.items() if known[path]}
    now = sample_kernels({**kernels, **others})
    changed = [
        weights[place].label if isinstance(place, int) else ".".join(place)
        for place, sample in now.items()
        if any(
            s.differs(sample) for s in (made_on[place] if isinstance(place, int) else known[place])
        )
    ]
    if changed:
        more = f" and {len(changed) - 10} more" if len(changed) > 10 else ""
        shown = ", ".join(changed[:10]) + more
        warn_caller(
            f"The base weights have changed since the adapter was made: {shown}. Either they were "
            "trained too, and the adapter is only a part of the result, or it belongs to another "
            "base. Train `loha_jax.partition(params)[0]`, not the whole tree, and combine it with "
            "the frozen half that you have kept; of an NNX model, `wrt=nnx.LoRAParam`."
        )


def _is_untrained(factors: Factors) -> bool:
    return any(_is_zero(array) for name, array in factors.trained.items() if name != "dora_scale")


def _is_zero(array: jax.Array) -> bool:
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return not bool(jax.numpy.any(array))  # every process calls this
    return not np.asarray(array).any()
