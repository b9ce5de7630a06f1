"""`compare_paths`: the differences of two adapters by module, or of two checkpoints by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from ..disk.base_checkpoint import Checkpoint, accumulator, is_floating
from ..formats.adapter_file import AdapterFile, AdapterModule
from ..formats.read_adapter import read_everything
from ..updates.low_rank_update import LowRankUpdate
from ..updates.norms import difference_norm, update_norm
from .inspection import dtypes_of, is_adapter, other_tensors

_BLOCK = 1 << 22


def compare_paths(
    first: str | Path,
    second: str | Path,
    *,
    tolerance: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Compare two adapters of any formats, or two checkpoints.

    Args:
        first, second: paths of the same kind.
        tolerance: of adapters, the relative difference ‖ΔW_A − ΔW_B‖/‖ΔW_A‖ up to which modules
            count as equal; of checkpoints, the absolute difference of values.
        progress: of checkpoints, called with the number of tensors compared so far and in total.

    Returns:
        Only JSON's types: `different`, `only_first`, `only_second`, `tolerance`, and a row for each
        common module or tensor.

    Raises:
        ValueError: one is an adapter and the other one a checkpoint, or a file cannot be read.

    Example:
        >>> import tempfile
        >>> from safetensors.numpy import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     a, b = f"{folder}/a.safetensors", f"{folder}/b.safetensors"
        ...     save_file({"w": np.ones(3)}, a)
        ...     save_file({"w": np.zeros(3)}, b)
        ...     compare_paths(a, b)["tensors"][0]["max_difference"]
        1.0
    """
    first, second = Path(first), Path(second)
    kinds = [is_adapter(path) for path in (first, second)]
    if kinds[0] != kinds[1]:
        adapter, other = (first, second) if kinds[0] else (second, first)
        raise ValueError(
            f"{adapter} is an adapter and {other} a checkpoint; two of a kind can be compared"
        )
    if kinds[0]:
        result = _compare_adapters(*_read_both(first, second), tolerance)
    else:
        result = _compare_checkpoints(Checkpoint(first), Checkpoint(second), tolerance, progress)
    return {**result, "tolerance": tolerance}


def _read_both(first: Path, second: Path) -> tuple[AdapterFile, AdapterFile]:
    """Return both adapters; dotted names of one tell what underscores in the other stand for."""
    a, b = read_everything(first), read_everything(second)
    dotted = [[m.name for m in x.modules.values() if not m.prefix.endswith("_")] for x in (a, b)]
    if dotted[0] and not dotted[1]:
        b = read_everything(second, modules=dotted[0])
    elif dotted[1] and not dotted[0]:
        a = read_everything(first, modules=dotted[1])
    return a, b


def _by_name(adapter: AdapterFile) -> dict[str, AdapterModule]:
    """Return modules by their names, with prefixes if the file holds several models."""
    several = len({m.prefix for m in adapter.modules.values()}) > 1
    return {(own if several else m.name): m for own, m in adapter.modules.items()}


def _compare_adapters(first: AdapterFile, second: AdapterFile, tolerance: float) -> dict[str, Any]:
    a, b = _by_name(first), _by_name(second)
    result = _summary("adapters", (first.path, second.path), (a, b))
    rows = [_compare_modules(name, a[name], b[name], tolerance) for name in a if name in b]
    others = _compare_others(first, second)
    result["different"] |= bool(others) or any(row["different"] for row in rows)
    return {**result, "modules": rows, "others": others}


def _compare_modules(
    name: str, a: AdapterModule, b: AdapterModule, tolerance: float
) -> dict[str, Any]:
    first, second = LowRankUpdate.of(a), LowRankUpdate.of(b)
    row: dict[str, Any] = {
        "name": name,
        "r": [a.r, b.r],
        "alpha": [a.alpha, b.alpha],
        "dtype": [dtypes_of(a), dtypes_of(b)],
        "shape": [[u.rows, u.columns] for u in (first, second)],
        "bit_equal": _bit_equal(a, b),
        "norms_differ": not _same_norms(a.dora_scale, b.dora_scale),
        "norm": None,
        "difference": None,
        "relative": None,
        "different": True,
    }
    if row["shape"][0] != row["shape"][1]:
        return row
    norm = update_norm(first)
    are_same = row["bit_equal"] and a.alpha / a.r == b.alpha / b.r
    difference = 0.0 if are_same else difference_norm(first, second)
    if not math.isfinite(norm) or not math.isfinite(difference):
        return row
    relative = difference / norm if norm else (0.0 if difference == 0 else None)
    row |= {"norm": norm, "difference": difference, "relative": relative}
    row["different"] = relative is None or relative > tolerance or row["norms_differ"]
    return row


