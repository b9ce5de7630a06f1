"""Weights that bitsandbytes has packed into 4 or 8 bits, read as the floating ones.

A 4-bit weight `q.weight` is `uint8` with two codes per byte, the first in the high half. Its value
is `quant_map[code] * absmax[block]`, with blocks along the flattened weight. Beside it are
`q.weight.absmax`, `q.weight.quant_map` and `q.weight.quant_state.bitsandbytes__nf4` (JSON). With
double quantisation `absmax` is packed too, into bytes. An 8-bit weight is `int8` beside `q.SCB`,
the largest absolute value of each row.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from loha_jax.runtime.scalars import is_integer
from loha_jax.runtime.untrusted import FileError, parse_json

Read = Callable[[str], np.ndarray]
"""Returns the values of a tensor by name, as they are stored."""

Shapes = Mapping[str, tuple[int, ...]]

ADVICE = (
    "load it in transformers, call model.dequantize() and save_pretrained, and take that, or the "
    "float checkpoint that it was quantised from"
)
"""The way to a floating checkpoint."""

_STATES = ("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")
_LONGEST_STATE = 1 << 14
_MOST_AXES = 8
_DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}


@dataclasses.dataclass(frozen=True)
class Packed:
    """A packed weight.

    Attributes:
        key: of the tensor with the codes.
        parts: the names of the tensors beside it.
        shape, dtype: of the floating weight.
        state: the settings of 4 bits; {} for 8 bits.
    """

    key: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    state: Mapping[str, Any]

    def values(self, read: Read) -> np.ndarray:
        """Return the floating weight.

        Raises:
            FileError: a scale is not finite, or a value is not in the weight's dtype.
        """
        if not self.state:
            largest = _finite(f"{self.key.removesuffix('weight')}SCB", read)
            return read(self.key).astype(np.float32) * (largest[:, None] / np.float32(127))
        packed = read(self.key).reshape(-1)
        codes = np.stack([packed >> 4, packed & 15], 1).reshape(-1)[: math.prod(self.shape)]
        values = _finite(f"{self.key}.quant_map", read)[codes]
        scale = _repeated(self._absmax(read), self.state["blocksize"], values.size)
        with np.errstate(over="ignore"):
            whole = (values * scale).astype(self.dtype)
        if not np.isfinite(whole.astype(np.float32)).all():
            raise FileError(f"{self.key} holds values that {self.dtype} does not")
        return whole.reshape(self.shape)

    def _absmax(self, read: Read) -> np.ndarray:
        if self.state.get("nested_blocksize") is None:
            return _finite(f"{self.key}.absmax", read)
        codes = read(f"{self.key}.absmax")
        values = _finite(f"{self.key}.nested_quant_map", read)[codes]
        scale = _finite(f"{self.key}.nested_absmax", read)
        scale = _repeated(scale, self.state["nested_blocksize"], values.size)
        with np.errstate(over="ignore"):
            return values * scale + np.float32(self.state["nested_offset"])


def packed_weights(
    shapes: Shapes, dtypes: Mapping[str, np.dtype], read: Read, origin: object
) -> dict[str, Packed]:
    """Return the packed weights of a checkpoint, by name.

    Args:
        shapes, dtypes: of all tensors, by name.
        read: returns a tensor's values.
        origin: of the tensors, for messages.

    Raises:
        FileError: the tensors of a packed weight do not fit together.
    """
    found = {}
    for key in shapes:
        packed = None
        if state := [f"{key}.{name}" for name in _STATES if f"{key}.{name}" in shapes]:
            packed = _four_bits(key, state[0], shapes, dtypes, read, origin)
        elif key.endswith("weight") and f"{key.removesuffix('weight')}SCB" in shapes:
            packed = _eight_bits(key, shapes, dtypes, read, origin)
        if packed is not None:
            found[key] = packed
    return found


def _four_bits(
    key: str,
    state_key: str,
    shapes: Shapes,
    dtypes: Mapping[str, np.dtype],
    read: Read,
    origin: object,
) -> Packed:
    where = f"{origin}: {state_key} (bitsandbytes 4-bit)"
    if dtypes[state_key] != np.uint8 or math.prod(shapes[state_key]) > _LONGEST_STATE:
        raise FileError(f"{where} is no short text")
    state = parse_json(read(state_key).tobytes(), where)
    if not isinstance(state, dict):
        raise FileError(f"{where} is no JSON object")
    shape, dtype, block = (state.get(name) for name in ("shape", "dtype", "blocksize"))
    nested, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if (
        not isinstance(shape, list)
        or not all(map(_is_count, shape))
        or len(shape) > _MOST_AXES
        or not _is_count(block)
        or block & (block - 1)  # bitsandbytes' are powers of two
        or not isinstance(dtype, str)
        or dtype not in _DTYPES
        or (nested is not None and not (_is_count(nested) and _is_finite(offset)))
    ):
        raise FileError(
            f"{where} gives shape {shape!r}, dtype {dtype!r}, blocksize {block!r}, "
            f"nested_blocksize {nested!r} and nested_offset {offset!r}, which no weight has"
        )
    size = math.prod(shape)
    blocks = -(-size // block)
    wanted = {
        key: (-(-size // 2), "uint8"),
        f"{key}.absmax": (blocks, "float32" if nested is None else "uint8"),
        f"{key}.quant_map": (16, "float32"),
    }
    if nested is not None:
        wanted[f"{key}.nested_absmax"] = (-(-blocks // nested), "float32")
        wanted[f"{key}.nested_quant_map"] = (256, "float32")
    _check(wanted, shapes, dtypes, f"{where}: {key} {shape}")
    parts = (state_key, *(name for name in wanted if name != key))
    return Packed(key, parts, tuple(shape), _DTYPES[dtype], state)


def _eight_bits(
    key: str, shapes: Shapes, dtypes: Mapping[str, np.dtype], read: Read, origin: object
) -> Packed | None:
    if dtypes[key] != np.int8 or len(shapes[key]) != 2:
        return None
    start = key.removesuffix("weight")
    wanted = {f"{start}SCB": (shapes[key][0], "float32")}
    _check(wanted, shapes, dtypes, f"{origin}: {key} with {start}SCB (bitsandbytes 8-bit)")
    parts = tuple(n for n in (f"{start}SCB", f"{start}weight_format") if n in shapes)
    if len(parts) > 1 and read(parts[1]).any():
        raise FileError(
            f"{origin}: {parts[1]} (bitsandbytes 8-bit) says that {key} is not stored row by row: "
            f"{ADVICE}"
        )
    return Packed(key, parts, shapes[key], np.dtype(np.float32), {})


def _check(
    wanted: Mapping[str, tuple[int, str]],
    shapes: Shapes,
    dtypes: Mapping[str, np.dtype],
    weight: str,
) -> None:
    for name, (size, dtype) in wanted.items():
        if name not in shapes:
            raise FileError(f"{weight} needs {name}, which is not there")
        if math.prod(shapes[name]) != size or dtypes[name] != np.dtype(dtype):
            raise FileError(
                f"{weight} needs {name} to hold {size} values of {dtype}, and it is "
                f"{dtypes[name]} {list(shapes[name])}"
            )


def _repeated(scale: np.ndarray, block: int, size: int) -> np.ndarray:
    return np.repeat(scale, min(block, size))[:size]


def _finite(key: str, read: Read) -> np.ndarray:
    values = read(key).reshape(-1)
    if not np.isfinite(values).all():
        raise FileError(f"{key} holds values that are not finite")
    return values


def _is_count(x: object) -> TypeGuard[int]:
    return is_integer(x) and x > 0


def _is_finite(x: object) -> bool:
    """Return whether x is a number that float32 holds."""
    return (is_integer(x) or isinstance(x, float)) and abs(x) < 1e38
