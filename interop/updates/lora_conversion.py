"""LoHa as LoRA and back, for the factors of one module, without a matrix of the weight's shape.

A Hadamard product of two matrices of rank r has the rank r² and known factors (Khatri-Rao): ΔW = KA
@ KB, which is a LoRA already. Its singular values are those of Ra @ Rbᵀ, where Ra and Rb are the
small triangles of the QR decompositions of KA and KBᵀ; cutting them off gives the best
approximation of every rank (Eckart and Young, "The approximation of one matrix by another of lower
rank", Psychometrika 1936).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import DTypeLike

from loha_jax.runtime.scalars import is_integer, plain_scalar

from ..formats.adapter_file import AdapterModule
from .best_factors import best_factors, over_all_channels
from .low_rank_update import LowRankUpdate


def lora_of(
    module: AdapterModule,
    rank: int | None = None,
    energy: float | None = None,
    *,
    shape: Sequence[int] | None = None,
    groups: int = 1,
) -> tuple[AdapterModule, float]:
    """Return the LoRA of one module's update: the exact one, or the best one of a smaller rank.

    The exact rank is r², or less where the weight itself has less or columns of the Khatri-Rao
    factors are zero.

    Args:
        module: of kind "loha" (or "lora", to lower its rank).
        rank: at most this rank; of a grouped convolution, the next multiple of the groups.
        energy: in (0, 1]: the smallest rank that keeps this share of the sum of the squared
            singular values, as in PEFT's `convert_to_lora`.
        shape: of the weight in torch's orientation, `[out, in/groups, *spatial]`. Flat factors do
            not show the kernel of a convolution; without `shape` they are a linear layer's.
        groups: of a convolution. PEFT's LoRA has factors over all in channels there, which are zero
            outside a group's.

    Returns:
        The module, of kind "lora", with alpha = r: the scaling is in the factors; and the relative
        error of the update in the Frobenius norm. The tensors are float32, or float64 where the
        factors are.

    Raises:
        ValueError: rank or energy are out of range or both given, the module's norms are per input
            feature (PEFT's DoRA has none) or those of a grouped convolution, `shape` or
            `groups` do not fit, or a factor is not finite.

    Example:
        >>> one = {f"hada_w{n}_a": np.ones((3, 2)) for n in "12"}
        >>> one |= {f"hada_w{n}_b": np.ones((2, 4)) for n in "12"}
        >>> lora, error = lora_of(AdapterModule("q", "loha", 2, 2.0, one), rank=1)
        >>> lora.r, lora.tensors["lora_A"].shape, bool(error < 1e-12)
        (1, (1, 4), True)
    """
    check_limits(rank, energy)
    if module.kind == "lora" and module.tensors["lora_B"].shape[1] != module.r:
        raise ValueError(
            f"{module.name} is the LoRA of a convolution in groups; its rank cannot be lowered here"
        )
    update = LowRankUpdate.of(module)
    in_shape = _in_shape(module, update, shape)
    groups = plain_scalar(groups)
    if not is_integer(groups) or groups < 1:
        raise ValueError(
            f"The groups of {module.name} should be a positive integer value but are {groups!r}"
        )
    if update.rows % groups:
        raise ValueError(
            f"{module.name} has {update.rows} out channels, which {groups} groups do not divide"
        )
    for part, tensor in module.tensors.items():
        if not np.isfinite(tensor).all():
            raise ValueError(
                f"{module.name}.{part} has values that are not finite; it has no singular values"
            )
    if module.dora_scale is not None:
        _check_norms(module, update.rows, groups)
    left, right, error = best_factors(update, rank, energy, groups)
    slots = left.shape[1]
    lora_a = right if groups == 1 else over_all_channels(right, in_shape)
    ones = (1,) * (len(in_shape) - 1)
    tensors = {
        "lora_A": lora_a.reshape(groups * slots, groups * in_shape[0], *in_shape[1:]),
        "lora_B": left.reshape(update.rows, slots, *ones),
    }
    r = groups * slots
    tensors = cast_tensors(
        module.name,
        tensors,
        np.result_type(*(side.dtype for pair in update.pairs for side in pair)),
    )
    return dataclasses.replace(module, kind="lora", r=r, alpha=float(r), tensors=tensors), error


def of_one_rank(modules: Mapping[str, AdapterModule]) -> dict[str, AdapterModule]:
    """Return LoRAs of one rank: the largest, or the next one that all groups divide.

    Zeros are added to the factors; the updates are the same, and alpha is r.
    """
    groups = {name: m.r // m.tensors["lora_B"].shape[1] for name, m in modules.items()}
    step = math.lcm(*groups.values())
    r = -(-max(module.r for module in modules.values()) // step) * step
    return {name: _padded(module, r, groups[name]) for name, module in modules.items()}


def _padded(module: AdapterModule, r: int, groups: int) -> AdapterModule:
    a, b = module.tensors["lora_A"], module.tensors["lora_B"]
    slots = b.shape[1]
    more = (0, r // groups - slots)
    by_group = a.reshape(groups, slots, *a.shape[1:])  # [r, in, ...] -> [groups, slots, in, ...]
    by_group = np.pad(by_group, [(0, 0), more, *[(0, 0)] * (a.ndim - 1)])
    tensors = {
        "lora_A": by_group.reshape(r, *a.shape[1:]),
        "lora_B": np.pad(b, [(0, 0), more, *[(0, 0)] * (b.ndim - 2)]),
    }
    return dataclasses.replace(module, r=r, alpha=float(r), tensors=tensors)


def cast_tensors(
    name: str, tensors: Mapping[str, np.ndarray], dtype: DTypeLike
) -> dict[str, np.ndarray]:
    """Return the tensors of a module in another dtype.

    Raises:
        ValueError: a value is too large for it.
    """
    with np.errstate(over="ignore"):
        result = {key: tensor.astype(dtype) for key, tensor in tensors.items()}
    for key, tensor in result.items():
        if not np.isfinite(tensor).all():
            largest = float(np.abs(tensors[key]).max())
            raise ValueError(
                f"{name}.{key} has values up to {largest:.3g}, too large for {np.dtype(dtype)}"
            )
    return result


def check_limits(rank: int | None, energy: float | None) -> None:
    """Raise ValueError for a rank or an energy threshold that `lora_of` cannot use."""
    rank, energy = plain_scalar(rank), plain_scalar(energy)
    if rank is not None and energy is not None:
        raise ValueError(f"Give `rank` or `energy`, not both: got rank={rank} and energy={energy}")
    if rank is not None and (not is_integer(rank) or rank < 1):
        raise ValueError(
            f"`rank` should be a positive integer value but the value passed is {rank!r}"
        )
    if energy is not None and (
        isinstance(energy, bool) or not isinstance(energy, int | float) or not 0 < energy <= 1
    ):  # fmt: skip
        raise ValueError(
            "`energy` should be a share in (0, 1] of the squared singular values but the value "
            f"passed is {energy!r}"
        )


def _in_shape(
    module: AdapterModule, update: LowRankUpdate, shape: Sequence[int] | None
) -> tuple[int, ...]:
    """Return `(in, *spatial)` of the weight."""
    if shape is None:
        return update.in_shape or (update.columns,)
    if not update.fits(tuple(shape)):
        raise ValueError(
            f"The update of {module.name} has {update.rows} rows and {update.columns} columns; the "
            f"weight's shape {list(shape)} does not fit"
        )
    return tuple(shape[1:])


def _check_norms(module: AdapterModule, out: int, groups: int) -> None:
    """Raise ValueError for norms that PEFT's DoRA cannot have."""
    assert module.dora_scale is not None
    if module.dora_scale.shape[0] != out or module.dora_scale.size != out:
        raise ValueError(
            f"The weight decomposition of {module.name} has norms per input feature "
            f"{list(module.dora_scale.shape)}, and PEFT's DoRA has only norms per output feature. "
            "Merge the adapter instead."
        )
    if groups > 1:
        raise ValueError(
            f"{module.name} is a convolution in {groups} groups with a weight decomposition, and "
            "PEFT's DoRA cannot compute the norms of one. Merge the adapter instead."
        )


def loha_of(module: AdapterModule, spare: np.ndarray | None = None) -> AdapterModule:
    """Return the LoHa that equals a LoRA: its second pair of factors makes a matrix of ones.

    Args:
        module: of kind "lora".
        spare: `[out, r]`: what `hada_w2_a` holds but for its first column; zeros by default. The
            rows of `hada_w2_b` that they meet are zero, so the update does not depend on them.

    Raises:
        ValueError: a convolution in groups whose `lora_A` reads channels of another group, which no
            change of its weight does.
    """
    lora_a, lora_b = module.tensors["lora_A"], module.tensors["lora_B"]
    out, slots = lora_b.shape[:2]
    groups = module.r // slots
    columns = lora_a.reshape(groups, slots, groups, -1)
    for group in range(groups):
        if np.delete(columns[group], group, axis=1).any():
            raise ValueError(
                f"{module.name} is a convolution in {groups} groups, and lora_A of group {group} "
                "reads channels of another one. No change of the convolution's weight does that, "
                "so LoHa has no such update."
            )
    w1_a = np.zeros((groups, out // groups, groups, slots), lora_b.dtype)
    w1_b = np.stack([columns[group, :, group] for group in range(groups)])
    for group in range(groups):
        w1_a[group, :, group] = lora_b.reshape(groups, out // groups, slots)[group]
    w1_a, w1_b = w1_a.reshape(out, module.r), w1_b.reshape(module.r, -1)
    w2_a = np.zeros_like(w1_a) if spare is None else np.array(spare, w1_a.dtype)
    w2_b = np.zeros_like(w1_b)
    w2_a[:, 0], w2_b[0] = 1, 1
    tensors = {"hada_w1_a": w1_a, "hada_w1_b": w1_b, "hada_w2_a": w2_a, "hada_w2_b": w2_b}
    spatial = lora_a.shape[2:]
    in_shape = (columns.shape[-1] // math.prod(spatial), *spatial) if spatial else None
    return dataclasses.replace(module, kind="loha", tensors=tensors, in_shape=in_shape)
