"""`merge_checkpoint`: a base checkpoint with adapters merged into it, from files to files, a few rows at a time.

The result has the base's shards, index, key order and metadata. It is made in a hidden folder beside its place, where
finished shards stay when a run is cut off, and appears by one rename.
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
from loha_jax.interop.disk.atomic import write_atomically
from loha_jax.interop.disk.base_checkpoint import Checkpoint, Header, side_file_content, side_files
from loha_jax.interop.disk.resumable_folder import WorkingFolder
from loha_jax.interop.formats.adapter_file import AdapterFile
from loha_jax.interop.merge.plan import plan_merge
from loha_jax.interop.merge.shard import ShardWriter, new_dtype
from loha_jax.interop.names.resized_vocabulary import with_vocabulary_size
from loha_jax.interop.updates.rounding import Loss, Losses, check_losses, loss_notes

from loha_jax.targets.module_names import Names

_VERSION = 2
"""Of the working folder; a change in what is written counts it up."""


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        out: the folder.
        files: names of the files of weights.
        kept: those that an earlier run, cut off, had finished.
        merged, replaced, copied: numbers of tensors: with updates added, with new values, as they were.
        bytes: of the files of weights.
        losses: what rounding loses, by merged tensor of fewer than 32 bits.
        notes: what a user should know, one sentence each.
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
    """Writes a checkpoint with adapters merged into it: `W + Σ weight·ΔW`, added in float32 and rounded once.

    Everything is checked on headers and adapters first. Memory is that of the adapters and of a few blocks of rows.
    A run that was cut off is continued by the next one with the same files, weights and options.

    Args:
        base: a safetensors file, or a folder with one or with shards and their index.
        adapters: paths of adapters (PEFT's folders, LyCORIS' or kohya's files) and their weights. Parameters of
            `modules_to_save` replace the base's whatever the weight.
        out: a folder that is not there yet. Files beside the base's weights (config, tokenizer) are copied into it.
        dtype: of all floating tensors, instead of the base's.
        only: a regular expression for the whole names of modules in the adapters' files; the others are left out.
        names: other names for modules, `{regex: template}` or a function, where the base's were changed since the
            adapter was trained; patterns are for whole names of modules in the adapters' files.
        force: an `out` that is there is replaced, when the new one is whole; and a base of float8 without scales is
            written although rounding loses most of the update.
        progress: called with the bytes written so far and in all.

    Raises:
        FileExistsError: `out` is there, or another run is writing it.
        ValueError: see `plan_merge`; or values that float16 cannot hold; or `dtype` with a quantised base; or rounding
            to float8 without scales would lose more than half of the update. There is no `out` then.
        OSError: the disk is full, or cannot hold the result.

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
            "--dtype (dtype=) out"
        )
    plan, files = plan_merge(checkpoint, adapters, only=only, names=names)
    headers = {file.name: _new_header(checkpoint, file, dtype, plan.resized) for file in checkpoint.files}
    total = sum(header.file_size for header in headers.values())
    fingerprint = _fingerprint(checkpoint, files, [weight for _, weight in adapters], dtype, only)
    with WorkingFolder(out, fingerprint) as work:
        losses = Losses()
        kept = tuple(
            name
            for name, header in headers.items()
            if work.is_finished(name, header.file_size) and work.losses(name).is_file()
        )
        for name in kept:
            losses.add_json(json.loads(work.losses(name).read_text(encoding="utf-8")))
        done = sum(headers[name].file_size for name in kept)
        _check_space(out.parent, total - done)

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
                writer.write(work.files / file.name, functools.partial(own.write, work.losses(file.name)))
                losses.add_json(own.to_json())
        try:
            check_losses(losses.tensors, force)
        except ValueError:
            work.discard()
            raise
        _write_side_files(checkpoint, work.files, dtype, plan.resized)
        work.publish(force)
    return MergeReport(
        out,
        tuple(headers),
        kept,
        len({*plan.updates, *plan.added} - plan.replaced.keys()) + len(plan.replaced.keys() & plan.updates.keys()),
        len(plan.replaced.keys() - plan.updates.keys()),
        len(checkpoint.shapes) - len(plan.keys),
        total,
        losses.tensors,
        (*plan.notes, *loss_notes(losses.tensors)),
    )


def _check_place(checkpoint: Checkpoint, out: Path, force: bool) -> None:
    if os.path.lexists(out) and not force:
        raise FileExistsError(f"{out} is there already. Choose another place, or pass --force to replace it")
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


def _new_header(checkpoint: Checkpoint, file: Path, dtype: Any, resized: Mapping[str, tuple[int, ...]]) -> Header:
    header = checkpoint.header(file)
    if dtype is None and header.places.keys().isdisjoint(resized):
        return header
    shapes = {**checkpoint.shapes, **resized}
    tensors = [(key, new_dtype(checkpoint.dtypes[key], dtype), shapes[key]) for key in header.places]
    return Header.of(tensors, header.metadata, checkpoint.stored_names)


def _fingerprint(
    checkpoint: Checkpoint, adapters: Sequence[AdapterFile], weights: Sequence[float], dtype: Any, only: str | None
) -> str:
    """Of everything that the result depends on; a base file counts by its header, size and time."""
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


def _write_side_files(checkpoint: Checkpoint, folder: Path, dtype: Any, resized: Mapping[str, tuple[int, ...]]) -> None:
    if checkpoint.index is not None:
        text = checkpoint.index.read_text(encoding="utf-8")
        if dtype is not None or resized:
            index = json.loads(text)
            shapes = {**checkpoint.shapes, **resized}
            sizes = {k: math.prod(s) * new_dtype(checkpoint.dtypes[k], dtype).itemsize for k, s in shapes.items()}
            index.setdefault("metadata", {})["total_size"] = sum(sizes.values())
            text = json.dumps(index, indent=2) + "\n"
        write_atomically(folder / checkpoint.index.name, text.encode())
    if checkpoint.is_whole_folder:
        for file in side_files(checkpoint.folder):
            content = side_file_content(file, dtype)
            if file.name == "config.json" and resized:
                key, new = next(iter(resized.items()))
                config = with_vocabulary_size(json.loads(content), checkpoint.shapes[key][0], new[0])
                content = (json.dumps(config, indent=2) + "\n").encode()
            write_atomically(folder / file.name, content)
