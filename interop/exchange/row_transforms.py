"""The modules of an adapter, between torch's rows and those of a kernel.

For W_torch = scale * W[permutation] the update follows the same rule. It is
(w1_a @ w1_b) * (w2_a @ w2_b) * alpha/r: both w*_a are permuted, and one of them is scaled.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from loha_jax.lowrank.row_transform import RowTransform
from loha_jax.lowrank.weight_decomposition import is_on_out
from loha_jax.tree.leaves import SavedWeight
from loha_jax.tree.plan import Target

from ..formats.adapter_file import AdapterModule

_Move = Callable[[RowTransform, np.ndarray, int], np.ndarray]
"""Moves the rows of an array, which are along an axis, by a transform."""


def with_torch_rows(module: AdapterModule, target: Target) -> AdapterModule:
    """Return a LoHa of a kernel's rows as torch has them."""
    return _moved(module, target, RowTransform.to_torch)


def with_kernel_rows(module: AdapterModule, target: Target) -> AdapterModule:
    """Return a LoHa of torch's rows as the kernel has them, in the dtype that its factors get."""
    return _moved(module, target, _from_torch(target))


def norms_of_kernel(norms: np.ndarray, target: Target) -> np.ndarray:
    """Return the norms of a weight decomposition as the kernel has them."""
    return _moved_norms(norms, target, _from_torch(target))


def _from_torch(target: Target) -> _Move:
    return functools.partial(RowTransform.from_torch, dtype=target.factor_dtype)


def _moved(module: AdapterModule, target: Target, move: _Move) -> AdapterModule:
    if (rows := target.rows) is None:
        return module
    axis = 1 if "hada_t1" in module.tensors else 0  # with cores [r, out], else [out, r]
    tensors = {
        **module.tensors,
        "hada_w1_a": move(rows, module.tensors["hada_w1_a"], axis),
        "hada_w2_a": move(rows.unscaled, module.tensors["hada_w2_a"], axis),
    }
    norms = module.dora_scale
    norms = None if norms is None else _moved_norms(norms, target, move)
    return dataclasses.replace(module, tensors=tensors, dora_scale=norms)


def _moved_norms(norms: np.ndarray, target: Target, move: _Move) -> np.ndarray:
    """Return norms `[out, 1, ...]` or `[1, in, 1, ...]` moved; those of inputs are only scaled."""
    if target.rows is None:
        return norms
    positive = target.rows.of_norms
    if not is_on_out(norms.shape, target.module_shape, 0):
        positive = RowTransform(scale=positive.scale)
    return move(positive, norms, 0)


def rows_of_copy(leaf: SavedWeight) -> RowTransform:
    """Return the transform of a copy that a module in `modules_to_save` has.

    Raises:
        ValueError: the parameter has several axes and no layout, so its rows are not known.
    """
    if leaf.rows is None or (leaf.layout is None and leaf.original.ndim > 1):
        raise ValueError(
            f"{leaf.name} of shape {list(leaf.original.shape)} has {leaf.rows}, and which of its "
            "axes are torch's rows is not known: leave its module out of modules_to_save"
        )
    return leaf.rows
