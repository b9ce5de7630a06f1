"""Scaled float8 of a base checkpoint, read into leaves of a tree and written from them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from loha_jax.runtime.caller import warn_caller
from loha_jax.tree.merge import LOSS_LIMIT

from ..disk.base_checkpoint import Checkpoint, is_floating
from ..disk.quantised import Quantisation, dequantised, is_float8, quantised
from ..updates.rounding import Loss, overall
from .leaf_source import Source


def quantised_problem(
    quantisation: Quantisation, taken: Collection[str], key: str, target: np.dtype
) -> str | None:
    """Return why a leaf cannot get a tensor's values, or None.

    A tree that holds the scale too takes the values as they are stored.
    """
    if key in quantisation.scales:
        scale = quantisation.scales[key].key
        if scale in taken or not is_float8(target):
            return None
        return (
            f"{key} is multiplied by {scale}, for which a {target} leaf has no place: "
            "give dtype= or a wider leaf"
        )
    return quantisation.problems.get(key) if is_floating(target) else None


def rows_problem(quantisation: Quantisation, source: Source, taken: Collection[str]) -> str | None:
    """Return why a leaf with a transform of rows cannot hold stored float8 values, or None.

    Their scales are in another leaf, whose blocks the transform does not know.
    """
    scales = quantisation.scales
    held = [key for key in source.keys if key in scales and scales[key].key in taken]
    if source.rows is None or not held:
        return None
    return (
        f"{held[0]} is float8 as stored, with its scale {scales[held[0]].key} in another leaf, and "
        f"`names=` gives it {source.rows}. Load it with dtype= into a tree without the scale"
    )


def requantised(
    checkpoint: Checkpoint, key: str, value: np.ndarray, losses: dict[str, Loss]
) -> tuple[np.ndarray, np.ndarray]:
    """Return a tensor in the base's scaled float8, and its scale.

    Values that have not changed keep their bits.
    """
    scale = checkpoint.quantisation.scales[key]
    raw, old = checkpoint.read(key), checkpoint.read_scale(key)
    base = dequantised(raw, scale.rows(old, raw.shape))
    if np.array_equal(base.astype(value.dtype), value):
        return raw, old
    wide = value.astype(np.float32)
    if not np.isfinite(wide).all():
        raise ValueError(f"{key} has values that are not finite, which scaled float8 cannot hold")
    new = scale.renewed(old, scale.largest(np.abs(wide)), raw.dtype)
    spread = scale.rows(new, raw.shape)
    result = quantised(wide, spread, raw.dtype)
    parts = (dequantised(result, spread) - wide, wide - base, wide)
    losses[key] = Loss(raw.dtype.name, True, *(float(np.vdot(part, part)) for part in parts))
    return result, new


def warn_of_losses(losses: Mapping[str, Loss]) -> None:
    """Warn where quantising again lost more than half of the update."""
    if losses and (share := overall(list(losses.values()))) > LOSS_LIMIT:
        worst = max(losses, key=lambda key: losses[key].share)
        warn_caller(
            f"Quantising the merged weights to float8 again loses {share:.0%} of the update, most "
            f"in {worst} ({losses[worst].share:.0%}; relative error of the weight "
            f"{losses[worst].relative:.1%}). Save without base=, or onto a base of more bits, to "
            "keep it."
        )
