"""Tensors of safetensors and torch files, as numpy arrays."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy

from loha_jax.runtime.untrusted import FileError, check_regular

from .safetensors_file import SafetensorsFile, open_safetensors, same_names, without_wrappers

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


def safetensors_bytes(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """Return the content of a safetensors file.

    Arrays are made contiguous first: safetensors writes the bytes of a transposed array in memory
    order, which would load as other values.
    """
    return safetensors.numpy.save(
        {k: np.asarray(v, order="C") for k, v in tensors.items()}, dict(metadata)
    )


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Return all tensors of a safetensors file, by their keys `without_wrappers`.

    Raises:
        FileNotFoundError: it is not there.
        FileError: as of `SafetensorsFile`.
    """
    file = SafetensorsFile(path)
    return {key: file.read(key) for key in file.shapes}


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read a torch pickle, which its suffix shows, or else a safetensors file."""
    return (read_torch_pickle if path.suffix in TORCH_SUFFIXES else read_safetensors)(path)


def read_metadata(path: Path) -> dict[str, str]:
    """Return the strings in the header of a safetensors file; {} of a torch pickle or of no file.

    Errors are those of `read_safetensors`.
    """
    if not path.name or path.suffix in TORCH_SUFFIXES:
        return {}
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
            f"{path} is a torch pickle, and reading it needs torch (pip install torch). A file "
            "saved with `safe_serialization=True` needs only safetensors."
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

    found: dict[str, np.ndarray] = {}
    for key, value in loaded.items():
        if (plain := without_wrappers(key)) in found:
            raise FileError(same_names(path, key, plain))
        found[plain] = to_numpy(key, value)
    return found


def _check_archive(path: Path, size: int) -> None:
    """Raise FileError for anything but a zip archive of uncompressed entries, as of torch.save."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise FileError(
            f"{path} is not a file of torch.save since PyTorch 1.6: {error}. Save it anew, as "
            "safetensors."
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
