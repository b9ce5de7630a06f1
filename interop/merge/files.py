"""`merge_checkpoint`: adapters merged into a base checkpoint, from files to files, a few rows at a time.

The result has the shards, index, key order and metadata of the base. It is written to a hidden
folder beside its place and appears by one rename. If a run is interrupted, its finished shards stay
in that folder, and the next run resumes from them.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loha_jax.targets.module_names import Names

from ..disk.atomic import write_atomically
from ..disk.base_checkpoint import Checkpoint, Header, side_file_content, side_files
from ..disk.resumable_folder import WorkingFolder
from ..formats.adapter_file import AdapterFile
from ..names.resized_vocabulary import with_vocabulary_size
from ..updates.rounding import Loss, Losses, check_losses, loss_notes
from .plan import MergePlan, plan_merge
from .shard import ShardWriter, new_dtype

_VERSION = 2
"""The version of the working folder, increased whenever what is written changes."""


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """The result of a merge.

    Attributes:
        out: the folder.
        files: the names of the weight files.
        kept: the files that an earlier, interrupted run had finished.
        merged, replaced, copied: the number of tensors with an update added, with new values, and
            unchanged.
        bytes: the size of the weight files.
        losses: what rounding loses, for each merged tensor of fewer than 32 bits.
        notes: remarks for the user, one sentence each.
    """

    out: Path
    files: tuple[str, ...]
    kept: tuple[str, ...]
    merged: int
    replaced: int
    copied: int
    bytes: int
    losses: dict[str, Loss]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the result in JSON's types."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values |= {
            "out": str(self.out),
            "files": list(self.files),
            "kept": list(self.kept),
            "notes": list(self.notes),
        }
        values["losses"] = [
            {
                "name": key,
                "dtype": loss.dtype,
                "scaled": loss.scaled,
                "error": loss.relative,
                "lost_share": loss.share,
            }
            for key, loss in self.losses.items()
        ]
        return values


def merge_checkpoint(
    base: str | Path,
    adapters: Sequence[tuple[str | Path, float]],
    out: str | Path,
    *,
    dtype: Any = None,
    only: str | None = None,
    names: Names | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Write a checkpoint with adapters merged into it: `W + Σ weight·ΔW`, added in float32 and rounded once.

    Headers and adapters are checked before anything is written. Only the adapters and a few blocks
    of rows are in memory at a time. If a run is interrupted, the next run with the same files,
    weights and options resumes it.

    Args:
        base: a safetensors file, or a folder with one or with shards and their index.
        adapters: paths of adapters (PEFT's folders, LyCORIS' or kohya's files) and their weights.
            Parameters of `modules_to_save` replace those of the base, whatever the weight.
        out: a folder that does not exist yet. Files beside the base's weights (config, tokenizer)
            are copied into it.
        dtype: the dtype of all floating tensors; by default that of the base.
        only: a regular expression. Only modules whose whole name in the adapter's file matches are
            merged.
        names: new names for modules, `{regex: template}` or a function, if the base was renamed
            since the adapter was trained. Patterns match whole names of modules in the adapter's
            file.
        force: replace an existing `out` once the new one is complete; and write float8 without
            scales even if rounding loses most of the update.
        progress: called with the number of bytes written so far and in total.

    Raises:
        FileExistsError: `out` exists, or another run is writing it.
        ValueError: see `plan_merge`; or float16 cannot hold the values; or `dtype` was given for a
            quantised base; or rounding to float8 without scales would lose more than half of the
            update. `out` does not exist then.
        OSError: the disk is full, or too small for the result.

    Example:
        >>> import tempfile, jax, loha_jax
        >>> from safetensors.numpy import load_file, save_file
        >>> config = loha_jax.LoHaConfig(r=2, target_modules=["q"], init_weights=False)
        >>> params = loha_jax.inject({"q": {"kernel": np.ones((3, 4), np.float32)}}, config, key=jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"q.weight": np.ones((4, 3), np.float32)}, f"{folder}/base.safetensors")
        ...     loha_jax.interop.save_peft(f"{folder}/adapter", params)
        ...     merge_checkpoint(f"{folder}/base.safetensors", [(f"{folder}/adapter", 1.0)], f"{folder}/out").files
        ('base.safetensors',)
    """
    checkpoint, out = Checkpoint(base), Path(os.path.abspath(out))
    _check_place(checkpoint, out, force)
    if dtype is not None and checkpoint.quantisation.is_used:
        raise ValueError(
            f"{checkpoint.path} is quantised ({checkpoint.quantisation.example}): its tensors keep their dtypes, leave "
            "`dtype=` out"
        )
    plan, files = plan_merge(checkpoint, adapters, only=only, names=names)
    headers = {
        file.name: _new_header(checkpoint, file, dtype, plan.resized) for file in checkpoint.files
    }
    fingerprint = _fingerprint(checkpoint, files, [weight for _, weight in adapters], dtype, only)
    with WorkingFolder(out, fingerprint) as work:
        kept = [
            name for name, header in headers.items() if work.is_finished(name, header.file_size)
        ]
        _check_space(
            out.parent,
            sum(header.file_size for name, header in headers.items() if name not in kept),
        )
        losses = _write_shards(checkpoint, plan, headers, dtype, work, kept, progress)
        try:
            check_losses(losses.tensors, force)
        except ValueError:
            work.discard()
            raise
        _write_side_files(checkpoint, work.files, dtype, plan.resized)
        work.publish(force)
    changed = {*plan.updates, *plan.added} - plan.replaced.keys()
    both = plan.replaced.keys() & plan.updates.keys()
    return MergeReport(
        out=out,
        files=tuple(headers),
        kept=tuple(kept),
        merged=len(changed) + len(both),
        replaced=len(plan.replaced) - len(both),
        copied=len(checkpoint.shapes) - len(plan.keys),
        bytes=sum(header.file_size for header in headers.values()),
        losses=losses.tensors,
        notes=(*plan.notes, *loss_notes(losses.tensors)),
    )


