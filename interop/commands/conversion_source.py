"""`ConversionSource`: an adapter file to convert, beside the checkpoint of the model that it was made for."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from loha_jax.targets.module_names import Names

from ..disk.base_checkpoint import Checkpoint
from ..formats.adapter_file import AdapterModule
from ..formats.lycoris_keys import PARAMETER_OF, embeddings_note
from ..formats.module_lookup import ModuleLookup
from ..formats.read_adapter import read_adapter
from ..names.renames import rename_hint, renamed
from ..updates.lora_conversion import cast_tensors, loha_of
from ..updates.low_rank_update import LowRankUpdate


class ConversionSource:
    """An adapter to convert, with its modules' names and shapes looked up in the base.

    Args:
        path: of the adapter.
        base: the base model's checkpoint, if given.
        only: a regular expression for the whole names of modules in the file; the others are left
            out.
        names: other names for these modules, see `renamed`.

    Attributes:
        adapter: its modules have the base's names.
        checkpoint: the base, or None.
        shapes: of the weights in the base, by module, as `[out, in, *spatial]`.
        lookup: finds modules in the base.
        is_unchanged: whether all of the file's modules are there, under the names that the file
            has.
        notes: what a user should know, one sentence each.

    Raises:
        ValueError: the base has no weight for a module, or one of another shape, or one for two
            modules.
    """

    def __init__(
        self,
        path: str | Path,
        base: str | Path | None,
        only: str | None,
        names: Names | None = None,
    ):
        self.checkpoint = None if base is None else Checkpoint(base)
        shapes = self.checkpoint.shapes if self.checkpoint else {}
        known = self.checkpoint.modules if self.checkpoint else []
        read = read_adapter(path, modules=known if self.checkpoint else None, only=only)
        adapter = renamed(read, names, known)
        modules = adapter.modules
        if not modules:
            raise ValueError(f"{path} has no module with factors")
        self.notes: list[str] = [embeddings_note(adapter.embeddings)] if adapter.embeddings else []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.lookup = ModuleLookup(known, modules.values())
        if self.checkpoint is not None:
            self.notes += self.lookup.notes
            modules = self._in_base(modules, shapes)
        self.adapter = dataclasses.replace(adapter, modules=modules)
        self.is_unchanged = list(adapter.modules) == [module.name for module in modules.values()]

    def _in_base(
        self, modules: Mapping[str, AdapterModule], shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, AdapterModule]:
        """Return the modules under the base's names."""
        assert self.checkpoint is not None
        quantisation = self.checkpoint.quantisation
        result, lost, owners = {}, [], {}
        for own, module in modules.items():
            name = self.lookup.find(module.name, module.prefix)
            shape = shapes.get(f"{name}.weight")
            if shape is None:
                lost.append(own + quantisation.why_missing(f"{name}.weight"))
                continue
            if (other := owners.setdefault(name, own)) != own:
                raise ValueError(
                    f"{other} and {own} are both {name} in {self.checkpoint.path}, which has one of the two models. "
                    "Choose with `only=`"
                )
            if f"{name}.weight" in quantisation.problems:
                raise ValueError(
                    f"{self.checkpoint.path}: {quantisation.problems[f'{name}.weight']}"
                )
            update = LowRankUpdate.of(module)
            if not update.fits(shape) and not (len(shape) == 2 and update.fits(shape[::-1])):
                raise ValueError(
                    f"{name}.weight is {list(shape)} in {self.checkpoint.path}, the adapter's "
                    f"{own} is for {[update.rows, update.columns]}"
                )
            self.shapes[name] = shape if update.fits(shape) else shape[::-1]
            result[own] = dataclasses.replace(module, name=name)
        if lost:
            raise ValueError(
                f"{self.checkpoint.path} has no weight for {', '.join(lost)}. Give the base model "
                "that the adapter was made for, or choose modules with `only=`."
                + rename_hint(
                    [m.name for own, m in modules.items() if own in lost], self.checkpoint.modules
                )
            )
        return result

    def cast(self, dtype: Any) -> None:
        """Convert the factors to another dtype."""
        modules = {own: cast_module(module, dtype) for own, module in self.adapter.modules.items()}
        self.adapter = dataclasses.replace(self.adapter, modules=modules)

    def lohas(self) -> dict[str, AdapterModule]:
        """Return the modules as LoHa, by the source's names."""
        modules = {
            own: loha_of(m) if m.kind == "lora" else m for own, m in self.adapter.modules.items()
        }
        if any(m.kind == "lora" for m in self.adapter.modules.values()):
            self.notes.append("each LoRA became the LoHa of its rank that is equal to it")
        return modules

    def dotted(self, modules: Mapping[str, AdapterModule]) -> dict[str, AdapterModule]:
        """Return the modules by their torch names, for a folder of one model."""
        if len(prefixes := sorted({m.prefix for m in modules.values()})) > 1:
            raise ValueError(
                f"The source holds several models' modules ({', '.join(prefixes)}), PEFT's folder those of one. Choose "
                f"with `only=`, such as `only=` '{re.escape(prefixes[0])}.*'"
            )
        unknown = [
            own
            for own, m in modules.items()
            if self.checkpoint is None and m.prefix.endswith("_") and "_" in m.name
        ]
        if unknown:
            raise ValueError(
                f"The source writes dots of module names as underscores ({', '.join(unknown[:5])}"
                f"{', …' if len(unknown) > 5 else ''}); `base=`, the base model's checkpoint, says which they are"
            )
        result: dict[str, AdapterModule] = {}
        owners: dict[str, str] = {}
        for own, module in modules.items():
            if (other := owners.setdefault(module.name, own)) != own:
                raise ValueError(
                    f"{other} and {own} would both be {module.name} in the folder. Choose with `only=`"
                )
            result[module.name] = module
        return result

    def saved(self) -> tuple[dict[str, np.ndarray], list[str]]:
        """Return PEFT's tensors besides the factors, and the modules changed by LyCORIS' differences."""
        if self.adapter.config:
            return self.adapter.others, []
        if not self.adapter.others:
            return {}, []
        if self.checkpoint is None:
            owners = sorted({key.rpartition(".")[0] for key in self.adapter.others})
            raise ValueError(
                f"The source has differences of whole parameters ({', '.join(owners)}), PEFT has the parameters "
                "themselves: give the base model's checkpoint, `base=`"
            )
        saved: dict[str, np.ndarray] = {}
        modules: list[str] = []
        differences = {
            f"{self.lookup.find_own(key.rpartition('.')[0])}.{parameter}": value
            for key, value in self.adapter.others.items()
            for part, parameter in PARAMETER_OF.items()
            if key.endswith(f".{part}")
        }
        adapted = {module.name for module in self.adapter.modules.values()}
        if both := sorted({key.rpartition(".")[0] for key in differences} & adapted):
            raise ValueError(
                f"{', '.join(both)} have factors and differences of whole parameters (diff, diff_b), and PEFT adapts a "
                "module or saves it. Leave them out with `only=`, or merge the adapter"
            )
        for key, difference in differences.items():
            if self.checkpoint.shapes.get(key) != difference.shape:
                raise ValueError(f"The base has no {key} of the shape {list(difference.shape)}")
            module = key.rpartition(".")[0]
            modules.append(module)
            for name in (f"{module}.weight", f"{module}.bias"):
                if name in self.checkpoint.shapes:
                    if name in self.checkpoint.quantisation.problems:
                        raise ValueError(
                            f"{self.checkpoint.path}: {self.checkpoint.quantisation.problems[name]}"
                        )
                    value = self.checkpoint.read_values(name)
                    if name in differences:
                        value = (
                            value.astype(np.float32) + differences[name].astype(np.float32)
                        ).astype(value.dtype)
                    saved[name] = value
        return saved, sorted(set(modules))

    def is_base_weight(self, module: str, part: str, value: np.ndarray) -> bool:
        """Return whether a `base_layer` in a PEFT file equals the base, so that it can be left out."""
        key = f"{module.removesuffix('.base_layer')}.{part}"
        if (
            self.checkpoint is None
            or not module.endswith(".base_layer")
            or key not in self.checkpoint.shapes
        ):
            return False
        return np.array_equal(self.checkpoint.read_values(key), value)


def cast_module(module: AdapterModule, dtype: Any) -> AdapterModule:
    """Return a module with its tensors in another dtype."""
    tensors = cast_tensors(module.name, module.arrays, dtype)
    norms = tensors.pop("dora_scale", None)
    return dataclasses.replace(module, tensors=tensors, dora_scale=norms)
