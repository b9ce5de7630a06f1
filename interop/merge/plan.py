"""`plan_merge`: what happens to each base tensor, decided and checked before a value is read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from loha_jax.runtime.untrusted import FileError
from loha_jax.targets.module_names import Names

from ..disk.base_checkpoint import Checkpoint, is_floating, read_config
from ..disk.tensor_files import check_finite
from ..formats.adapter_file import AdapterFile, AdapterModule
from ..formats.lycoris_keys import PARAMETER_OF, embeddings_note
from ..formats.module_lookup import ModuleLookup
from ..formats.read_adapter import read_adapter
from ..names.name_map import GPT2_CONV1D
from ..names.renames import rename_hint, renamed
from ..names.resized_vocabulary import is_resized, resizing_note, resizing_problems
from ..updates.low_rank_update import LowRankUpdate

_PREFIX_OF_BASE_LAYER = re.compile(r"(.*)\.base_layer\.([^.]+)")
_COUNTER = "num_batches_tracked"
_HEAD = "lm_head.weight"
_EMBEDDING = re.compile(r"(embed_tokens|wte|word_embeddings)\.weight$")

_Found = tuple[AdapterModule, str, LowRankUpdate]  # a module, the key of its tensor, its update


@dataclasses.dataclass(frozen=True)
class TensorUpdate:
    """One adapter's share in a merged weight.

    Attributes:
        module: as in the adapter's file.
        update: ΔW, in the orientation of the stored tensor.
        weight: what ΔW is multiplied by.
        norms: of a weight decomposition: one per row `[rows, 1]` or per column `[1, in]` of the
            stored tensor, or None.
        transposed: the tensor is stored as `[in, out]`.
    """

    module: AdapterModule
    update: LowRankUpdate
    weight: float
    norms: np.ndarray | None
    transposed: bool


@dataclasses.dataclass(frozen=True)
class MergePlan:
    """The changes to the tensors of a checkpoint, by their keys; all other tensors stay unchanged.

    Attributes:
        updates: `W + Σ weight·ΔW`.
        replaced: new values (`modules_to_save`, base layers that came with the adapter).
        added: LyCORIS' differences of whole parameters, with their weights.
        notes: what a user should know, one sentence each.
        resized: shapes of replaced tensors that are not those of the base: of a resized vocabulary.
    """

    updates: dict[str, list[TensorUpdate]]
    replaced: dict[str, np.ndarray]
    added: dict[str, list[tuple[np.ndarray, float]]]
    notes: tuple[str, ...]
    resized: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    @property
    def keys(self) -> set[str]:
        """The keys of all tensors that change."""
        return {*self.updates, *self.replaced, *self.added}


def plan_merge(
    checkpoint: Checkpoint,
    adapters: Sequence[tuple[str | Path, float]],
    *,
    only: str | None = None,
    names: Names | None = None,
) -> tuple[MergePlan, list[AdapterFile]]:
    """Read the adapters and find the tensor of each of their modules.

    Args:
        checkpoint: the base.
        adapters: paths and weights.
        only: a regular expression for the whole names of modules in the adapters' files; the others
            are left out.
        names: other names for these modules, see `renamed`.

    Returns:
        The plan, and the adapters.

    Raises:
        ValueError: modules without a tensor, or whose tensor has another shape or is quantised in a
            way that is not known, and tensors that two modules of one adapter would change, all in
            one error; a tensor that two adapters replace.
        FileError: an adapter is broken, or holds NaN or infinity.
    """
    planner = _Planner(checkpoint, only, names)
    files = [planner.add(path, weight) for path, weight in adapters]
    return planner.finish(), files


class _Planner:
    def __init__(self, checkpoint: Checkpoint, only: str | None, names: Names | None):
        self._checkpoint = checkpoint
        self._names = names
        self._only = only
        self._modules = checkpoint.modules
        self._config = read_config(checkpoint.folder) if checkpoint.is_whole_folder else {}
        self._updates: dict[str, list[TensorUpdate]] = {}
        self._replaced: dict[str, np.ndarray] = {}
        self._replaced_by: dict[str, Path] = {}
        self._added: dict[str, list[tuple[np.ndarray, float]]] = {}
        self._missing: list[str] = []
        self._problems: list[str] = []
        self._notes: list[str] = []
        self._resized: dict[str, tuple[int, ...]] = {}

    def add(self, path: str | Path, weight: float) -> AdapterFile:
        read = read_adapter(path, modules=self._modules, only=self._only)
        adapter = renamed(read, self._names, self._modules)
        check_finite(adapter.arrays, adapter.path)
        chosen, others = adapter.modules, adapter.others
        if adapter.embeddings:
            self._notes.append(f"{adapter.path}: {embeddings_note(adapter.embeddings)}")
        lookup = ModuleLookup(self._modules, chosen.values())
        self._notes += [f"{adapter.path}: {note}" for note in lookup.notes]
        found: list[_Found] = []
        owners: dict[str, str] = {}
        for own, module in chosen.items():
            key = f"{lookup.find(module.name, module.prefix)}.weight"
            if key not in self._checkpoint.shapes:
                self._missing.append(self._say_missing(key))
                continue
            if self._is_taken(key, own, owners):
                continue
            found.append((module, key, LowRankUpdate.of(module)))
        # Resized tensors come before updates of them, an output head after what it may be tied to.
        for key, value in sorted(others.items(), key=lambda item: item[0].endswith(_HEAD)):
            self._add_other(adapter, lookup, key, value, weight, owners)
        self._add_updates(adapter, found, weight)
        return adapter

    def _is_taken(self, key: str, own: str, owners: dict[str, str]) -> bool:
        """Note a tensor that another module of the adapter changes already (two text encoders)."""
        other = owners.setdefault(key, own)
        if other != own:
            self._problems.append(
                f"{other} and {own} are both {key} in the base, which has one of the two models: choose with `only=`"
            )
        return other != own

    def _add_updates(self, adapter: AdapterFile, found: list[_Found], weight: float) -> None:
        is_conv1d = self._is_conv1d(adapter, found)
        for module, key, update in found:
            shape, dtype = (
                self._resized.get(key, self._checkpoint.shapes[key]),
                self._checkpoint.dtypes[key],
            )
            fits = update.fits(shape)
            turned = len(shape) == 2 and update.fits(shape[::-1])
            if key in self._checkpoint.quantisation.problems:
                self._problems.append(self._checkpoint.quantisation.problems[key])
            elif not is_floating(dtype):
                self._problems.append(f"{key} holds {dtype}: no weights that can be merged into")
            elif not fits and not turned:
                need = [update.rows, *(update.in_shape or (update.columns,))]
                self._problems.append(
                    f"{key} is {list(shape)}, the adapter's {module.name} is for {need}"
                )
            elif key == "lm_head.weight" and self._config.get("tie_word_embeddings"):
                self._problems.append(
                    f"{key} is tied to the embeddings (tie_word_embeddings in config.json): what is merged into it is "
                    "lost when the model is loaded. Set tie_word_embeddings to false in a copy of the base first"
                )
            else:
                transposed = turned and (not fits or is_conv1d(module.name))
                if transposed:
                    self._notes.append(
                        f"{adapter.path}: some weights of the base are stored as [in, out] (GPT-2)"
                    )
                norms = _norms(module, update, transposed)
                own = TensorUpdate(
                    module, update.T if transposed else update, weight, norms, transposed
                )
                self._updates.setdefault(key, []).append(own)

    def _is_conv1d(self, adapter: AdapterFile, found: list[_Found]) -> Callable[[str], bool]:
        """Return a test by name for GPT-2's projections, stored as [in, out], also square ones."""
        named = [
            (update, self._checkpoint.shapes[key])
            for m, key, update in found
            if re.fullmatch(GPT2_CONV1D, m.name)
        ]
        shown = {update.fits(shape) for update, shape in named if len(set(shape)) > 1}
        told = adapter.config.get("fan_in_fan_out") or self._config.get("model_type") in (
            "gpt2",
            "openai-gpt",
        )
        if shown == {False} or (told and True not in shown):
            return lambda name: re.fullmatch(GPT2_CONV1D, name) is not None
        return lambda name: False

    def _add_other(
        self,
        adapter: AdapterFile,
        lookup: ModuleLookup,
        key: str,
        value: np.ndarray,
        weight: float,
        owners: dict[str, str],
    ) -> None:
        module, _, part = key.rpartition(".")
        if adapter.form in ("lycoris", "kohya") and part in PARAMETER_OF:
            target = f"{lookup.find_own(module)}.{PARAMETER_OF[part]}"
            if self._check_shape(target, value, module) and not self._is_taken(
                target, module, owners
            ):
                self._added.setdefault(target, []).append((value, weight))
            return
        if base_layer := _PREFIX_OF_BASE_LAYER.fullmatch(key):
            module, part = base_layer[1], base_layer[2]
        target = f"{lookup.find(module, '')}.{part}"
        if target not in self._checkpoint.shapes:  # a head beside the model that has the prefix
            target = f"{module}.{part}"
        if target not in self._checkpoint.shapes and (
            part == _COUNTER or self._is_tied_copy(target, value)
        ):
            return
        old = self._checkpoint.shapes.get(target)
        if old is not None and is_resized(target, old, value.shape):
            if scale := self._checkpoint.quantisation.scales.get(target):
                rows = f"{key} has {value.shape[0]} rows, {target} {old[0]}"
                self._problems.append(
                    f"{rows} and a scale ({scale.key}): merge into the float base"
                )
            elif self._resized.setdefault(target, value.shape) != value.shape:
                self._problems.append(
                    f"{target} has {self._resized[target][0]} rows, {key} has {value.shape[0]}"
                )
        elif not self._check_shape(target, value, key):
            return
        if target in self._replaced and not np.array_equal(self._replaced[target], value):
            self._problems.append(
                f"{self._replaced_by[target]} and {adapter.path} each hold values for {target}"
            )
        self._replaced[target], self._replaced_by[target] = value, adapter.path

    def _is_tied_copy(self, key: str, value: np.ndarray) -> bool:
        """Return whether an output head missing in the base is a copy of its tied embedding."""
        if not key.endswith(_HEAD) or not self._config.get("tie_word_embeddings", True):
            return False
        return any(
            _EMBEDDING.search(own) and np.array_equal(v, value) for own, v in self._replaced.items()
        )

    def _check_shape(self, key: str, value: np.ndarray, name: str) -> bool:
        if key not in self._checkpoint.shapes:
            self._missing.append(self._say_missing(key))
        elif key in self._checkpoint.quantisation.problems:
            self._problems.append(self._checkpoint.quantisation.problems[key])
        elif self._checkpoint.shapes[key] != value.shape:
            self._problems.append(
                f"{key} is {list(self._checkpoint.shapes[key])}, {name} is {list(value.shape)}"
            )
        else:
            return True
        return False

    def _say_missing(self, key: str) -> str:
        if key.endswith(_HEAD):
            tied = [k for k in self._checkpoint.shapes if _EMBEDDING.search(k)]
            if tied:
                return (
                    f"{key} (tied: the base has {tied[0]} for both, which a merge would change too)"
                )
        return key + self._checkpoint.quantisation.why_missing(key)

    def finish(self) -> MergePlan:
        shapes = self._checkpoint.shapes
        self._problems += resizing_problems(shapes, self._resized, self._config)
        if self._resized and not self._problems:
            self._notes.append(resizing_note(shapes, self._resized, self._config))
        if self._missing or self._problems:
            parts = []
            if self._missing:
                parts.append(
                    f"tensors that the base does not have ({len(self._missing)}): {'; '.join(self._missing)}"
                )
            if self._problems:
                parts.append(
                    f"tensors that do not fit ({len(self._problems)}): {'; '.join(self._problems)}"
                )
            some = ", ".join(list(shapes)[:3])
            lost = [
                key.split(" ")[0].removesuffix(".weight") for key in self._missing if ":" not in key
            ]
            raise ValueError(
                f"{self._checkpoint.path} and the adapter do not fit; nothing was written. {'. '.join(parts)}. The "
                f"base has {len(shapes)} tensors, such as {some}.{rename_hint(lost, self._modules)}"
            )
        if both := sorted(key for key in self._replaced if key in self._added):
            raise ValueError(f"One adapter replaces and another one changes {', '.join(both)}")
        return MergePlan(
            self._updates,
            self._replaced,
            self._added,
            tuple(dict.fromkeys(self._notes)),
            self._resized,
        )


def _norms(module: AdapterModule, update: LowRankUpdate, transposed: bool) -> np.ndarray | None:
    """Return the norms of a decomposition for the stored matrix: `[rows, 1]` or `[1, in]`."""
    if module.dora_scale is None:
        return None
    scale = module.dora_scale
    if scale.ndim > 1 and scale.shape[0] == update.rows and scale.shape[1] == 1:
        norms = scale.reshape(-1, 1)
    elif scale.ndim > 1 and scale.shape[0] == 1 and update.columns % scale.shape[1] == 0:
        norms = scale.reshape(1, -1)
    else:
        raise FileError(
            f"dora_scale of {module.name} is {list(scale.shape)}: neither one per out feature nor per in"
        )
    return norms.T if transposed else norms
