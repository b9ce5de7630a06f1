"""`Quantisation`: the quantised tensors of a checkpoint and their scales.

Scaled float8 is read and written: `weight = values * scale`, with one scale per tensor, row or
block. All other forms (GPTQ, AWQ, bitsandbytes, packed integers, MXFP4, …) are recognised and
refused by name.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from . import bitsandbytes

_ACTIVATION = re.compile(
    r"(input|output|activation|act|[qkv]|kv|[kv]_cache|prob_output)(_global)?_scale(_ub|_inv)?|scale_(input|output)"
)
_MARKER = re.compile(r"(.*\.)?(scaled_fp8|comfy_quant)")
_PACKED = re.compile(
    r"_?qweight|qzeros|scales|g_idx|_?weight_(packed|shape|qdata|zero_point|g_idx)|SCB|weight_format|W_q|codebooks?|"
    r"\w+_blocks|\w+_scales|(_data|_scale|absmax|quant_map|nested_\w+|quant_state\.\w+)"
)
_SCALE_LIKE = re.compile(r".*(scale|zero_point|absmax|amax|quant|_inv).*", re.IGNORECASE)
_ADVICE = (
    "take the float checkpoint that it was quantised from (after a merge, quantise the result)"
)


@dataclasses.dataclass(frozen=True)
class Scale:
    """The scale of a float8 tensor; despite its name, `weight_scale_inv` is multiplied by as well.

    Attributes:
        key: its name in the checkpoint.
        grid: its shape with one axis per axis of the tensor.
        blocks: how many values of the tensor share one value of the scale, by axis.
        power_of_two: whether the scheme wants powers of two (`scale_fmt: ue8m0`).
    """

    key: str
    grid: tuple[int, ...]
    blocks: tuple[int, ...]
    power_of_two: bool = False

    def rows(
        self, values: np.ndarray, shape: tuple[int, ...], first: int = 0, last: int | None = None
    ) -> np.ndarray:
        """Return the scale for rows of a tensor of this shape, in float32, to broadcast to them.

        Example:
            >>> Scale("s", (2, 1), (2, 3)).rows(np.array([[1.0], [2.0]]), (3, 3)).tolist()
            [[1.0], [1.0], [2.0]]
        """
        result = values.astype(np.float32).reshape(self.grid)
        for axis, (size, block) in enumerate(zip(shape, self.blocks, strict=True)):
            if result.shape[axis] > 1:
                index = np.arange(size) // block
                result = result.take(index[first:last] if axis == 0 else index, axis)
        return result

    def largest(
        self, sizes: np.ndarray, first_axis: int = 0, last_axis: int | None = None
    ) -> np.ndarray:
        """Return the largest absolute value per value of the scale, along some axes."""
        for axis in range(len(self.grid))[first_axis:last_axis]:
            count, block = self.grid[axis], self.blocks[axis]
            sizes = np.maximum.reduceat(sizes, np.arange(count) * block, axis)
        return sizes

    def renewed(self, old: np.ndarray, largest: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Return the scale for new values.

        It is the old one where they use its range, else a fitting one. So unchanged values keep
        their bits, and the others lose no precision: half of the range is one step of the exponent.

        Args:
            old: the scale, as it is stored.
            largest: of the new values, in the shape `grid`.
            dtype: of the quantised values.
        """
        info = ml_dtypes.finfo(dtype)
        limit, had = float(info.max), old.astype(np.float32).reshape(self.grid)
        wanted = (largest / limit).astype(np.float32)
        if self.power_of_two:
            wanted = np.exp2(np.ceil(np.log2(np.maximum(wanted, np.finfo(np.float32).tiny))))
        # Up to half a unit above the largest number rounds to it.
        fits = (largest <= limit * had * (1 + 2.0 ** -(info.nmant + 2))) & (
            2 * largest >= limit * had
        )
        return np.where(fits | (largest == 0), had, wanted).astype(old.dtype).reshape(old.shape)


