"""Leaves that an adapter leaves as they are, and that its file does not hold."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from loha_jax.targets.module_names import path_parts
from loha_jax.tree.leaves import is_adapted

_STATISTICS = {"mean", "var", "running_mean", "running_var", "num_batches_tracked", "count"}


def frozen_leaves(params: PyTree) -> dict[tuple[str, ...], Any]:
    """Return the leaves of a tree that stay as they are in training, by path.

    Adapted leaves are left out, and what a model changes by itself: statistics, and collections
    beside `params`.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_adapted)
    paths = [path_parts(path) for path, _ in flat]
    only_params = any(path[:1] == ("params",) for path in paths)
    return {
        path: leaf
        for path, (_, leaf) in zip(paths, flat, strict=True)
        if not is_adapted(leaf)
        and jax.numpy.issubdtype(getattr(leaf, "dtype", np.int32), np.floating)
        and path[-1] not in _STATISTICS
        and (path[0] == "params" or not only_params)
    }
