"""Parameters that a PEFT file holds whole: `modules_to_save`, and their BatchNorm counters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TypeVar

import numpy as np
from jaxtyping import PyTree

from loha_jax.runtime.processes import on_host
from loha_jax.targets.config import LoHaConfig
from loha_jax.tree.leaves import LoHaWeight, SavedWeight, map_adapted
from loha_jax.tree.plan import Plan, Saved

from .base_layers import base_layers
from .from_tree import adapted_names, saved_leaves
from .row_transforms import rows_of_copy

T = TypeVar("T")


def saved_tensors(params: PyTree, adapter_name: str) -> dict[str, np.ndarray]:
    """Return everything in a PEFT file besides the factors, by PEFT's keys without the prefix.

    These are the copies of `modules_to_save`, BatchNorm counters, and base weights.

    Raises:
        ValueError: a module has factors and a changed copy of a parameter (LyCORIS' `diff_b`),
            which PEFT does not support.
    """
    adapted = adapted_names(params, adapter_name)
    state = base_layers(params, adapter_name)
    for leaf in saved_leaves(params, adapter_name):
        if (module := leaf.name.rpartition(".")[0]) in adapted:
            raise ValueError(
                f"{module} has factors and a copy of {leaf.name}, and PEFT does not adapt a module "
                "that it saves whole (modules_to_save). Use `save_lycoris`, or merge the adapter "
                "(`merge`, `save_merged`)."
            )
        copy = leaf.copies[adapter_name]
        value = on_host(leaf.layout.unfold(copy) if leaf.layout else copy)
        value = value if leaf.rows is None else rows_of_copy(leaf).to_torch(value)
        is_integer = np.issubdtype(value.dtype, np.integer)
        state[leaf.name] = value.astype(np.int64) if is_integer else value
        own = [(name, count) for owner, name, count in leaf.counters if owner == adapter_name]
        state |= {name: np.array(count, np.int64) for name, count in own}
    for key in [key for key in state if key.endswith(".running_mean")]:
        # torch's BatchNorm counts its batches, and PEFT wants the counter; a new one's is 0.
        counter = f"{key.removesuffix('running_mean')}num_batches_tracked"
        state.setdefault(counter, np.array(0, np.int64))
    return state


def with_names_that_end_alike(config: LoHaConfig, names: Iterable[str]) -> LoHaConfig:
    """Return the config with full names of saved modules that PEFT found by their ending.

    PEFT saves every module whose name ends with an entry of `modules_to_save`, "overhead" too for
    "head". Here an entry is a whole name; only the modules that such a file holds are added.

    Args:
        config: the file's.
        names: torch names of the parameters that are no factors.
    """
    entries = config.all_modules_to_save
    added: list[str] = []
    for parts in (name.split(".") for name in names):
        if "base_layer" in parts:
            continue
        above = [".".join(parts[:n]) for n in range(1, len(parts))]
        if not any(name == e or name.endswith(f".{e}") for name in above for e in entries):
            added += [name for name in above if name.endswith(entries)][:1]
    if not added:
        return config
    return dataclasses.replace(config, modules_to_save=(*(config.modules_to_save or ()), *added))


def saved_shapes(saved: Iterable[Saved]) -> dict[str, tuple[int, ...]]:
    """Return the shapes in torch's orientation of the parameters of saved modules."""
    return {s.name: s.layout.torch_shape(s.shape) if s.layout else s.shape for s in saved}


def batch_counters(plan: Plan, names: Iterable[str]) -> list[str]:
    """Return the names of BatchNorm counters in saved modules, for which a tree has no leaf."""
    saved = {own.name for own in plan.saved.values()}
    modules = {name.rpartition(".")[0] for name in saved}
    counters = [name for name in names if name.endswith(".num_batches_tracked")]
    return [n for n in counters if n not in saved and n.rpartition(".")[0] in modules]


def with_counters(params: T, adapter_name: str, counters: Mapping[str, int]) -> T:
    """Return the tree with BatchNorm counters noted at a saved leaf of their module."""
    left = dict(counters)

    def noted(leaf: LoHaWeight | SavedWeight) -> LoHaWeight | SavedWeight:
        if isinstance(leaf, LoHaWeight):
            return leaf
        module = leaf.name.rpartition(".")[0]
        names = [name for name in left if name.rpartition(".")[0] == module]
        own = tuple((adapter_name, name, left.pop(name)) for name in names)
        return dataclasses.replace(leaf, counters=(*leaf.counters, *own)) if own else leaf

    return map_adapted(noted, params) if counters else params
