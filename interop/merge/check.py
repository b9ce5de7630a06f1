"""Compares merged tensors with what the real PEFT makes of them, one torch layer of the tensor's shape at a time."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from loha_jax.interop.disk.base_checkpoint import Checkpoint
from loha_jax.interop.formats.adapter_file import AdapterModule
from loha_jax.interop.formats.peft_files import peft_state
from loha_jax.interop.merge.plan import MergePlan, TensorUpdate
from loha_jax.interop.updates.low_rank_update import LowRankUpdate


@dataclasses.dataclass(frozen=True)
class CheckedTensor:
    """One merged tensor beside PEFT's.

    Attributes:
        key: of the tensor.
        max_difference: the largest absolute difference.
        units: the largest difference in units of what is allowed: one unit in the last place of the dtype; or, where
            that is less, what the float32 roundings of two computations of one value can come to.
    """

    key: str
    max_difference: float
    units: float

    @property
    def is_fine(self) -> bool:
        """Whether all values are the same but for rounding."""
        return self.units <= 1


class MergeCheckError(Exception):
    """Merged tensors are not those of PEFT."""


def require_peft() -> None:
    """Raises ImportError where torch or peft is not installed."""
    if missing := [name for name in ("torch", "peft") if importlib.util.find_spec(name) is None]:
        raise ImportError(f"Checking a merge against PEFT needs {' and '.join(missing)}: pip install torch peft")


def check_merge(
    folder: Path,
    checkpoint: Checkpoint,
    plan: MergePlan,
    *,
    count: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[CheckedTensor], list[str]]:
    """Merges in PEFT and compares.

    Args:
        folder: the merged checkpoint.
        checkpoint, plan: what was merged.
        count: how many tensors, spread evenly; all by default.
        progress: called with the number of tensors compared and their number in all.

    Returns:
        The comparisons; and the tensors that PEFT cannot merge: a LoHa with a weight decomposition or of a Conv3d, a
        weight decomposition that is scaled or one of several, and scaled float8.
    """
    merged = Checkpoint(folder)
    able = [
        key for key, updates in plan.updates.items() if key not in plan.added and _is_known(checkpoint, key, updates)
    ]
    unable = [key for key in plan.updates if key not in able]
    chosen = able
    if count is not None and count < len(able):
        chosen = [able[n * len(able) // count] for n in range(count)]
    results = []
    for done, key in enumerate(chosen, 1):
        given = plan.replaced.get(key)
        base = checkpoint.read(key) if given is None else given.astype(checkpoint.dtypes[key])
        results.append(_compare(key, base, merged.read(key), plan.updates[key]))
        if progress is not None:
            progress(done, len(chosen))
    return results, unable


def _is_known(checkpoint: Checkpoint, key: str, updates: list[TensorUpdate]) -> bool:
    decomposed = [u for u in updates if u.norms is not None]
    if len(checkpoint.shapes[key]) > 4 or key in checkpoint.quantisation.scales:
        return False
    return all(u.module.kind == "lora" and u.weight == 1 and len(updates) == 1 for u in decomposed)


def _compare(key: str, base: np.ndarray, ours: np.ndarray, updates: list[TensorUpdate]) -> CheckedTensor:
    theirs = _merge_in_peft(base, ours.dtype, updates)
    a, b = (x.astype(np.float64 if x.dtype.itemsize > 4 else np.float32, copy=False) for x in (ours, theirs))
    difference = np.abs(a - b)
    size = float(np.abs(base.astype(b.dtype)).max(initial=0))
    size += sum(abs(u.weight) * _largest_term(u.module) for u in updates)
    steps = max(_roundings(u.module) for u in updates)  # half a unit each, here and there
    allowed = np.maximum(_unit(b, ours.dtype), steps * float(np.finfo(np.float32).eps) * size)
    return CheckedTensor(key, float(difference.max(initial=0)), float((difference / allowed).max(initial=0)))


def _unit(values: np.ndarray, dtype: Any) -> np.ndarray:
    """One unit in the last place of numbers of a dtype."""
    info = jnp.finfo(dtype)
    exponent = np.floor(np.log2(np.maximum(np.abs(values.astype(np.float64)), float(info.tiny))))
    return np.exp2(exponent) * float(info.eps)


def _roundings(module: AdapterModule) -> int:
    """How many roundings one value of ΔW, added to W, goes through: those of its longest sums, and of products."""
    return (
        sum(tensor.shape[0] for part, tensor in module.tensors.items() if part.endswith(("_b", "_A")) or "_t" in part)
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
    weight = torch.from_numpy(np.array(base.T if transposed else base, np.float64 if base.itemsize > 4 else np.float32))
    # One merge in the weight's own dtype is what PEFT does; several round once, here as there.
    if len(updates) == 1 and base.dtype == dtype and base.dtype.itemsize < 4:
        weight = weight.to(getattr(torch, dtype.name))
    model: Any = torch.nn.Module()
    model.layer = _layer(torch, weight)
    for update in updates:
        module = update.module
        model.config = {}
        wrapped = peft.get_peft_model(model, _peft_config(peft, module))
        state = {key: torch.from_numpy(tensor.astype(np.float32)) for key, tensor in _state(module).items()}
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
        return peft.LoraConfig(r=module.r, lora_alpha=alpha, target_modules=["layer"], use_dora=dora)
    cores = "hada_t1" in module.tensors
    return peft.LoHaConfig(r=module.r, alpha=module.alpha, target_modules=["layer"], use_effective_conv2d=cores)


def _state(module: AdapterModule) -> dict[str, np.ndarray]:
    """The module's tensors by the keys of a model whose one module is called "layer"."""
    return peft_state([dataclasses.replace(module, name="layer")], {})
