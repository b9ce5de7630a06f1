"""Files that are whole or not there: atomic writes, and checkpoints as numpy arrays."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors.numpy


class FileError(ValueError):
    """A file is broken, hostile, or not of the kind that it should be; the message names it and says what is wrong."""


def write_atomically(path: Path, data: bytes) -> None:
    """Writes to a temporary name in the same folder, flushes to disk, then renames: never half a file, never none."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        readable_by_umask(Path(temporary))
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def readable_by_umask(path: Path) -> None:
    """Gives a temporary file, which is its owner's alone, the mode of a new file."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


def safetensors_bytes(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """The content of a safetensors file.

    Arrays are made contiguous first: safetensors writes the bytes of a transposed array in memory order, which would
    load as other values.
    """
    return safetensors.numpy.save({k: np.asarray(v, order="C") for k, v in tensors.items()}, dict(metadata))


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file.

    Raises:
        ValueError: the file is not a whole safetensors file.
    """
    try:
        return safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def read_metadata(path: Path) -> dict[str, str]:
    """The strings in the header of a safetensors file.

    Raises:
        ValueError: the file is not a whole safetensors file.
    """
    try:
        with safetensors.safe_open(path, "numpy") as file:
            return file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def read_torch_pickle(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a `.bin` file, by torch's `weights_only` loader, which runs no code from the file.

    Raises:
        ImportError: torch is not installed.
        ValueError: the file does not hold a dict of tensors.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path} is a torch pickle, and reading it needs torch (pip install torch). A file saved with "
            "`safe_serialization=True` needs only safetensors."
        ) from error
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(loaded, dict) or not all(isinstance(v, torch.Tensor) for v in loaded.values()):
        raise ValueError(f"{path} does not hold a dict of tensors")

    def to_numpy(tensor: torch.Tensor) -> np.ndarray:
        if tensor.dtype == torch.bfloat16:  # numpy has no such dtype of its own
            return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    return {key: to_numpy(value.detach().contiguous()) for key, value in loaded.items()}
