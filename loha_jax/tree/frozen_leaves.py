"""Parameters that training does not change, and that an adapter's file does not hold."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from loha_jax.tree.leaves import is_adapted, leaves_by_path

STATISTICS = {"mean", "var", "running_mean", "running_var", "num_batches_tracked", "count"}


def frozen_leaves(params: PyTree) -> dict[tuple[str, ...], Any]:
    """Return the parameters that training does not change, by path.

    Adapted leaves are left out. So is what a model changes by itself: statistics, and collections
    other than `params`.
    """
    found = leaves_by_path(params, is_adapted)
    only_params = any(path[:1] == ("params",) for path, _ in found)
    return {
        path: leaf
        for path, leaf in found
        if not is_adapted(leaf)
        and jax.numpy.issubdtype(getattr(leaf, "dtype", np.int32), np.floating)
        and path[-1] not in STATISTICS
        and (path[0] == "params" or not only_params)
    }