def dequantised(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return plain values in float32."""
    return values.astype(np.float32) * scale


def quantised(values: np.ndarray, scale: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return values divided by their scale, in float8."""
    limit = float(ml_dtypes.finfo(dtype).max)
    return np.clip(values / np.where(scale > 0, scale, 1), -limit, limit).astype(dtype)


def is_float8(dtype: Any) -> bool:
    """Return whether a dtype is a floating one of 8 bits or fewer."""
    return np.dtype(dtype).name.startswith(("float8", "float6", "float4"))


class Quantisation:
    """The quantised tensors of a checkpoint, by names, shapes, dtypes and config.

    Args:
        shapes, dtypes: by name.
        config: the parsed `config.json` beside it, or {}.
        elsewhere: names that an index lists, and that are in shards which are not read.

    Attributes:
        scales: of float8 tensors, by their names.
        weights: the tensor that each scale belongs to, by the scale's name.
        problems: why tensors cannot be read as values, by their names.
        packed: modules whose weight is packed into other tensors, and what was found.
        extras: activations' scales and markers, which a merge leaves as they are.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, np.dtype],
        config: Mapping[str, Any],
        elsewhere: Iterable[str],
    ):
        self._shapes, self._dtypes = shapes, dtypes
        self._config = config.get("quantization_config") or config.get("compression_config") or {}
        if not isinstance(self._config, dict):
            self._config = {}
        self._elsewhere = frozenset(elsewhere)
        self._children: dict[str, list[str]] = {}
        for key in (*shapes, *self._elsewhere):
            parts = key.split(".")
            for count in range(1, min(3, len(parts)) + 1):  # `weight.quant_state.bitsandbytes__nf4`
                owner, child = ".".join(parts[:-count]), ".".join(parts[-count:])
                self._children.setdefault(owner, []).append(child)
        self._marked = next((key for key in shapes if _MARKER.fullmatch(key)), None)
        self.scales: dict[str, Scale] = {}
        self.problems: dict[str, str] = {}
        self.packed = self._find_packed()
        for key in shapes:
            if problem := self._classify(key):
                self.problems[key] = problem
        self.weights = {scale.key: key for key, scale in self.scales.items()}
        self.extras = frozenset(filter(_is_extra, shapes))

    @property
    def is_used(self) -> bool:
        """True if any tensor is quantised."""
        return bool(self.scales or self.problems or self.packed)

    @property
    def example(self) -> str:
        """A quantised tensor, for a message."""
        scaled = [f"{key} with {scale.key}" for key, scale in self.scales.items()]
        return next(iter([*scaled, *self.problems.values(), *self.packed.values()]), "")

    def owner_is_packed(self, key: str) -> bool:
        """Return whether a tensor is part of a packed weight."""
        parts = key.split(".")
        return any(".".join(parts[:-n]) in self.packed for n in (1, 2, 3) if n < len(parts))

    def why_missing(self, key: str) -> str:
        """Name what replaces a missing weight, as the end of a sentence; "" if nothing does."""
        found = self.packed.get(key.rpartition(".")[0])
        return "" if found is None else f": in its place the base has {found}; {_advice(found)}"

    def _find_packed(self) -> dict[str, str]:
        result = {}
        for module, children in self._children.items():
            found = sorted(
                (
                    child
                    for child in set(children)
                    if _PACKED.fullmatch(child.removeprefix("weight."))
                    and child not in ("_scale", "_data", "scales")
                ),
                key=lambda child: ("quant_state" not in child, child),
            )
            if not module or not found or module.endswith(".weight"):
                continue
            said = ", ".join(f"{module}.{child}" for child in found[:4])
            result[module] = (
                f"{said}{', …' if len(found) > 4 else ''} ({_scheme(found)}, which holds no values "
                "that can be read or added to)"
            )
        return result

    def _classify(self, key: str) -> str | None:
        """Note the scale of a tensor; return why it cannot be read as values, or None."""
        module, _, part = key.rpartition(".")
        dtype = self._dtypes[key]
        if part == "weight" and module in self.packed:
            found = self.packed[module]
            return f"{key} holds {dtype} and belongs to {found}: {_advice(found)}"
        if part == "weight" and dtype.kind in "iub":
            return f"{key} holds {dtype}: quantised weights can't be merged into; {_ADVICE}"
        if _is_extra(key):
            return None
        if is_float8(dtype):
            return self._classify_float8(key, module, part)
        found = [name for name in self._known(key) if name in self._shapes]
        if part == "weight" and found:
            return f"{key} is {dtype} with {found[0]}, which is known for float8 only; {_ADVICE}"
        return None

    def _known(self, key: str) -> list[str]:
        """Return the names that a tensor's scale may have."""
        module, _, part = key.rpartition(".")
        names = [f"{key}_scale", f"{key}_scale_inv"]
        prefix = f"{module}." if module else ""
        return [*names, f"{prefix}scale_weight"] if part == "weight" else names

    def _classify_float8(self, key: str, module: str, part: str) -> str | None:
        known = [name for name in self._known(key) if name in self._shapes]
        lost = [name for name in self._known(key) if name in self._elsewhere]
        beside = [
            f"{module}.{c}" if module else c for c in self._children.get(module, ()) if "." not in c
        ]
        others = [
            name
            for name in (*beside, *(f"{key}.{c}" for c in self._children.get(key, ())))
            if (name.startswith((f"{key}_", f"{key}.")) or part == "weight")
            and _SCALE_LIKE.fullmatch(name.removeprefix(f"{module}."))
            and name not in (*known, key)
            and not _is_extra(name)
        ]
        if lost:
            where = "which is in another shard; give the folder or the index"
            return f"{key} is scaled by {lost[0]}, {where}"
        if others or len(known) > 1:
            found = ", ".join([*known, *others])
            return f"{key} is float8 with scales of an unknown form ({found}); {_ADVICE}"
        if known:
            return self._add_scale(key, known[0])
        if self._marked or self._config.get("quant_method"):
            says = self._marked or "quantization_config in config.json"
            return f"{key} is float8 and has no scale, though {says} says that weights are scaled"
        return None

    def _add_scale(self, key: str, scale_key: str) -> str | None:
        shape, own = self._shapes[key], self._shapes[scale_key]
        dtype = self._dtypes[scale_key]
        if dtype.kind in "iub" or is_float8(dtype):
            return (
                f"{key} is scaled by {scale_key}, which holds {dtype}: an unknown form; {_ADVICE}"
            )
        size = self._block()
        grid = _grid(shape, own, size, bool(self._config.get("weight_block_size")))
        if grid is None:
            said = (
                f"weight_block_size in config.json is {size}"
                if size
                else "no config.json gives `quantization_config.weight_block_size`"
            )
            return f"{key} {list(shape)} does not fit its scale {scale_key} {list(own)}; {said}"
        blocks = [
            n if count == 1 else 1 if count == n else (size or [1, 1])[axis - len(shape)]
            for axis, (n, count) in enumerate(zip(shape, grid, strict=True))
        ]
        power = self._config.get("scale_fmt") == "ue8m0"
        self.scales[key] = Scale(scale_key, grid, tuple(max(1, b) for b in blocks), power)
        return None

    def _block(self) -> list[int] | None:
        """Return the block size of the last two axes given by the config."""
        is_fp8 = self._config.get("quant_method") == "fp8"  # transformers' default
        size = self._config.get("weight_block_size", [128, 128] if is_fp8 else None)
        groups = self._config.get("config_groups")
        for group in groups.values() if isinstance(groups, dict) else ():
            weights = (group.get("weights") if isinstance(group, dict) else None) or {}
            if weights.get("block_structure"):
                size = weights["block_structure"]
            elif isinstance(weights.get("group_size"), int) and weights["group_size"] > 0:
                size = [1, weights["group_size"]]
        is_pair = isinstance(size, list) and len(size) == 2
        return size if is_pair and all(isinstance(n, int) and n > 0 for n in size) else None


def _is_extra(key: str) -> bool:
    """Return whether a tensor is a scale of activations or a marker."""
    return bool(_MARKER.fullmatch(key) or _ACTIVATION.fullmatch(key.rpartition(".")[2]))


def _grid(
    shape: tuple[int, ...],
    scale: tuple[int, ...],
    block: Sequence[int] | None,
    must_be_blocks: bool,
) -> tuple[int, ...] | None:
    """Return a scale's shape with one axis per axis of the tensor, or None if it does not fit."""
    ndim = len(shape)
    size = math.prod(scale)
    grid = scale
    if size == 1:
        grid = (1,) * ndim
    elif len(scale) == 1 and ndim and scale[0] == shape[0]:
        grid = (scale[0], *(1,) * (ndim - 1))
    if len(grid) != ndim:
        return None
    for axis, (n, count) in enumerate(zip(shape, grid, strict=True)):
        own = block[axis - ndim] if block and ndim >= 2 and axis >= ndim - 2 else None
        blocks = None if own is None else -(-n // own)
        if count != blocks and (count not in (1, n) or (must_be_blocks and own is not None)):
            return None
    return grid


def _advice(found: str) -> str:
    """Return what to do about a packed weight."""
    return bitsandbytes.ADVICE if "bitsandbytes" in found else _ADVICE


def _scheme(found: Iterable[str]) -> str:
    names = " ".join(found)
    for text, scheme in (
        ("qweight", "GPTQ or AWQ"),
        ("SCB", "bitsandbytes 8-bit"),
        ("bitsandbytes__nf4", "bitsandbytes 4-bit nf4"),
        ("bitsandbytes__fp4", "bitsandbytes 4-bit fp4"),
        ("absmax", "bitsandbytes 4-bit"),
        ("quant_state", "bitsandbytes 4-bit"),
        ("qdata", "torchao"),
        ("weight._data", "quanto"),
        ("weight_packed", "compressed-tensors"),
        ("_blocks", "MXFP4"),
        ("W_q", "HQQ"),
    ):
        if text in names:
            return scheme
    return "a packed form"
