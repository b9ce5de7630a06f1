"""`ConversionSource`: an adapter to convert, beside the checkpoint of its base model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jax.typing import DTypeLike

from loha_jax.targets.module_names import Names

from ..disk.atomic import (
    move_into_place,
    naming,
    temporary_folder,
    write_atomically,
    write_files,
)
from ..disk.base_checkpoint import Checkpoint
from ..formats.adapter_file import AdapterFile, AdapterModule
from ..formats.lycoris_keys import embeddings_note
from ..formats.module_lookup import ModuleLookup
from ..formats.read_adapter import read_adapter
from ..names.renames import rename_hint, renamed
from ..updates.lora_conversion import cast_tensors, loha_of
from ..updates.low_rank_update import LowRankUpdate


@dataclasses.dataclass
class ConversionSource:
    """An adapter to write in another format, with its modules' names and shapes as in the base.

    Attributes:
        adapter: its modules have the base's names.
        checkpoint: the base, or None.
        shapes: of the weights in the base, by module, as `[out, in, *spatial]`.
        lookup: finds modules in the base.
        is_unchanged: whether all of the file's modules are there, under the names that the file
            has.
        notes: what a user should know, one sentence each.
    """

    adapter: AdapterFile
    checkpoint: Checkpoint | None
    shapes: dict[str, tuple[int, ...]]
    lookup: ModuleLookup
    is_unchanged: bool
    notes: list[str]

    def cast(self, dtype: DTypeLike) -> None:
        """Convert the factors to another dtype."""
        modules = {own: cast_module(module, dtype) for own, module in self.adapter.modules.items()}
        self.adapter = dataclasses.replace(self.adapter, modules=modules)

    def lohas(self) -> dict[str, AdapterModule]:
        """Return the modules as LoHa, by the source's names."""
        modules = self.adapter.modules
        if any(module.kind == "lora" for module in modules.values()):
            self.notes.append("each LoRA became the LoHa of its rank that is equal to it")
        return {own: loha_of(m) if m.kind == "lora" else m for own, m in modules.items()}


def read_source(
    path: str | Path, base: str | Path | None, only: str | None, names: Names | None
) -> ConversionSource:
    """Read an adapter, and look its modules up in the base.

    Args:
        path: of the adapter.
        base: the base model's checkpoint, if given.
        only: a regular expression for the whole names of modules in the file; the others are left
            out.
        names: other names for these modules, see `renamed`.

    Raises:
        ValueError: the base has no weight for a module, or one of another shape, or one for two
            modules.
    """
    checkpoint = None if base is None else Checkpoint(base)
    known = checkpoint.modules if checkpoint else []
    read = read_adapter(path, modules=known if checkpoint else None, only=only)
    adapter = renamed(read, names, known)
    if not adapter.modules:
        raise ValueError(f"{path} has no module with factors")
    notes: list[str] = [embeddings_note(adapter.embeddings)] if adapter.embeddings else []
    shapes: dict[str, tuple[int, ...]] = {}
    lookup = ModuleLookup(known, adapter.modules.values())
    modules = adapter.modules
    if checkpoint is not None:
        notes += lookup.notes
        modules, shapes = _in_base(checkpoint, adapter, lookup)
    is_unchanged = all(own == module.name for own, module in modules.items())
    adapter = dataclasses.replace(adapter, modules=modules)
    return ConversionSource(adapter, checkpoint, shapes, lookup, is_unchanged, notes)


def _in_base(
    base: Checkpoint, adapter: AdapterFile, lookup: ModuleLookup
) -> tuple[dict[str, AdapterModule], dict[str, tuple[int, ...]]]:
    """Return the modules under the base's names, and the shapes of their weights."""
    shapes: dict[str, tuple[int, ...]] = {}
    result: dict[str, AdapterModule] = {}
    owners: dict[str, str] = {}
    lost: dict[str, str] = {}
    for own, module in adapter.modules.items():
        name = lookup.find(module.name, module.prefix)
        shape = base.shapes.get(f"{name}.weight")
        if shape is None:
            lost[own + base.quantisation.why_missing(f"{name}.weight")] = module.name
            continue
        if (other := owners.setdefault(name, own)) != own:
            raise ValueError(
                f"{other} and {own} are both {name} in {base.path}, which has one of the two "
                "models. Choose with `only=`"
            )
        base.check_readable(f"{name}.weight")
        update = LowRankUpdate.of(module)
        fits = update.fits(shape)
        if not fits and not (len(shape) == 2 and update.fits(shape[::-1])):
            raise ValueError(
                f"{name}.weight is {list(shape)} in {base.path}, the adapter's {own} is for "
                f"{[update.rows, update.columns]}"
            )
        shapes[name] = shape if fits else shape[::-1]
        result[own] = dataclasses.replace(module, name=name)
    if lost:
        raise ValueError(
            f"{base.path} has no weight for {', '.join(lost)}. Give the base model "
            "that the adapter was made for, or choose modules with `only=`."
            + rename_hint(list(lost.values()), base.modules)
        )
    return result, shapes


@dataclasses.dataclass(frozen=True)
class Converted:
    """An adapter in another format, before it is written.

    Attributes:
        modules: that are written.
        content: of a file; or of the files of a folder, by name.
        errors: of LoRA, the relative error of each module's update; 0 where it is exact.
    """

    modules: list[AdapterModule]
    content: bytes | dict[str, bytes]
    errors: dict[str, float] = dataclasses.field(default_factory=dict)

    def write(self, target: Path, force: bool) -> None:
        """Write the file or folder. It appears whole or not at all.

        Args:
            target: an absolute path.
            force: a target that is there is replaced.
        """
        with naming(target), temporary_folder(target) as work:
            new = work / "new"
            if isinstance(self.content, bytes):
                write_atomically(new, self.content)
            else:
                new.mkdir()
                write_files(new, self.content)
            move_into_place(new, target, force)


def cast_module(module: AdapterModule, dtype: DTypeLike) -> AdapterModule:
    """Return a module with its tensors in another dtype."""
    tensors = cast_tensors(module.name, module.arrays, dtype)
    norms = tensors.pop("dora_scale", None)
    return dataclasses.replace(module, tensors=tensors, dora_scale=norms)
