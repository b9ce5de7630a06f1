"""`SafetensorsFile`: one safetensors file, read on request; `Header`: its header."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from loha_jax.runtime.untrusted import FileError, check_regular, parse_json

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
"""numpy's dtypes for those of safetensors."""

_MAX_HEADER_BYTES = 32 << 20  # a shard with 100,000 tensors has about 15 MB

_WORDS = {np.dtype(dtype): word for word, dtype in DTYPES.items()}

_WRAPPERS = re.compile(
    r"(?:(?<=\.)|(?<=_)|^)_(?:orig_mod|checkpoint_wrapped_module|fsdp_wrapped_module)[._]"
)


def without_wrappers(key: str) -> str:
    """Return a key without the parts that torch's wrappers (`torch.compile`, FSDP, …) add.

    Example:
        >>> without_wrappers("model._orig_mod.layers.0._checkpoint_wrapped_module.q.weight")
        'model.layers.0.q.weight'
        >>> without_wrappers("lora_unet__orig_mod_mid_block.alpha")
        'lora_unet_mid_block.alpha'
    """
    return _WRAPPERS.sub("", key)


@dataclasses.dataclass(frozen=True)
class Header:
    """The header of a safetensors file: everything before its values.

    Attributes:
        data: its bytes, beginning with the eight of its length.
        places: start and end of each tensor's values in the file, by name and in the header's
            order.
        metadata: its strings.
    """

    data: bytes
    places: dict[str, tuple[int, int]]
    metadata: dict[str, str]

    @classmethod
    def of(
        cls,
        tensors: Iterable[tuple[str, np.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
        stored_names: Mapping[str, str] | None = None,
    ) -> Header:
        """Return a header for these tensors.

        The widest dtypes come first, as in safetensors, so that values are aligned. `stored_names`
        are those that the file has instead of a tensor's own.
        """
        entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        offsets: dict[str, tuple[int, int]] = {}
        end = 0
        for name, dtype, shape in sorted(tensors, key=lambda t: -t[1].itemsize):
            start, end = end, end + math.prod(shape) * dtype.itemsize
            stored = (stored_names or {}).get(name, name)
            entries[stored] = {
                "dtype": _WORDS[dtype],
                "shape": list(shape),
                "data_offsets": [start, end],
            }
            offsets[name] = (start, end)
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        size = 8 + len(text)
        places = {name: (size + start, size + end) for name, (start, end) in offsets.items()}
        return cls(len(text).to_bytes(8, "little") + text, places, dict(metadata or {}))

    @property
    def file_size(self) -> int:
        """The size of the whole file in bytes."""
        return max((end for _, end in self.places.values()), default=len(self.data))


class SafetensorsFile:
    """A safetensors file: shapes and dtypes of its tensors; the values are read on request.

    Args:
        path: of the file.

    Attributes:
        shapes, dtypes: by name, in the order of the file. Names are `without_wrappers`.
        stored_names: what the file calls the tensors whose names have lost wrappers.

    Raises:
        FileNotFoundError: it is not there.
        FileError: it is no whole safetensors file; a tensor has a dtype that numpy has not; two
            names differ only by wrappers.
    """

    def __init__(self, path: Path):
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self.stored_names: dict[str, str] = {}
        with open_safetensors(path) as file:
            for stored in file.keys():  # noqa: SIM118  # a safe_open is no dict
                part, key = file.get_slice(stored), without_wrappers(stored)
                if (word := part.get_dtype()) not in DTYPES:
                    raise FileError(
                        f"{path}: {stored} is of dtype {word}, which numpy has no type for"
                    )
                if key in self.shapes:
                    raise FileError(same_names(path, stored, key))
                if stored != key:
                    self.stored_names[key] = stored
                self.shapes[key] = tuple(part.get_shape())
                self.dtypes[key] = np.dtype(DTYPES[word])

    @functools.cached_property
    def header(self) -> Header:
        """The header."""
        with open(self.path, "rb") as file:
            data = file.read(8)
            data += file.read(int.from_bytes(data, "little"))
        entries = parse_json(data[8:], self.path)
        metadata = entries.pop("__metadata__", {})
        places = {
            without_wrappers(name): (
                len(data) + entry["data_offsets"][0],
                len(data) + entry["data_offsets"][1],
            )
            for name, entry in entries.items()
        }
        return Header(data, places, metadata)

    def read(self, key: str) -> np.ndarray:
        """Return the values of a tensor.

        They are read, not mapped: pages of a mapped file would count as memory. Besides,
        safetensors cannot return float8 as numpy arrays.

        Raises:
            FileError: the file has become shorter, or the tensor has more axes than numpy has.
        """
        start, end = self.header.places[key]
        data = np.fromfile(self.path, np.uint8, end - start, offset=start)
        if data.size != end - start:
            raise FileError(f"{self.path} became shorter while it was read")
        try:
            return data.view(self.dtypes[key]).reshape(self.shapes[key])
        except ValueError as error:
            raise FileError(f"{self.path}: {key} cannot be read: {error}") from error


def same_names(path: str | Path, stored: str, key: str) -> str:
    """Return what is wrong with two names that are one without wrappers."""
    return f"{path}: {stored} and another key are both {key} without the names of torch's wrappers"


@contextlib.contextmanager
def open_safetensors(path: str | Path) -> Iterator[Any]:
    """Open a safetensors file with `safetensors.safe_open`; turn its errors into `FileError`.

    The library itself checks the header against the file: offsets that overlap, leave gaps or pass
    its end, and shapes that claim other than what is there.

    Raises:
        FileNotFoundError: it is not there.
        FileError: it is no whole safetensors file, or its header is larger than that of any model.
    """
    size = check_regular(path)
    with open(path, "rb") as file:
        claimed = int.from_bytes(file.read(8), "little")
    if claimed > min(size, _MAX_HEADER_BYTES):
        raise FileError(
            f"{path} is not a readable safetensors file: its header claims {claimed:,} bytes, the "
            f"file has {size:,}"
        )
    try:
        with safetensors.safe_open(path, "numpy") as file:
            yield file
    except (safetensors.SafetensorError, OverflowError, MemoryError) as error:
        raise FileError(f"{path} is not a readable safetensors file: {error}") from error
