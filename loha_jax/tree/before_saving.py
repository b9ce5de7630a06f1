"""Checks before a tree is written: whole leaves, a base that has not changed, adapters that do something."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from loha_jax.runtime.caller import warn_caller
from loha_jax.tree.adapters import adapter_names
from loha_jax.tree.containers import takes_model
from loha_jax.tree.factors import Factors
from loha_jax.tree.frozen_leaves import frozen_leaves
from loha_jax.tree.kernel_samples import KernelSample, sample_kernels
from loha_jax.tree.leaves import LoHaWeight, SavedWeight, leaves_of


def check_whole(params: Any) -> None:
    """Raise ValueError for one half of `partition`."""
    for leaf in (*leaves_of(LoHaWeight, params), *leaves_of(SavedWeight, params)):
        leaf.require_whole()


@takes_model(changes=False)
def check_before_saving(params: Any, adapters: Sequence[str] | None = None) -> None:
    """Check a tree, or an NNX model, before some of its adapters are written to a file.

    By default all adapters are checked.

    Raises:
        ValueError: it is one half of `partition`.

    Warns:
        UserWarning: a frozen leaf has changed since an adapter was made, or an adapter is untrained.
    """
    check_whole(params)
    warn_of_changed_base(params, adapters)
    for name in adapter_names(params) if adapters is None else adapters:
        weights = leaves_of(LoHaWeight, params)
        held = [weight.adapters[name] for weight in weights if name in weight.adapters]
        if held and all(map(_is_untrained, held)):
            warn_caller(
                f"The adapter {name!r} is untrained: its update is exactly zero in every module. Train it first; after "
                "training, save the tree that `loha_jax.combine(trainable, frozen)` makes of the new `trainable`."
            )


def warn_of_changed_base(params: Any, adapters: Sequence[str] | None = None) -> None:
    """Warn, by name, of frozen leaves that have changed since the adapters (all by default) were made."""
    weights = leaves_of(LoHaWeight, params)
    found = [leaf for leaf in weights if any(f.base is not None for f in leaf.adapters.values())]
    samples = sample_kernels({n: leaf.kernel for n, leaf in enumerate(found)})
    changed = [
        leaf.label
        for n, leaf in enumerate(found)
        if n in samples
        and any(
            f.base is not None and f.base.differs(samples[n])
            for name, f in leaf.adapters.items()
            if adapters is None or name in adapters
        )
    ]
    chosen = [
        f for leaf in found for n, f in leaf.adapters.items() if adapters is None or n in adapters
    ]
    kept = [f.base for f in chosen if f.base is not None]
    changed += _changed_beside(params, kept)
    if changed:
        shown = ", ".join(changed[:10]) + (
            f" and {len(changed) - 10} more" if len(changed) > 10 else ""
        )
        warn_caller(
            f"The base weights have changed since the adapter was made: {shown}. Either they were "
            "trained too, and the adapter is only a part of the result, or it belongs to another base. "
            "Train `loha_jax.partition(params)[0]`, not the whole tree, and combine it with the frozen "
            "half that you have kept."
        )


def _changed_beside(params: Any, kept: Sequence[KernelSample]) -> list[str]:
    """Return the names of the leaves without an adapter that have changed since an adapter was made."""
    frozen = frozen_leaves(params)
    old = {id(sample.beside): sample.beside for sample in kept}
    now = sample_kernels(
        {path: leaf for path, leaf in frozen.items() if any(path in s for s in old.values())}
    )
    differs = (
        path
        for path, sample in now.items()
        if any(path in s and s[path].differs(sample) for s in old.values())
    )
    return [".".join(path) for path in differs]


def _is_untrained(factors: Factors) -> bool:
    return any(_is_zero(array) for name, array in factors.trained.items() if name != "dora_scale")


def _is_zero(array: Any) -> bool:
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return not bool(jax.numpy.any(array))  # every process calls this
    return not np.asarray(array).any()
