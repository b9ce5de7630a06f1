"""`inspect_path`: an adapter or a base checkpoint described in plain data."""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from loha_jax.lowrank.initial_values import FACTOR_NAMES
from loha_jax.runtime.untrusted import FileError

from ..disk.base_checkpoint import Checkpoint, is_floating
from ..disk.paired_files import find_adapter_file, pending_or_own
from ..disk.tensor_files import read_safetensors
from ..formats.adapter_file import AdapterFile, AdapterModule
from ..formats.lycoris_files import read_module
from ..formats.lycoris_keys import are_adapters, embeddings_note
from ..formats.peft_files import torch_name
from ..formats.peft_names import PREFIX, SAFETENSORS_NAME
from ..formats.ranks import rank_of
from ..formats.read_adapter import module_of, read_everything
from ..formats.wrong_loader import has_peft_config
from ..updates.best_factors import singular_values
from ..updates.low_rank_update import LowRankUpdate
from ..updates.norms import update_norm
from .training_checkpoint import is_training_checkpoint, read_training_checkpoint

_KINDS = {"loha": "LoHa", "lora": "LoRA"}


def inspect_path(path: str | Path, *, effective_ranks: bool = False) -> dict[str, Any]:
    """Describe what is at a path.

    Args:
        path: of an adapter, a checkpoint, or a folder that Orbax has written.
        effective_ranks: whether modules get an `effective_rank`: the exponential of the entropy of
            ΔW's singular values over their sum (Roy and Vetterli, 2007). It takes longer.

    Returns:
        Only JSON's types. For an adapter: `kind`, `modules` (name, own name, r, alpha, shapes,
        dtype, parameters, and ‖scale·ΔW‖ computed without materialising ΔW), `others`, `config`,
        `metadata`, `parameters`; of a checkpoint its tensors; of a folder that Orbax has written
        `modules`, `others`, `step`, `steps`, `items`. `problems` lists what is broken:
        values that are not finite, tensors that lack their partners or do not fit them. `remarks`
        lists what may be wrong: updates that are zero.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: it is no adapter and no checkpoint, or cannot be read.

    Example:
        >>> import tempfile, jax, loha_jax
        >>> config = loha_jax.LoHaConfig(r=2, target_modules=["q"])
        >>> base = {"q": {"kernel": np.ones((3, 4), np.float32)}}
        >>> params = loha_jax.inject(base, config, key=jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     loha_jax.interop.save_peft(folder, params)
        ...     inspect_path(folder)["remarks"]
        ['the update of q is zero: hada_w2_b is zero']
    """
    path = Path(path)
    if is_training_checkpoint(path):
        return _describe_training_checkpoint(path, effective_ranks)
    if not is_adapter(path):
        return _describe_checkpoint(Checkpoint(path))
    try:
        adapter = read_everything(path)
    except FileError as error:
        problems = _broken_modules(path)
        if problems is None:
            raise
        problems = problems or [str(error)]
        return {"path": str(path), "kind": None, "problems": problems, "remarks": []}
    return _describe_adapter(adapter, effective_ranks)


def is_adapter(path: Path) -> bool:
    """Return whether a path holds an adapter of any kind rather than a checkpoint.

    Raises:
        FileNotFoundError: nothing is there.
    """
    if not path.exists():
        raise FileNotFoundError(f"There is no file or folder '{path}'")
    if path.is_dir():
        if has_peft_config(path):
            return True
        if any(path.glob("*.index.json")):
            return False
        if not any(path.glob("*.safetensors")) and any(map(has_peft_config, path.iterdir())):
            return True  # PEFT's own error says which sub-folders hold adapters
        with contextlib.suppress(FileNotFoundError, FileError):
            return is_adapter(find_adapter_file(path))
        return False  # the checkpoint's own error says what there is
    if path.suffix != ".safetensors":
        return not path.name.endswith(".index.json")
    return are_adapters(Checkpoint(path).shapes)


