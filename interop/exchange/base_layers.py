"""Base weights in a PEFT file: those of targeted embeddings and output heads.

PEFT writes them as `<module>.base_layer.weight` and `.bias` (`save_embedding_layers="auto"`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from loha_jax.runtime.processes import on_host
from loha_jax.targets.config import LoHaConfig
from loha_jax.targets.module_names import torch_parameter
from loha_jax.tree.inject import with_samples
from loha_jax.tree.leaves import LoHaWeight, flatten_whole, is_adapted, leaves_by_path
from loha_jax.tree.plan import Plan

from .from_tree import adapted_kernels, adapted_modules

T = TypeVar("T")

_EMBEDDINGS = ("embed_tokens", "lm_head")


def base_layers(params: PyTree, adapter_name: str) -> dict[str, np.ndarray]:
    """Return the base weights that PEFT writes with an adapter, by its keys without the prefix."""
    biases = _biases(params)
    state: dict[str, np.ndarray] = {}
    for path, leaf in adapted_kernels(params, adapter_name):
        own = adapted_modules(leaf, adapter_name)
        embeddings = [name for name in own if name.rpartition(".")[2] in _EMBEDDINGS]
        if not embeddings or not _targets_embeddings(leaf.adapters[adapter_name].config):
            continue
        weights = on_host(leaf.layout.unfold(leaf.kernel))
        weights = weights.reshape(-1, *weights.shape[len(leaf.layout.axes("s")) :])
        move = (lambda x: x) if leaf.rows is None else leaf.rows.to_torch
        for name in embeddings:
            index = leaf.names.index(name)
            state[f"{name}.base_layer.weight"] = move(weights[index])
            if (bias := biases.get(path[:-1])) is not None:
                stacked = on_host(bias).reshape(-1, weights.shape[1])
                state[f"{name}.base_layer.bias"] = move(stacked[index])
    return state


def _biases(params: PyTree) -> dict[tuple[str, ...], jax.Array]:
    """Return the biases of a tree by the path of their module."""
    return {
        path[:-1]: leaf
        for path, leaf in leaves_by_path(params)
        if not is_adapted(leaf) and torch_parameter(path) == "bias"
    }


def _targets_embeddings(config: LoHaConfig) -> bool:
    # PEFT's test is `name in target_modules`: membership in a list, a substring of a regex.
    targets = config.target_modules or ()
    return any(name in targets for name in _EMBEDDINGS)  # type: ignore[operator]


def base_layer_shapes(plan: Plan, base_params: PyTree) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the base weights that a file may hold, by name."""
    biases = _biases(base_params)
    shapes: dict[str, tuple[int, ...]] = {}
    for target in plan.targets.values():
        shape = target.module_shape
        for name in target.names:
            shapes[f"{name}.base_layer.weight"] = shape
            if target.path[:-1] in biases:
                shapes[f"{name}.base_layer.bias"] = shape[:1]
    return shapes


def with_base_layers(params: T, weights: Mapping[str, np.ndarray]) -> T:
    """Return the tree with base weights of a file.

    Args:
        params: an adapted tree. Arrays that already have the values are kept.
        weights: by the names of `base_layer_shapes`.
    """
    leaves, treedef = flatten_whole(params)
    paths = [path for path, _ in leaves_by_path(params)]
    adapted = {
        path[:-1]: leaf
        for path, leaf in zip(paths, leaves, strict=True)
        if isinstance(leaf, LoHaWeight)
    }
    changed = False
    for n, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        new = None
        if isinstance(leaf, LoHaWeight):
            if given := _given(leaf, "weight", weights, leaf.kernel.dtype):
                new = _replaced(leaf.layout.unfold(leaf.kernel), len(leaf.names), given)
            if new is not None:
                new = dataclasses.replace(leaf, kernel=leaf.layout.fold(new, leaf.kernel.shape))
        elif torch_parameter(path) == "bias" and not is_adapted(leaf):
            owner = adapted.get(path[:-1])
            if owner is not None and (given := _given(owner, "bias", weights, leaf.dtype)):
                new = _replaced(leaf, len(owner.names), given)
        if new is not None:
            leaves[n], changed = new, True
    result = treedef.unflatten(leaves)
    return with_samples(result) if changed else result


def _given(
    leaf: LoHaWeight, part: str, weights: Mapping[str, np.ndarray], dtype: np.dtype
) -> dict[int, np.ndarray]:
    """Return the base weights of a stack that the file holds, by index, with the kernel's rows."""
    keys = {n: f"{name}.base_layer.{part}" for n, name in enumerate(leaf.names)}
    found = {n: np.asarray(weights[key]) for n, key in keys.items() if key in weights}
    if (rows := leaf.rows) is None:
        return found
    return {n: rows.from_torch(value, dtype=dtype) for n, value in found.items()}


def _replaced(old: jax.Array, count: int, given: Mapping[int, np.ndarray]) -> jax.Array | None:
    """Return a stack of `count` modules with the values of a file; None if these change nothing."""
    new = np.array(old, order="C")
    modules = new.reshape(count, -1)  # a view
    for n, value in given.items():
        modules[n] = value.reshape(-1)
    return None if np.array_equal(new, np.asarray(old)) else jnp.asarray(new)
