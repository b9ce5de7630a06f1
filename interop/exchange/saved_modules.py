"""Everything in a PEFT file besides the factors, for LoHa and LoRA.

These are the copies of `modules_to_save`, BatchNorm counters, and base weights of adapted
embeddings.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import PyTree

from loha_jax.runtime.processes import on_host
from loha_jax.targets.config import LoHaConfig
from loha_jax.targets.module_names import path_parts, torch_parameter
from loha_jax.tree.inject import with_samples
from loha_jax.tree.leaves import LoHaWeight, SavedWeight, is_adapted
from loha_jax.tree.plan import Plan

T = TypeVar("T")

# PEFT writes the base weight of these modules too where a config targets them (save_embedding_layers="auto").
_EMBEDDINGS = ("embed_tokens", "lm_head")


def saved_tensors(params: PyTree, adapter_name: str) -> dict[str, np.ndarray]:
    """Return the tensors besides the factors, by PEFT's keys without the prefix.

    `lm_head` and `embed_tokens` in the config's targets give their `base_layer.weight`, as in PEFT.

    Raises:
        ValueError: a module has factors and a changed copy of a parameter (LyCORIS' `diff_b`),
            which PEFT has not.
    """
    _check_saved_or_adapted(params, adapter_name)
    state: dict[str, np.ndarray] = {}
    biases = _biases(params)
    for path, leaf in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_adapted)[0]:
        if isinstance(leaf, LoHaWeight) and adapter_name in leaf.adapters:
            state.update(_base_layers(leaf, adapter_name, biases.get(path_parts(path)[:-1])))
        elif isinstance(leaf, SavedWeight) and adapter_name in leaf.copies:
            copy = leaf.copies[adapter_name]
            value = on_host(leaf.layout.unfold(copy) if leaf.layout else copy)
            state[leaf.name] = (
                value.astype(np.int64) if np.issubdtype(value.dtype, np.integer) else value
            )
            for owner, name, count in leaf.counters:
                if owner == adapter_name:
                    state[name] = np.array(count, np.int64)
    for key in [key for key in state if key.endswith(".running_mean")]:
        # torch's BatchNorm counts its batches, and PEFT wants the counter; a new one's is 0.
        state.setdefault(
            f"{key.removesuffix('running_mean')}num_batches_tracked", np.array(0, np.int64)
        )
    return state


def _check_saved_or_adapted(params: PyTree, adapter_name: str) -> None:
    leaves = jax.tree.leaves(params, is_leaf=is_adapted)
    lohas = [
        leaf for leaf in leaves if isinstance(leaf, LoHaWeight) and adapter_name in leaf.adapters
    ]
    adapted = {
        n
        for leaf in lohas
        for n, r in zip(leaf.names, leaf.adapters[adapter_name].ranks, strict=True)
        if r
    }
    saved = [
        leaf for leaf in leaves if isinstance(leaf, SavedWeight) and adapter_name in leaf.copies
    ]
    for leaf in saved:
        if (module := leaf.name.rpartition(".")[0]) in adapted:
            raise ValueError(
                f"{module} has factors and a copy of {leaf.name}, and PEFT does not adapt a module that it saves whole "
                "(modules_to_save). Use `save_lycoris`, or merge the adapter (`merge`, `save_merged`)."
            )


def _biases(params: PyTree) -> dict[tuple[str, ...], jax.Array]:
    """The biases of a tree by the path of their module."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_adapted)
    named = [(path_parts(path), leaf) for path, leaf in flat]
    return {
        parts[:-1]: leaf
        for parts, leaf in named
        if torch_parameter(parts) == "bias" and not is_adapted(leaf)
    }


def _base_layers(
    leaf: LoHaWeight, adapter_name: str, bias: jax.Array | None
) -> dict[str, np.ndarray]:
    factors = leaf.adapters[adapter_name]
    state: dict[str, np.ndarray] = {}
    for index, (name, r) in enumerate(zip(leaf.names, factors.ranks, strict=True)):
        if r and name.rsplit(".", 1)[-1] in _EMBEDDINGS and _targets_embeddings(factors.config):
            weight = on_host(leaf.layout.unfold(leaf.kernel))
            stack = len(leaf.layout.axes("s"))
            state[f"{name}.base_layer.weight"] = weight.reshape(-1, *weight.shape[stack:])[index]
            if bias is not None:
                own = on_host(bias).reshape(-1, weight.shape[stack])[index]
                state[f"{name}.base_layer.bias"] = own
    return state


def _targets_embeddings(config: LoHaConfig) -> bool:
    # PEFT's test is `name in target_modules`: membership in a list, a substring of a regular expression.
    targets = config.target_modules or ()
    return any(name in targets for name in _EMBEDDINGS)  # type: ignore[operator]


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


def batch_counters(plan: Plan, names: Iterable[str]) -> list[str]:
    """Return the names of BatchNorm counters in saved modules, for which a tree has no leaf."""
    saved = [saved.name for saved in plan.saved.values()]
    return [
        n
        for n in names
        if n.endswith(".num_batches_tracked") and any(_same_module(n, own) for own in saved)
    ]


def _same_module(a: str, b: str) -> bool:
    return a.rpartition(".")[0] == b.rpartition(".")[0]


def saved_shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Return the shapes in torch's orientation of the parameters of saved modules."""
    return {
        s.name: s.layout.torch_shape(s.shape) if s.layout else s.shape for s in plan.saved.values()
    }


def base_layer_shapes(plan: Plan, base_params: PyTree) -> dict[str, tuple[int, ...]]:
    """Return the shapes of base weights that a file may hold.

    PEFT writes those of targeted embeddings and output heads.
    """
    biases = _biases(base_params)
    shapes: dict[str, tuple[int, ...]] = {}
    for target in plan.targets.values():
        shape = target.layout.torch_shape(target.shape)[len(target.stack) :]
        for name in target.names:
            shapes[f"{name}.base_layer.weight"] = shape
            if target.path[:-1] in biases:
                shapes[f"{name}.base_layer.bias"] = shape[:1]
    return shapes


def with_base_weights(
    params: T,
    adapter_name: str,
    base_weights: Mapping[str, ArrayLike],
    counters: Mapping[str, int],
) -> T:
    """Put base weights of a file into the tree, and note counters that have no leaf."""

    def update(path: jax.tree_util.KeyPath, leaf: PyTree) -> PyTree:
        parts = path_parts(path)
        if isinstance(leaf, LoHaWeight):
            if not (given := values_of(leaf.names, "weight")):
                return leaf
            weights = np.array(leaf.layout.unfold(leaf.kernel))
            stack = leaf.layout.sizes("s", leaf.kernel.shape)
            if not put(given, weights.reshape(math.prod(stack), *weights.shape[len(stack) :])):
                return leaf  # the same weight: the tree's own array is kept
            kernel = leaf.layout.fold(jnp.asarray(weights), leaf.kernel.shape)
            changed.append(leaf.label)
            return dataclasses.replace(leaf, kernel=kernel)
        if not is_adapted(leaf) and torch_parameter(parts) == "bias" and parts[:-1] in modules:
            if not (given := values_of(modules[parts[:-1]], "bias")):
                return leaf
            bias = np.array(leaf)
            if not put(given, bias.reshape(len(modules[parts[:-1]]), -1)):
                return leaf
            changed.append(".".join(parts))
            return jnp.asarray(bias)
        if isinstance(leaf, SavedWeight):
            own = tuple(
                (adapter_name, k, v)
                for k, v in counters.items()
                if _same_module(k, leaf.name) and k not in noted
            )
            noted.update(k for _, k, _ in own)
            return dataclasses.replace(leaf, counters=(*leaf.counters, *own)) if own else leaf
        return leaf

    def values_of(names: Sequence[str], part: str) -> dict[int, np.ndarray]:
        keys = {n: f"{name}.base_layer.{part}" for n, name in enumerate(names)}
        return {n: np.asarray(base_weights[key]) for n, key in keys.items() if key in base_weights}

    def put(given: Mapping[int, np.ndarray], modules: np.ndarray) -> bool:
        """Write values into the rows of a stack, and return whether that changed them."""
        before = modules.copy()
        for n, value in given.items():
            modules[n] = value.astype(modules.dtype)
        return not np.array_equal(modules, before)

    noted: set[str] = set()
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_adapted)
    modules = {
        path_parts(path)[:-1]: leaf.names for path, leaf in flat if isinstance(leaf, LoHaWeight)
    }
    changed: list[str] = []
    result = jax.tree_util.tree_map_with_path(update, params, is_leaf=is_adapted)
    return with_samples(result) if changed else result