def _broken_modules(path: Path) -> list[str] | None:
    """Return what is wrong with each module of a LoHa.

    None says that modules are not what is wrong: the file is corrupted, or lacks its settings.
    """
    file = pending_or_own(path, SAFETENSORS_NAME) if path.is_dir() else path
    if not file.is_file():
        file = next(iter(sorted(path.glob("*.safetensors"))), path)
    try:
        tensors = read_safetensors(file)
    except (OSError, ValueError):
        return None
    if any(key.startswith(PREFIX) for key in tensors) and not has_peft_config(path):
        return None
    parts_of: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in tensors.items():
        module, _, part = (torch_name(key) if path.is_dir() else key).rpartition(".")
        if part in FACTOR_NAMES:
            parts_of.setdefault(module, {})[part] = tensor
    problems: list[str] = []
    for module, parts in parts_of.items():
        try:
            (read_module if file == path else rank_of)(module, parts)
        except FileError as error:
            problems.append(str(error))
    return problems if tensors else None


def _describe_adapter(adapter: AdapterFile, effective_ranks: bool) -> dict[str, Any]:
    problems: list[str] = []
    remarks: list[str] = []
    modules = [
        _describe_module(own, module, effective_ranks, problems, remarks)
        for own, module in adapter.modules.items()
    ]
    for key, tensor in (*adapter.others.items(), *adapter.embeddings.items()):
        _check_finite(key, tensor, problems)
    remarks += [
        f"{own} is a {found.kind} adapter, which loha-jax neither loads nor merges"
        for own, found in adapter.foreign.items()
        if found.kind
    ]
    if unknown := [found.key for found in adapter.foreign.values() if not found.kind]:
        problems.append(
            f"keys that are not those of a LoHa ({len(unknown)}): {', '.join(unknown[:20])}"
        )
    if adapter.embeddings:
        remarks.append(embeddings_note(adapter.embeddings))
    kinds = _kinds_of(adapter)
    return {
        "path": str(adapter.path),
        "kind": adapter.form,
        "adapter": next(iter(kinds)).lower() if len(kinds) == 1 else "mixed",
        "kinds": kinds,
        **_sums(modules),
        "modules": modules,
        "foreign": [
            {"file_name": own, "kind": f.kind, "tensors": _shapes(f.tensors)}
            for own, f in adapter.foreign.items()
        ],
        "others": [
            _describe_tensor(key, t.shape, t.dtype) for key, t in other_tensors(adapter).items()
        ],
        # JSON has no NaN and no infinity, which Python reads and writes.
        "config": json.loads(json.dumps(adapter.config), parse_constant=str),
        "metadata": adapter.metadata,
        "problems": problems,
        "remarks": remarks,
    }


def _kinds_of(adapter: AdapterFile) -> dict[str, int]:
    """Return the kinds of the modules, with their numbers."""
    kinds = Counter(_KINDS[m.kind] for m in adapter.modules.values())
    if not adapter.config:
        kinds.update(["difference"] * len({module_of(key) for key in adapter.others}))
    kinds.update(found.kind or "unknown" for found in adapter.foreign.values())
    if adapter.embeddings:
        kinds["token embedding"] = len({key.split(".")[1] for key in adapter.embeddings})
    return dict(kinds)


def other_tensors(adapter: AdapterFile) -> dict[str, np.ndarray]:
    """Return all tensors besides the factors, also those that cannot be loaded."""
    foreign = {key: t for found in adapter.foreign.values() for key, t in found.tensors.items()}
    return {**adapter.others, **foreign, **adapter.embeddings}


def dtypes_of(module: AdapterModule) -> str:
    """Return the dtypes of a module's factors; usually one."""
    return "/".join(sorted({str(tensor.dtype) for tensor in module.tensors.values()}))


def _shapes(tensors: Mapping[str, np.ndarray]) -> dict[str, list[int]]:
    return {key: list(tensor.shape) for key, tensor in tensors.items()}


