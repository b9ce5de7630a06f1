"""`MergeTarget`: the checkpoint that a merge writes, before it is written."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..disk.atomic import write_atomically
from ..disk.base_checkpoint import Checkpoint, side_file_content, side_files, written_dtype
from ..disk.safetensors_file import Header
from ..formats.adapter_file import AdapterFile
from ..names.resized_vocabulary import with_vocabulary_size
from .plan import MergePlan

_VERSION = 2
"""The version of the working folder, increased whenever what is written changes."""


@dataclasses.dataclass(frozen=True)
class MergeTarget:
    """The base's files, tensors and their order; with other values, dtypes and sizes.

    Attributes:
        base: the base.
        plan: what changes.
        dtype: of all floating tensors, or None.
    """

    base: Checkpoint
    plan: MergePlan
    dtype: np.dtype | None

    def dtype_of(self, key: str) -> np.dtype:
        """Return the dtype of a merged tensor."""
        return written_dtype(self.base.dtypes[key], self.dtype)

    def shape_of(self, key: str) -> tuple[int, ...]:
        """Return the shape of a merged tensor."""
        return self.plan.resized.get(key, self.base.shapes[key])

    @functools.cached_property
    def headers(self) -> dict[str, Header]:
        """The headers of the weight files, by the files' names."""
        return {file.name: self._header(self.base.header(file)) for file in self.base.files}

    def _header(self, header: Header) -> Header:
        if self.dtype is None and header.places.keys().isdisjoint(self.plan.resized):
            return header
        tensors = [(key, self.dtype_of(key), self.shape_of(key)) for key in header.places]
        return Header.of(tensors, header.metadata, self.base.stored_names)

    def fingerprint(
        self, adapters: Iterable[AdapterFile], weights: list[float], only: str | None
    ) -> str:
        """Return a hash of everything that the result depends on.

        Of the base's files it has the header, size and time.
        """
        digest = hashlib.sha256()

        def add(*values: object) -> None:
            digest.update(json.dumps(values).encode() + b"\n")

        add(_VERSION, weights, None if self.dtype is None else self.dtype.name, only)
        for file in self.base.files:
            state = file.stat()
            add(file.name, state.st_size, state.st_mtime_ns)
            digest.update(self.base.header(file).data)
        for adapter in adapters:
            for own, module in adapter.modules.items():
                add(own, module.name, module.kind, module.r, module.alpha)
            for key, tensor in adapter.arrays.items():
                add(key, str(tensor.dtype), list(tensor.shape))
                digest.update(np.ascontiguousarray(tensor).tobytes())
        return digest.hexdigest()

    def write_side_files(self, folder: Path) -> None:
        """Write the index, and the files beside the base's weights."""
        base, resized = self.base, self.plan.resized
        if base.index is not None:
            text = base.index.read_text(encoding="utf-8")
            if self.dtype is not None or resized:
                index = json.loads(text)
                index.setdefault("metadata", {})["total_size"] = sum(
                    math.prod(self.shape_of(key)) * self.dtype_of(key).itemsize
                    for key in base.shapes
                )
                text = json.dumps(index, indent=2) + "\n"
            write_atomically(folder / base.index.name, text.encode())
        for file in side_files(base.folder) if base.is_whole_folder else ():
            content = side_file_content(file, self.dtype)
            if file.name == "config.json" and resized:
                key, new = next(iter(resized.items()))
                old = base.shapes[key][0]
                config = with_vocabulary_size(json.loads(content), old, new[0])
                content = (json.dumps(config, indent=2) + "\n").encode()
            write_atomically(folder / file.name, content)
