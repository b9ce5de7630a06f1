"""`merge_checkpoint`: adapters merged into a base checkpoint, a few rows at a time.

The result has the shards, index, key order and metadata of the base. It is written to a hidden
folder beside its place and appears by one rename. If a run is interrupted, its finished shards stay
in that folder, and the next run resumes from them.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jax.typing import DTypeLike

from loha_jax.targets.module_names import Names

from ..disk.atomic import check_place
from ..disk.base_checkpoint import Checkpoint
from ..disk.resumable_folder import WorkingFolder
from ..updates.rounding import Loss, Losses, check_losses, loss_notes
from .plan import plan_merge
from .shard import ShardWriter
from .target import MergeTarget


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

    def to_json(self) -> dict[str, object]:
        """Return the result in types that `json` writes."""
        losses = [
            {
                "name": key,
                "dtype": loss.dtype,
                "scaled": loss.scaled,
                "error": loss.relative,
                "lost_share": loss.share,
            }
            for key, loss in self.losses.items()
        ]
        return {**vars(self), "out": str(self.out), "losses": losses}


def merge_checkpoint(
    base: str | Path,
    adapters: Sequence[tuple[str | Path, float]],
    out: str | Path,
    *,
    dtype: DTypeLike | None = None,
    only: str | None = None,
    names: Names | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Write a checkpoint with adapters merged into it.

    `W + Σ weight·ΔW` is added in float32 and rounded once. Headers and adapters are checked before
    anything is written. Only the adapters and a few blocks of rows are in memory at a time. If a
    run is interrupted, the next run with the same files, weights and options resumes it.

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
        >>> base = {"q": {"kernel": np.ones((3, 4), np.float32)}}
        >>> params = loha_jax.inject(base, config, key=jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file, adapter = f"{folder}/base.safetensors", f"{folder}/adapter"
        ...     save_file({"q.weight": np.ones((4, 3), np.float32)}, file)
        ...     loha_jax.interop.save_peft(adapter, params)
        ...     merge_checkpoint(file, [(adapter, 1.0)], f"{folder}/out").files
        ('base.safetensors',)
    """
    checkpoint, out = Checkpoint(base), Path(os.path.abspath(out))
    check_place(out, force, [checkpoint.folder, *(path for path, _ in adapters)])
    if dtype is not None and checkpoint.quantisation.is_used:
        raise ValueError(
            f"{checkpoint.path} is quantised ({checkpoint.quantisation.example}): its tensors keep "
            "their dtypes, leave `dtype=` out"
        )
    plan, files = plan_merge(checkpoint, adapters, only=only, names=names)
    target = MergeTarget(checkpoint, plan, None if dtype is None else np.dtype(dtype))
    fingerprint = target.fingerprint(files, [weight for _, weight in adapters], only)
    with WorkingFolder(out, fingerprint) as work:
        sizes = {name: header.file_size for name, header in target.headers.items()}
        kept = tuple(name for name, size in sizes.items() if work.is_finished(name, size))
        losses = _write_shards(target, sizes, work, kept, progress)
        try:
            check_losses(losses.tensors, force)
        except ValueError:
            work.discard()
            raise
        target.write_side_files(work.files)
        work.publish(force)
    return _report(target, out, kept, losses)


def _write_shards(
    target: MergeTarget,
    sizes: Mapping[str, int],
    work: WorkingFolder,
    kept: Sequence[str],
    progress: Callable[[int, int], None] | None,
) -> Losses:
    """Write the files that an earlier run has not finished.

    Args:
        target: the checkpoint to write.
        sizes: of its files.
        work: the folder to write into.
        kept: the files that are finished.
        progress: as in `merge_checkpoint`.

    Returns:
        The rounding losses of all files.
    """
    losses = Losses()
    for name in kept:
        losses.add_json(json.loads(work.losses(name).read_text(encoding="utf-8")))
    total, done = sum(sizes.values()), sum(sizes[name] for name in kept)
    free = shutil.disk_usage(work.files).free
    if free < total - done:
        said = f"takes {(total - done) / 1e9:.2f} GB more, there are {free / 1e9:.2f} GB free"
        raise OSError(errno.ENOSPC, f"the merged checkpoint {said}", str(work.files.parents[1]))

    def count(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    count(0)
    for file in target.base.files:
        if file.name not in kept:
            own = Losses()
            note = functools.partial(own.write, work.losses(file.name))
            ShardWriter(target, file, count, own).write(work.files / file.name, note)
            losses.add_json(own.to_json())
    return losses


def _report(target: MergeTarget, out: Path, kept: tuple[str, ...], losses: Losses) -> MergeReport:
    plan = target.plan
    replaced = plan.replaced.keys() - plan.updates.keys()
    return MergeReport(
        out=out,
        files=tuple(target.headers),
        kept=kept,
        merged=len(plan.keys - replaced),
        replaced=len(replaced),
        copied=len(target.base.shapes) - len(plan.keys),
        bytes=sum(header.file_size for header in target.headers.values()),
        losses=losses.tensors,
        notes=(*plan.notes, *loss_notes(losses.tensors)),
    )
