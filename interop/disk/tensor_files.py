"""Tensors of safetensors and torch files, as numpy arrays."""

from __future__ import annotations

import contextlib
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy

from loha_jax.runtime.untrusted import FileError, check_regular

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


_WRAPPERS = re.compile(
    r"(?:(?<=\.)|(?<=_)|^)_(?:orig_mod|checkpoint_wrapped_module|fsdp_wrapped_module)[._]"
)


def without_wrappers(key: str) -> str:
    """Return a key without the parts that torch's wrappers (`torch.compile`, FSDP, …) add.

    Example:
        >>> without_wrappers("base_model.model._orig_mod.layers.0._checkpoint_wrapped_module.q.weight")
        'base_model.model.layers.0.q.weight'
        >>> without_wrappers("lora_unet__orig_mod_mid_block.alpha")
        'lora_unet_mid_block.alpha'
    """
    return _WRAPPERS.sub("", key)


def unwrapped(tensors: Mapping[str, np.ndarray], path: str | Path) -> dict[str, np.ndarray]:
    """Return the tensors of a file by their keys `without_wrappers`.

    Raises:
        FileError: two keys differ only by wrappers.
    """
    found: dict[str, np.ndarray] = {}
    for key, tensor in tensors.items():
        if (plain := without_wrappers(key)) in found:
            raise FileError(
                f"{path}: {key} and another key are both {plain} without the names of torch's wrappers"
            )
        found[plain] = tensor
    return found


def safetensors_bytes(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """Return the content of a safetensors file.

    Arrays are made contiguous first: safetensors writes the bytes of a transposed array in memory
    order, which would load as other values.
    """
    return safetensors.numpy.save(
        {k: np.asarray(v, order="C") for k, v in tensors.items()}, dict(metadata)
    )


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
            f"{path} is not a readable safetensors file: its header claims {claimed:,} bytes, the file has {size:,}"
        )
    try:
        with safetensors.safe_open(path, "numpy") as file:
            yield file
    except (safetensors.SafetensorError, OverflowError, MemoryError) as error:
        raise FileError(f"{path} is not a readable safetensors file: {error}") from error


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Return all tensors of a safetensors file, by their keys `without_wrappers`.

    Raises:
        FileNotFoundError: it is not there.
        FileError: it is not a whole safetensors file, or a tensor has a dtype or a number of axes
            that numpy has not.
    """
    with open_safetensors(path) as file:
        found = dict(
            safetensors.deserialize(Path(path).read_bytes())
        )  # in an order that differs from run to run
        keys = list(file.keys())
    tensors = {}
    for key in keys:
        tensor = found[key]
        if (word := tensor["dtype"]) not in DTYPES:
            raise FileError(f"{path}: {key} is of dtype {word}, which numpy has no type for")
        try:
            # safetensors itself has no numpy arrays of float8
            tensors[key] = np.frombuffer(bytearray(tensor["data"]), DTYPES[word]).reshape(
                tensor["shape"]
            )
        except ValueError as error:
            raise FileError(f"{path}: {key} cannot be read: {error}") from error
    return unwrapped(tensors, path)


def read_metadata(path: Path) -> dict[str, str]:
    """Return the strings in the header of a safetensors file; errors as of `read_safetensors`."""
    with open_safetensors(path) as file:
        return file.metadata() or {}


def read_torch_pickle(path: Path) -> dict[str, np.ndarray]:
    """Return all tensors of a `.bin` file.

    torch's `weights_only` loader reads it, which runs no code from the file. Keys are those of
    `read_safetensors`.

    Raises:
        ImportError: torch is not installed.
        FileNotFoundError: the file is not there.
        FileError: it does not hold a dict of tensors, or claims more than its bytes can hold.
    """
    size = check_regular(path)
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path} is a torch pickle, and reading it needs torch (pip install torch). A file saved with "
            "`safe_serialization=True` needs only safetensors."
        ) from error
    _check_archive(path, size)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of dtypes and storages that are refused below
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # anything that torch raises for a corrupted file
        raise FileError(
            f"{path} is not a torch file that holds only tensors: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(loaded, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in loaded.items()
    ):
        raise FileError(f"{path} does not hold a dict of tensors")

    def to_numpy(key: str, tensor: torch.Tensor) -> np.ndarray:
        plain = (
            tensor.layout == torch.strided
            and not tensor.is_quantized
            and tensor.device.type == "cpu"
        )
        # A tensor may show one element of the file a billion times.
        if not plain or tensor.numel() * tensor.element_size() > size:
            raise FileError(
                f"{path}: {key} is no plain tensor, or claims to be larger than the file"
            )
        tensor = tensor.detach().contiguous()
        try:
            if tensor.dtype == torch.bfloat16:  # numpy has no such dtype of its own
                return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
            return tensor.numpy()
        except (TypeError, RuntimeError) as error:
            raise FileError(
                f"{path}: {key} is of dtype {tensor.dtype}, which numpy has no type for"
            ) from error

    return unwrapped({key: to_numpy(key, value) for key, value in loaded.items()}, path)


def _check_archive(path: Path, size: int) -> None:
    """Raise FileError for anything but a zip archive of uncompressed entries, as torch.save writes."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise FileError(
            f"{path} is not a file of torch.save since PyTorch 1.6: {error}. Save it anew, as safetensors."
        ) from error
    if (
        any(e.compress_type != zipfile.ZIP_STORED for e in entries)
        or sum(e.file_size for e in entries) > size
    ):
        raise FileError(
            f"{path} holds compressed entries, or claims more than its {size:,} bytes can hold"
        )


def check_finite(tensors: Mapping[str, np.ndarray], path: str | Path) -> None:
    """Raise FileError with the names of all tensors that hold NaN or infinity."""
    broken = [
        key
        for key, tensor in tensors.items()
        if jnp.issubdtype(tensor.dtype, jnp.inexact)
        and not np.isfinite(tensor.astype(np.float32)).all()
    ]
    if broken:
        raise FileError(
            f"{path} holds NaN or infinite values, in {', '.join(broken)}: the adapter is broken"
        )