def _write_shards(
    checkpoint: Checkpoint,
    plan: MergePlan,
    headers: Mapping[str, Header],
    dtype: Any,
    work: WorkingFolder,
    kept: Sequence[str],
    progress: Callable[[int, int], None] | None,
) -> Losses:
    """Write the files that an earlier run has not finished; return what rounding loses in all of them."""
    losses = Losses()
    for name in kept:
        losses.add_json(json.loads(work.losses(name).read_text(encoding="utf-8")))
    total = sum(header.file_size for header in headers.values())
    done = sum(headers[name].file_size for name in kept)

    def count(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    count(0)
    for file in checkpoint.files:
        if file.name not in kept:
            own = Losses()
            writer = ShardWriter(checkpoint, plan, file, headers[file.name], dtype, count, own)
            writer.write(
                work.files / file.name, functools.partial(own.write, work.losses(file.name))
            )
            losses.add_json(own.to_json())
    return losses


def _check_place(checkpoint: Checkpoint, out: Path, force: bool) -> None:
    if os.path.lexists(out) and not force:
        raise FileExistsError(
            f"{out} is there already. Choose another place, or pass `force=True` to replace it"
        )
    real, source = out.resolve(), checkpoint.folder.resolve()
    if real == source or real in source.parents:
        raise ValueError(f"{out} holds the base checkpoint; a merge does not replace its own base")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"There is no folder '{out.parent}' to put {out.name} into")


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"the merged checkpoint takes {needed / 1e9:.2f} GB more, there are {free / 1e9:.2f} GB free",
            str(folder),
        )


def _new_header(
    checkpoint: Checkpoint, file: Path, dtype: Any, resized: Mapping[str, tuple[int, ...]]
) -> Header:
    header = checkpoint.header(file)
    if dtype is None and header.places.keys().isdisjoint(resized):
        return header
    shapes = {**checkpoint.shapes, **resized}
    tensors = [
        (key, new_dtype(checkpoint.dtypes[key], dtype), shapes[key]) for key in header.places
    ]
    return Header.of(tensors, header.metadata, checkpoint.stored_names)


def _fingerprint(
    checkpoint: Checkpoint,
    adapters: Sequence[AdapterFile],
    weights: Sequence[float],
    dtype: Any,
    only: str | None,
) -> str:
    """Return a hash of everything that the result depends on; of base files, the header, size and time."""
    digest = hashlib.sha256()

    def add(*values: Any) -> None:
        digest.update(json.dumps(values).encode() + b"\n")

    add(_VERSION, list(weights), None if dtype is None else np.dtype(dtype).name, only)
    for file in checkpoint.files:
        state = file.stat()
        add(file.name, state.st_size, state.st_mtime_ns)
        digest.update(checkpoint.header(file).data)
    for adapter in adapters:
        for own, module in adapter.modules.items():
            add(own, module.name, module.kind, module.r, module.alpha)
        for key, tensor in adapter.arrays.items():
            add(key, str(tensor.dtype), list(tensor.shape))
            digest.update(np.ascontiguousarray(tensor).tobytes())
    return digest.hexdigest()


def _write_side_files(
    checkpoint: Checkpoint, folder: Path, dtype: Any, resized: Mapping[str, tuple[int, ...]]
) -> None:
    if checkpoint.index is not None:
        text = checkpoint.index.read_text(encoding="utf-8")
        if dtype is not None or resized:
            index = json.loads(text)
            shapes = {**checkpoint.shapes, **resized}
            sizes = {
                k: math.prod(s) * new_dtype(checkpoint.dtypes[k], dtype).itemsize
                for k, s in shapes.items()
            }
            index.setdefault("metadata", {})["total_size"] = sum(sizes.values())
            text = json.dumps(index, indent=2) + "\n"
        write_atomically(folder / checkpoint.index.name, text.encode())
    if checkpoint.is_whole_folder:
        for file in side_files(checkpoint.folder):
            content = side_file_content(file, dtype)
            if file.name == "config.json" and resized:
                key, new = next(iter(resized.items()))
                config = with_vocabulary_size(
                    json.loads(content), checkpoint.shapes[key][0], new[0]
                )
                content = (json.dumps(config, indent=2) + "\n").encode()
            write_atomically(folder / file.name, content)