def _describe_module(
    own: str,
    module: AdapterModule,
    effective_ranks: bool,
    problems: list[str],
    remarks: list[str],
) -> dict[str, Any]:
    tensors = module.arrays
    finite = [_check_finite(f"{own}.{part}", tensor, problems) for part, tensor in tensors.items()]
    update, norm = None, None
    try:
        update = LowRankUpdate.of(module)
        norm = update_norm(update) if all(finite) else None
    except ValueError as error:
        remarks.append(f"no norm: {error}")
    if norm == 0:
        zero = [part for part, tensor in module.tensors.items() if not tensor.any()]
        why = "alpha is zero" if module.alpha == 0 else "its factors cancel"
        why = f"{', '.join(zero)} is zero" if zero else why
        remarks.append(f"the update of {own} is zero: {why}")
    return {
        "name": module.name,
        "file_name": own,
        "kind": module.kind,
        "r": module.r,
        "alpha": module.alpha,
        "scaling": module.alpha / module.r,
        "rows": update.rows if update else len(module.tensors["lora_B"]),
        "columns": update.columns if update else math.prod(module.tensors["lora_A"].shape[1:]),
        "form": "lora" if module.kind == "lora" else "cp" if "hada_t1" in tensors else "flat",
        "dora": module.dora_scale is not None,
        "dtype": dtypes_of(module),
        "parameters": sum(tensor.size for tensor in tensors.values()),
        "norm": _number(norm),
        **({"effective_rank": _effective_rank(update, norm)} if effective_ranks else {}),
        "tensors": _shapes(tensors),
    }


def _effective_rank(update: LowRankUpdate | None, norm: float | None) -> float | None:
    if update is None or not norm or not math.isfinite(norm):
        return None
    values = singular_values(update)
    shares = values[values > 0] / values.sum()
    return _number(math.exp(-float(np.sum(shares * np.log(shares)))))


def _check_finite(key: str, tensor: np.ndarray, problems: list[str]) -> bool:
    if not is_floating(tensor.dtype):
        return True
    values = tensor.astype(np.float32) if tensor.dtype.itemsize < 4 else tensor
    nan, infinite = int(np.isnan(values).sum()), int(np.isinf(values).sum())
    if nan or infinite:
        problems.append(f"{key} has {nan} NaN and {infinite} infinite values of {values.size}")
    return not nan and not infinite


def _describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    tensors = [
        _describe_tensor(key, shape, checkpoint.dtypes[key])
        for key, shape in checkpoint.shapes.items()
    ]
    return {
        "path": str(checkpoint.path),
        "kind": "checkpoint",
        "files": [file.name for file in checkpoint.files],
        "bytes": sum(file.stat().st_size for file in checkpoint.files),
        "dtypes": sorted({tensor["dtype"] for tensor in tensors}),
        "parameters": sum(math.prod(shape) for shape in checkpoint.shapes.values()),
        "tensors": tensors,
        "metadata": checkpoint.header(checkpoint.files[0]).metadata,
        "problems": [],
        "remarks": [],
    }


def _describe_training_checkpoint(path: Path, effective_ranks: bool) -> dict[str, Any]:
    found = read_training_checkpoint(path)
    problems: list[str] = []
    modules = [
        _describe_module(m.name, m, effective_ranks, problems, found.remarks) for m in found.modules
    ]
    return {
        "path": str(path),
        "kind": "orbax",
        "step": found.step,
        "steps": found.steps,
        "items": found.items,
        **_sums(modules),
        "modules": modules,
        "others": [_describe_tensor(*array) for array in found.others],
        "problems": problems,
        "remarks": found.remarks,
    }


def _sums(modules: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what all modules of an adapter have together."""
    return {
        "ranks": sorted({m["r"] for m in modules}),
        "alphas": sorted({m["alpha"] for m in modules}),
        "dtypes": sorted({m["dtype"] for m in modules}),
        "parameters": sum(m["parameters"] for m in modules),
        "norm": _number(math.hypot(*(m["norm"] for m in modules if m["norm"] is not None))),
    }


def _describe_tensor(key: str, shape: tuple[int, ...], dtype: np.dtype) -> dict[str, Any]:
    return {"name": key, "shape": list(shape), "dtype": str(dtype)}


def _number(value: float | None) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if value is not None and math.isfinite(value) else None
