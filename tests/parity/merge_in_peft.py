"""Merged tensors beside those of the real PEFT, computed in one torch layer per tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from loha_jax.interop.disk.base_checkpoint import Checkpoint
from loha_jax.interop.formats.adapter_file import AdapterModule
from loha_jax.interop.formats.peft_files import peft_state
from loha_jax.interop.merge.plan import TensorUpdate, plan_merge
from loha_jax.interop.updates.low_rank_update import LowRankUpdate


@dataclasses.dataclass(frozen=True)
class CheckedTensor:
    """One merged tensor beside PEFT's.

    Attributes:
        key: of the tensor.
        max_difference: the largest absolute difference.
        units: the largest difference in units of what is allowed: one unit in the last place of the
            dtype; or, where that is less, what the float32 roundings of two computations of one
            value can come to.
    """

    key: str
    max_difference: float
    units: float

    @property
    def is_fine(self) -> bool:
        """True if all values are the same but for rounding."""
        return self.units <= 1


def compare_with_peft(
    merged: Path, base: Path, adapters: Sequence[tuple[Path, float]]
) -> tuple[list[CheckedTensor], list[str]]:
    """Merge in PEFT and compare.

    Args:
        merged: the merged checkpoint.
        base, adapters: what was merged.

    Returns:
        The comparisons, and the tensors that PEFT cannot merge: a LoHa with a weight decomposition
        or of a Conv3d, a weight decomposition that is scaled or one of several, and scaled float8.
    """
    checkpoint, ours = Checkpoint(base), Checkpoint(merged)
    plan, _ = plan_merge(checkpoint, adapters)
    able = [
        key
        for key, updates in plan.updates.items()
        if key not in plan.added and _is_known(checkpoint, key, updates)
    ]
    unable = [key for key in plan.updates if key not in able]
    results = []
    for key in able:
        given = plan.replaced.get(key)
        weight = checkpoint.read(key) if given is None else given.astype(checkpoint.dtypes[key])
        results.append(_compare(key, weight, ours.read(key), plan.updates[key]))
    return results, unable


def _is_known(checkpoint: Checkpoint, key: str, updates: list[TensorUpdate]) -> bool:
    decomposed = [u for u in updates if u.norms is not None]
    if len(checkpoint.shapes[key]) > 4 or key in checkpoint.quantisation.scales:
        return False
    return all(u.module.kind == "lora" and u.weight == 1 and len(updates) == 1 for u in decomposed)


def _compare(
    key: str, base: np.ndarray, ours: np.ndarray, updates: list[TensorUpdate]
) -> CheckedTensor:
    theirs = _merge_in_peft(base, ours.dtype, updates)
    a, b = (
        x.astype(np.float64 if x.dtype.itemsize > 4 else np.float32, copy=False)
        for x in (ours, theirs)
    )
    difference = np.abs(a - b)
    size = float(np.abs(base.astype(b.dtype)).max(initial=0))
    size += sum(abs(u.weight) * _largest_term(u.module) for u in updates)
    steps = max(_roundings(u.module) for u in updates)  # half a unit each, here and there
    allowed = np.maximum(_unit(b, ours.dtype), steps * float(np.finfo(np.float32).eps) * size)
    return CheckedTensor(
        key, float(difference.max(initial=0)), float((difference / allowed).max(initial=0))
    )


def _unit(values: np.ndarray, dtype: Any) -> np.ndarray:
    """One unit in the last place of numbers of a dtype."""
    info = jnp.finfo(dtype)
    exponent = np.floor(np.log2(np.maximum(np.abs(values.astype(np.float64)), float(info.tiny))))
    return np.exp2(exponent) * float(info.eps)


def _roundings(module: AdapterModule) -> int:
    """How many roundings one value of ΔW, added to W, goes through.

    Those of its longest sums, and of products.
    """
    return (
        sum(
            tensor.shape[0]
            for part, tensor in module.tensors.items()
            if part.endswith(("_b", "_A")) or "_t" in part
        )
        + 3
    )


def _largest_term(module: AdapterModule) -> float:
    """The largest sum of the sizes of what is added up for a value of ΔW."""
    sizes = {part: np.abs(tensor) for part, tensor in module.tensors.items()}
    update = LowRankUpdate.of(dataclasses.replace(module, tensors=sizes))
    step = max(1, (1 << 22) // update.columns)
    starts = range(0, update.rows, step)
    return max(float(np.abs(update.block(start, start + step)).max()) for start in starts)


def _merge_in_peft(base: np.ndarray, dtype: np.dtype, updates: list[TensorUpdate]) -> np.ndarray:
    import peft
    import torch

    transposed = updates[0].transposed
    weight = torch.from_numpy(
        np.array(base.T if transposed else base, np.float64 if base.itemsize > 4 else np.float32)
    )
    # One merge in the weight's own dtype is what PEFT does; several round once, here as there.
    if len(updates) == 1 and base.dtype == dtype and base.dtype.itemsize < 4:
        weight = weight.to(getattr(torch, dtype.name))
    model: Any = torch.nn.Module()
    model.layer = _layer(torch, weight)
    for update in updates:
        module = update.module
        model.config = {}
        wrapped = peft.get_peft_model(model, _peft_config(peft, module))
        state = {
            key: torch.from_numpy(tensor.astype(np.float32))
            for key, tensor in _state(module).items()
        }
        unexpected = peft.set_peft_model_state_dict(wrapped, state).unexpected_keys
        assert not unexpected, unexpected
        layer: Any = wrapped.base_model.model.layer
        if update.weight != 1:
            layer.set_scale("default", update.weight)
        model = wrapped.merge_and_unload()
    result = model.layer.weight.detach()
    result = result.to(getattr(torch, dtype.name)).float() if dtype.itemsize < 4 else result
    array = result.numpy()
    return (array.T if transposed else array).astype(dtype)


def _layer(torch: Any, weight: Any) -> Any:
    out, in_, *kernel = weight.shape
    kinds = {0: torch.nn.Linear, 1: torch.nn.Conv1d, 2: torch.nn.Conv2d}
    with torch.device("meta"):
        layer = kinds[len(kernel)](in_, out, *([tuple(kernel)] if kernel else []), bias=False)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


def _peft_config(peft: Any, module: AdapterModule) -> Any:
    if module.kind == "lora":
        alpha = module.alpha
        dora = module.dora_scale is not None
        return peft.LoraConfig(
            r=module.r, lora_alpha=alpha, target_modules=["layer"], use_dora=dora
        )
    cores = "hada_t1" in module.tensors
    return peft.LoHaConfig(
        r=module.r, alpha=module.alpha, target_modules=["layer"], use_effective_conv2d=cores
    )


def _state(module: AdapterModule) -> dict[str, np.ndarray]:
    """The module's tensors by the keys of a model whose one module is called "layer"."""
    return peft_state([dataclasses.replace(module, name="layer")], {})
