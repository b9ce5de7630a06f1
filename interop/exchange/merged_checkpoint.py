"""`save_merged`: a tree with its adapters merged as a Hugging Face checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from loha_jax.targets.model_layouts import Layouts
from loha_jax.targets.module_names import Names
from loha_jax.tree.adapters import adapter_names, check_adapters
from loha_jax.tree.containers import takes_model
from loha_jax.tree.leaves import LoHaWeight, is_adapted
from loha_jax.tree.merge import check_rounding, merge, unload
from loha_jax.tree.named_tree import NamedTree
from loha_jax.tree.quantised import QuantisedArray

from ..disk.atomic import folder_to_write, whole_folder, write_atomically
from ..disk.base_checkpoint import (
    Checkpoint,
    is_floating,
    read_config,
    side_file_content,
    side_files,
    weight_files,
    written_dtype,
)
from ..disk.checkpoint_writer import CheckpointWriter, parse_size
from ..disk.quantised import Scale, is_float8
from ..names.leaf_source import Source
from ..names.scaled_leaves import requantised, rows_problem, warn_of_losses
from ..names.tree_sources import find_sources_in
from ..updates.rounding import Loss
from .base_weights import cast_values
from .mismatch import Mismatch


@takes_model(changes=False)
def save_merged(
    folder: str | Path,
    params: PyTree,
    *,
    names: Names | None = None,
    layouts: Layouts | None = None,
    base: str | Path | None = None,
    adapters: Sequence[str] | None = None,
    dtype: DTypeLike | None = None,
    tied: Mapping[str, str] | None = None,
    max_shard_size: int | str = "5GB",
    safe: bool = False,
    force: bool = False,
) -> None:
    """Write a tree, with its adapters merged, as a folder for transformers' `from_pretrained`.

    Tensors are merged and written one at a time. A new folder appears whole; in one that holds
    other files the weights appear last, when all are whole.

    Args:
        folder: made if it is not there; may not hold weights.
        params: an adapted tree, or a plain one.
        names, layouts: as for `load_base`. Adapted kernels keep the names and layouts that they
            have. A map with transforms of rows is given here too.
        base: the checkpoint that the tree came from (a safetensors file or folder). With it, the
            result has its tensors, names, shapes and dtypes; those that the tree does not hold are
            copied through, and the files next to it (config, tokenizer) too.
        adapters: which to merge; the active ones by default.
        dtype: of all floating tensors, instead of the base's (or without one, each leaf's own).
        tied: as for `load_base`: leaves that share another leaf's tensor, which is the one
            that the base holds. Their values must still be equal.
        max_shard_size: of one file: bytes, or "5GB".
        safe: refuse a merged weight with NaN or infinity.
        force: write float8 without scales although rounding loses more than half of an update.

    Scaled float8 of the base is quantised again, with a scale that fits; a warning says where that
    loses more than half of an update.

    Raises:
        FileExistsError: the folder holds weights.
        NotADirectoryError: it is a file.
        ValueError: leaves that have no name or no tensor in `base`, or are misshapen, in one error;
            two leaves with one tensor and different values; a leaf that is tied no longer; an
            unknown adapter; a base that is quantised, but not as float8 with scales; float8 without
            scales that loses the update. Nothing is written then.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_merged(folder, {"q": {"kernel": jnp.ones((4, 3))}})
        ...     Checkpoint(folder).shapes
        {'q.weight': (3, 4)}
    """
    folder = folder_to_write(folder, "save_merged")
    if held := weight_files(folder):
        raise FileExistsError(
            f"{folder} already holds weights ({', '.join(held)}). Choose another folder, or empty "
            "it."
        )
    check_adapters(params, adapters or ())
    size = parse_size(max_shard_size)
    checkpoint = Checkpoint(base) if base is not None else None
    tree, sources, problems = find_sources_in(checkpoint, params, names, layouts)
    if checkpoint is not None and checkpoint.quantisation.is_used and dtype is not None:
        raise ValueError(
            f"{base} is quantised ({checkpoint.quantisation.example}): leave dtype= out, or give "
            "another base"
        )
    tensors = _MergedTensors(tree, sources, checkpoint, adapters, safe, force)
    titles = "unexpected", "missing", "leaves that do not fit"
    mismatch = Mismatch(misshapen=problems, titles=titles)
    tensors.find_owners(tied or {}, mismatch)
    mismatch.check("The tree cannot be saved; nothing was written", "")
    plan = tensors.plan(dtype)
    config = read_config(checkpoint.folder) if checkpoint is not None else {}
    stem = "diffusion_pytorch_model" if "_diffusers_version" in config else "model"
    with (
        whole_folder(folder) as place,
        CheckpointWriter(place, plan, size, stem, {"format": "pt"}) as writer,
    ):
        tensors.write(writer, plan)
        warn_of_losses(tensors.losses)
        if checkpoint is not None:
            for file in side_files(checkpoint.folder):
                if not (place / file.name).exists():  # an author's own stays
                    write_atomically(place / file.name, side_file_content(file, dtype))
        writer.commit()


@dataclasses.dataclass
class _MergedTensors:
    """The torch tensors of a tree with its adapters merged, one at a time.

    Attributes:
        tree, sources: from `find_sources_in`.
        checkpoint: the base, whose other tensors are copied through, or None.
        adapters, safe, force: as for `save_merged`.
        owners: by torch name the leaves that hold the tensor, each as its position and an index of
            its stack.
        losses: of the tensors that were quantised again.
    """

    tree: NamedTree
    sources: Mapping[int, Source]
    checkpoint: Checkpoint | None
    adapters: Sequence[str] | None
    safe: bool
    force: bool
    owners: dict[str, list[tuple[int, int]]] = dataclasses.field(default_factory=dict)
    losses: dict[str, Loss] = dataclasses.field(default_factory=dict)

    def find_owners(self, tied: Mapping[str, str], mismatch: Mismatch) -> None:
        """Find the tensors that the leaves hold, and note those that do not fit the base."""
        base = self.checkpoint
        taken = {key for source in self.sources.values() for key in source.keys}
        for position, source in self.sources.items():
            if base and (problem := rows_problem(base.quantisation, source, taken)):
                mismatch.misshapen.append(f"{'.'.join(self.tree.paths[position])}: {problem}")
            for n, key in [*enumerate(source.keys), *((0, key) for key in source.also)]:
                if name := self._name_in_base(position, key, tied, mismatch):
                    self.owners.setdefault(name, []).append((position, n))

    def _name_in_base(
        self, position: int, key: str, tied: Mapping[str, str], mismatch: Mismatch
    ) -> str | None:
        """Return the tensor's name in the base, if there is a base; None where it has none."""
        if (base := self.checkpoint) is None:
            return key
        leaf, source = self.tree.leaves[position], self.sources[position]
        shape, where = tuple(leaf.shape), ".".join(self.tree.paths[position])
        name = key if key in base.shapes else tied.get(key, key)
        if name not in base.shapes:
            why = base.quantisation.why_missing(key)
            mismatch.misshapen.append(
                f"{key} (for {where} {list(shape)}) is not in the base checkpoint{why}"
            )
            return None
        if not source.fits(shape, base.shapes[name]):
            need = list(source.torch_shape(shape))
            what = f" is {list(base.shapes[name])} in the base, a leaf {list(shape)} gives {need}"
            mismatch.shapes.append((f"{name} (for {where})", what))
        if is_floating(leaf.dtype) and name in base.quantisation.problems:
            mismatch.misshapen.append(base.quantisation.problems[name])
        return name

    def plan(self, dtype: DTypeLike | None) -> list[tuple[str, np.dtype, tuple[int, ...]]]:
        """Return name, dtype and shape of every tensor of the checkpoint, in its order."""
        plan = []
        for key in self.owners if self.checkpoint is None else self.checkpoint.shapes:
            if self.checkpoint is not None:
                kind, shape = self.checkpoint.dtypes[key], self.checkpoint.shapes[key]
            else:
                position, _ = self.owners[key][0]
                leaf = self.tree.leaves[position]
                kind, shape = leaf.dtype, self.sources[position].torch_shape(leaf.shape)
            plan.append((key, written_dtype(kind, dtype), tuple(shape)))
        return plan

    def write(
        self, writer: CheckpointWriter, plan: Sequence[tuple[str, np.dtype, tuple[int, ...]]]
    ) -> None:
        """Merge and write all tensors of a plan."""
        base, scales = self.checkpoint, self._scales()
        written_with_theirs = {scale.key for scale in scales.values()}
        for key, target, shape in plan:
            if key in written_with_theirs:
                continue
            if key not in self.owners:
                assert base is not None
                writer.write(key, cast_values(base.read(key), target, key))
                continue
            value = self._value(key)
            if key in scales:
                assert base is not None
                values, scale = requantised(base, key, value.reshape(shape), self.losses)
                writer.write(key, values)
                writer.write(scales[key].key, scale)
                continue
            stored = cast_values(value, target, key)
            position, index = self.owners[key][0]
            leaf = self.tree.leaves[position]
            if is_float8(target) and not is_float8(value.dtype) and is_adapted(leaf):
                unmerged = self.sources[position].tensor(np.asarray(unload(leaf)), index)
                check_rounding(stored, value, unmerged, key, self.force)
            writer.write(key, stored.reshape(shape))

    def _scales(self) -> dict[str, Scale]:
        """Return the scales of tensors that are quantised again, but not those that leaves hold."""
        scales = self.checkpoint.quantisation.scales if self.checkpoint is not None else {}
        return {
            key: s for key, s in scales.items() if key in self.owners and s.key not in self.owners
        }

    def _value(self, key: str) -> np.ndarray:
        """Return one merged tensor.

        Raises:
            ValueError: the leaves that hold it have different values.
        """
        first, *others = self.owners[key]
        value = self._merged(*first)
        for other in others:
            if not np.array_equal(value, self._merged(*other).reshape(value.shape)):
                paths = [".".join(self.tree.paths[position]) for position, _ in self.owners[key]]
                raise ValueError(
                    f"{' and '.join(paths)} are both {key} in torch, and have different values "
                    "now. The weight is tied: adapt or change all of its copies alike. Nothing was "
                    "written."
                )
        return value

    def _merged(self, position: int, index: int) -> np.ndarray:
        """Return one torch tensor of a leaf; of an adapted stack, only that module is merged."""
        leaf, source = self.tree.leaves[position], self.sources[position]
        if is_adapted(leaf):
            own = self.adapters
            if own is not None:
                own = [name for name in own if name in adapter_names(leaf)]
            stack = leaf.layout.axes("s") if isinstance(leaf, LoHaWeight) else ()
            if stack and stack == source.stack and stack == tuple(range(len(stack))):
                leaf = _module_of_stack(cast(LoHaWeight, leaf), index, len(stack))
                moved = tuple(tuple(axis - len(stack) for axis in group) for group in source.axes)
                key = source.keys[index : index + 1]
                source, index = Source(key, (), moved, rows=source.rows), 0
            leaf = merge(leaf, own, safe=self.safe, force=self.force)
        return source.tensor(np.asarray(leaf), index)


def _module_of_stack(leaf: LoHaWeight, index: int, axes: int) -> LoHaWeight:
    """Return one module of a stack; of a quantised kernel, only its part is dequantised."""
    where = tuple(map(int, np.unravel_index(index, leaf.shape[:axes])))
    base = leaf.kernel
    kernel = base.part(where) if isinstance(base, QuantisedArray) else base[where]
    adapters = jax.tree.map(lambda array: array[where], leaf.adapters)
    layout, names = leaf.layout.strip(leaf.layout.ndim - axes), (leaf.names[index],)
    return dataclasses.replace(leaf, kernel=kernel, adapters=adapters, layout=layout, names=names)
