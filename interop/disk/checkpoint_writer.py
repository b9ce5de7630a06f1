"""`CheckpointWriter`: a checkpoint in Hugging Face's form, written one tensor at a time."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from loha_jax.runtime.scalars import is_integer, plain_scalar

from .atomic import TemporaryFile, naming, write_atomically
from .base_checkpoint import INDEX
from .safetensors_file import Header
from .system import sync_folder, write_at

Tensor = tuple[str, np.dtype, tuple[int, ...]]  # name, dtype, shape


def parse_size(size: int | str) -> int:
    """Return the bytes of "5GB", "200MB" or a number, in powers of ten as in huggingface_hub.

    Example:
        >>> parse_size("5GB"), parse_size(np.int64(100))
        (5000000000, 100)
    """
    size = plain_scalar(size)
    if is_integer(size) and size > 0:
        return size
    found = re.fullmatch(r"(\d+)\s*([KMGT]?)B", str(size).upper())
    if not found or not int(found[1]):
        raise ValueError(f"A size is a positive number of bytes or such as '5GB', got {size!r}")
    return int(found[1]) * 1000 ** " KMGT".index(found[2] or " ")


class CheckpointWriter:
    """A checkpoint being written tensor by tensor, in any order, with Hugging Face's file names.

    Headers are computed from the names, dtypes and shapes, so each tensor is written to its final
    place in a temporary file. `commit` flushes the files and renames them, the index last. If the
    `with` block ends without it, the files are removed.

    Args:
        folder: exists.
        tensors: `(name, dtype, shape)` in the order in which they are to stand.
        max_shard_size: of the values of one file, in bytes; one larger tensor has a file of its
            own.
        stem: "model" or "diffusion_pytorch_model".
        metadata: strings for the header of every file.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Sequence[Tensor],
        max_shard_size: int,
        stem: str = "model",
        metadata: Mapping[str, str] | None = None,
    ):
        self._folder, self._stem = folder, stem
        self._total = sum(_bytes(tensor) for tensor in tensors)
        shards: list[list[Tensor]] = [[]]
        filled = 0
        for tensor in tensors:
            if shards[-1] and filled + _bytes(tensor) > max_shard_size:
                shards.append([])
                filled = 0
            shards[-1].append(tensor)
            filled += _bytes(tensor)
        many = range(1, len(shards) + 1) if len(shards) > 1 else ()
        numbers = [f"-{n:05d}-of-{len(shards):05d}" for n in many] or [""]
        self.names = [f"{stem}{number}.safetensors" for number in numbers]
        self.weight_map = {
            t[0]: name for name, shard in zip(self.names, shards, strict=True) for t in shard
        }
        self._places: dict[str, tuple[int, int, np.dtype, tuple[int, ...]]] = {}
        self._pending = set(self.weight_map)
        self._files: list[TemporaryFile] = []
        try:
            for n, shard in enumerate(shards):
                header = Header.of(shard, metadata)
                for name, dtype, shape in shard:
                    self._places[name] = (n, header.places[name][0], dtype, shape)
                with naming(folder / self.names[n]):
                    self._files.append(TemporaryFile(folder / self.names[n]))
                    write_at(self._files[n].descriptor, 0, header.data)
                    os.truncate(self._files[n].descriptor, header.file_size)
        except BaseException:
            self.close()
            raise

    def write(self, name: str, value: np.ndarray) -> None:
        """Write a tensor to its place; its dtype and shape must be those announced."""
        n, offset, dtype, shape = self._places[name]
        if value.dtype != dtype or value.shape != shape:
            raise ValueError(
                f"{name} is {value.dtype}{list(value.shape)}, announced was {dtype}{list(shape)}"
            )
        data = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        with naming(self._folder / self.names[n]):
            write_at(self._files[n].descriptor, offset, data)
        self._pending.discard(name)

    def commit(self) -> None:
        """Flush and rename the files; raise ValueError if a tensor was not written."""
        if self._pending:
            raise ValueError(
                f"These tensors were announced and not written: {', '.join(sorted(self._pending))}"
            )
        with naming(self._folder):
            for file in self._files:
                file.flush()
            for file in self._files:
                file.move_into_place()
            sync_folder(self._folder)
        if len(self.names) > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": self.weight_map}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            write_atomically(self._folder / f"{self._stem}.safetensors{INDEX}", text.encode())

    def close(self) -> None:
        """Close the files and remove those that were not renamed."""
        for file in self._files:
            file.close()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _bytes(tensor: Tensor) -> int:
    _, dtype, shape = tensor
    return math.prod(shape) * dtype.itemsize