def _bit_equal(a: AdapterModule, b: AdapterModule) -> bool:
    return a.tensors.keys() == b.tensors.keys() and all(
        (t.dtype, t.shape, t.tobytes()) == (u.dtype, u.shape, u.tobytes())
        for t, u in ((tensor, b.tensors[part]) for part, tensor in a.tensors.items())
    )


def _same_norms(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is b if a is None or b is None else np.array_equal(a, b)


def _compare_others(first: AdapterFile, second: AdapterFile) -> list[dict[str, str]]:
    """Return the differing tensors besides the factors."""
    a, b = other_tensors(first), other_tensors(second)
    result: dict[str, str] = {}
    for key in dict.fromkeys((*a, *b)):
        if key not in a or key not in b:
            result[key] = f"only in the {'first' if key in a else 'second'}"
        elif a[key].shape != b[key].shape:
            result[key] = f"{list(a[key].shape)} and {list(b[key].shape)}"
        elif not np.array_equal(a[key], b[key]):
            result[key] = f"up to {_largest(a[key].reshape(-1), b[key].reshape(-1)):.3g}"
    return [{"name": key, "difference": difference} for key, difference in result.items()]


def _summary(
    kind: str, paths: tuple[Path, Path], names: tuple[Collection[str], Collection[str]]
) -> dict[str, Any]:
    """Return the part of a result that adapters and checkpoints share."""
    only = [[name for name in names[n] if name not in names[1 - n]] for n in (0, 1)]
    return {
        "kind": kind,
        "first": str(paths[0]),
        "second": str(paths[1]),
        "different": bool(only[0] or only[1]),
        "only_first": only[0],
        "only_second": only[1],
    }


def _compare_checkpoints(
    a: Checkpoint, b: Checkpoint, tolerance: float, progress: Callable[[int, int], None] | None
) -> dict[str, Any]:
    result = _summary("checkpoints", (a.path, b.path), (a.shapes, b.shapes))
    common = [key for key in a.shapes if key in b.shapes]
    rows = []
    for done, key in enumerate(common, 1):
        row: dict[str, Any] = {
            "name": key,
            "shape": [list(a.shapes[key]), list(b.shapes[key])],
            "dtype": [str(a.dtypes[key]), str(b.dtypes[key])],
            "max_difference": None,
            "different": True,
        }
        if a.shapes[key] == b.shapes[key]:
            largest = _largest(a.read(key).reshape(-1), b.read(key).reshape(-1))
            row["max_difference"] = largest if math.isfinite(largest) else None
            row["different"] = not largest <= tolerance
        rows.append(row)
        if progress is not None:
            progress(done, len(common))
    result["different"] |= any(row["different"] for row in rows)
    return {**result, "tensors": rows}


def _largest(a: np.ndarray, b: np.ndarray) -> float:
    """Return the largest absolute difference of two vectors; NaN if only one has NaN, and so on."""
    largest = 0.0
    for start in range(0, a.size, _BLOCK):
        x, y = a[start : start + _BLOCK], b[start : start + _BLOCK]
        if x.dtype == y.dtype and x.tobytes() == y.tobytes():
            continue
        if is_floating(x.dtype) or is_floating(y.dtype):
            x, y = (v.astype(accumulator(v.dtype), copy=False) for v in (x, y))
            with np.errstate(invalid="ignore"):
                difference = np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0, np.abs(x - y))
            largest = float(np.maximum(largest, difference.max()))  # NaN stays
        else:
            largest = max(largest, float(np.abs(x.astype(object) - y.astype(object)).max()))
    return largest
