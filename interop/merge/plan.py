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
from ..exchange.mismatch import Mismatch
from ..formats.adapter_file import AdapterFile, AdapterModule
from ..formats.lycoris_keys import PARAMETER_OF, embeddings_note
from ..formats.module_lookup import ModuleLookup
from ..formats.read_adapter import read_adapter, split_parameter
from ..names.conv1d import conv1d_test, looks_like_conv1d
from ..names.renames import rename_hint, renamed
from ..names.resized_vocabulary import is_resized, resizing_note, resizing_problems
from ..updates.low_rank_update import LowRankUpdate

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

    @property
    def column_norms(self) -> np.ndarray | None:
        """The norms if there is one per column, or None."""
        return self.norms if self.norms is not None and self.norms.shape[0] == 1 else None


@dataclasses.dataclass(frozen=True)
class MergePlan:
    """The changes to the tensors of a checkpoint, by their keys; all other tensors stay unchanged.

    Attributes:
        updates: `W + Σ weight·ΔW`.
        replaced: new values (`modules_to_save`, base layers that came with the adapter).
        added: LyCORIS' differences of whole parameters, with their weights.
        resized: shapes of replaced tensors that are not those of the base: of a resized vocabulary.
        notes: what a user should know, one sentence each.
    """

    updates: dict[str, list[TensorUpdate]] = dataclasses.field(default_factory=dict)
    replaced: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    added: dict[str, list[tuple[np.ndarray, float]]] = dataclasses.field(default_factory=dict)
    resized: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

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
    """A plan in the making, with everything that does not fit the base."""

    def __init__(self, base: Checkpoint, only: str | None, names: Names | None):
        self._base, self._only, self._names = base, only, names
        self._modules = base.modules
        self._config = read_config(base.folder) if base.is_whole_folder else {}
        self._plan = MergePlan()
        self._replaced_by: dict[str, Path] = {}
        self._mismatch = Mismatch(
            titles=("", "tensors that the base does not have", "tensors that do not fit"),
            separator="; ",
        )
        self._unknown: list[str] = []  # missing for no known reason

    def add(self, path: str | Path, weight: float) -> AdapterFile:
        read = read_adapter(path, modules=self._modules, only=self._only)
        adapter = renamed(read, self._names, self._modules)
        check_finite(adapter.arrays, adapter.path)
        lookup = ModuleLookup(self._modules, adapter.modules.values())
        notes = [embeddings_note(adapter.embeddings)] if adapter.embeddings else []
        self._plan.notes.extend(f"{adapter.path}: {note}" for note in [*notes, *lookup.notes])
        found: list[_Found] = []
        owners: dict[str, str] = {}
        for own, module in adapter.modules.items():
            key = f"{lookup.find(module.name, module.prefix)}.weight"
            if key not in self._base.shapes:
                self._miss(key)
            elif not self._is_taken(key, own, owners):
                found.append((module, key, LowRankUpdate.of(module)))
        # Resized tensors come before updates of them, an output head after what it may be tied to.
        for key, value in sorted(adapter.others.items(), key=lambda item: item[0].endswith(_HEAD)):
            owner, _, part = key.rpartition(".")
            if adapter.form in ("lycoris", "kohya") and part in PARAMETER_OF:
                target = f"{lookup.find_own(owner)}.{PARAMETER_OF[part]}"
                if self._fits(target, value, owner) and not self._is_taken(target, owner, owners):
                    self._plan.added.setdefault(target, []).append((value, weight))
            else:
                self._replace(adapter.path, lookup, key, value)
        self._add_updates(adapter, found, weight)
        return adapter

    def _is_taken(self, key: str, own: str, owners: dict[str, str]) -> bool:
        """Note a tensor that another module of the adapter changes already (two text encoders)."""
        other = owners.setdefault(key, own)
        if other != own:
            self._mismatch.misshapen.append(
                f"{other} and {own} are both {key} in the base, which has one of the two models: "
                "choose with `only=`"
            )
        return other != own

    def _add_updates(self, adapter: AdapterFile, found: list[_Found], weight: float) -> None:
        is_conv1d = self._is_conv1d(adapter, found)
        for module, key, update in found:
            if problem := self._problem_of(module, key, update):
                self._mismatch.misshapen.append(problem)
                continue
            shape = self._shape(key)
            turned = len(shape) == 2 and update.fits(shape[::-1])
            transposed = turned and (
                not update.fits(shape) or is_conv1d(key.removesuffix(".weight"))
            )
            if transposed:
                self._plan.notes.append(
                    f"{adapter.path}: some weights of the base are stored as [in, out] (GPT-2)"
                )
            norms = _norms(module, update, transposed)
            own = update.T if transposed else update
            self._plan.updates.setdefault(key, []).append(
                TensorUpdate(module, own, weight, norms, transposed)
            )

    def _problem_of(self, module: AdapterModule, key: str, update: LowRankUpdate) -> str | None:
        """Return why an update cannot be merged into a tensor; None if it can."""
        shape, dtype = self._shape(key), self._base.dtypes[key]
        if key in self._base.quantisation.problems:
            return self._base.quantisation.problems[key]
        if not is_floating(dtype):
            return f"{key} holds {dtype}: no weights that can be merged into"
        if not update.fits(shape) and not (len(shape) == 2 and update.fits(shape[::-1])):
            need = [update.rows, *(update.in_shape or (update.columns,))]
            return f"{key} is {list(shape)}, the adapter's {module.name} is for {need}"
        if key == _HEAD and self._config.get("tie_word_embeddings"):
            return (
                f"{key} is tied to the embeddings (tie_word_embeddings in config.json): what is "
                "merged into it is lost when the model is loaded. Set tie_word_embeddings to "
                "false in a copy of the base first"
            )
        return None

    def _is_conv1d(self, adapter: AdapterFile, found: list[_Found]) -> Callable[[str], bool]:
        """Return a test by name for GPT-2's projections, stored as [in, out], also square ones."""
        named = [(u, self._base.shapes[key]) for m, key, u in found if looks_like_conv1d(m.name)]
        shown = {update.fits(shape) for update, shape in named if len(set(shape)) > 1}
        gpt2 = self._config.get("model_type") in ("gpt2", "openai-gpt")
        told = adapter.config.get("fan_in_fan_out") or gpt2
        if shown == {False} or (told and True not in shown):
            return looks_like_conv1d
        return (lambda name: False) if shown else conv1d_test(self._base)

    def _replace(self, path: Path, lookup: ModuleLookup, key: str, value: np.ndarray) -> None:
        """Put the values of a saved module, or of an adapted module's base layer, into the plan."""
        module, part = split_parameter(key)
        target = f"{lookup.find(module, '')}.{part}"
        if target not in self._base.shapes:  # a head beside the model that has the prefix
            target = f"{module}.{part}"
        old = self._base.shapes.get(target)
        if old is None and (part == _COUNTER or self._is_tied_copy(target, value)):
            return
        problems = self._mismatch.misshapen
        if old is not None and is_resized(target, old, value.shape):
            if scale := self._base.quantisation.scales.get(target):
                rows = f"{key} has {value.shape[0]} rows, {target} {old[0]}"
                problems.append(f"{rows} and a scale ({scale.key}): merge into the float base")
            elif (new := self._plan.resized.setdefault(target, value.shape)) != value.shape:
                problems.append(f"{target} has {new[0]} rows, {key} has {value.shape[0]}")
        elif not self._fits(target, value, key):
            return
        held = self._plan.replaced.get(target)
        if held is not None and not np.array_equal(held, value):
            first = self._replaced_by[target]
            problems.append(f"{first} and {path} each hold values for {target}")
        self._plan.replaced[target], self._replaced_by[target] = value, path

    def _is_tied_copy(self, key: str, value: np.ndarray) -> bool:
        """Return whether an output head missing in the base is a copy of its tied embedding."""
        if not key.endswith(_HEAD) or not self._config.get("tie_word_embeddings", True):
            return False
        replaced = self._plan.replaced.items()
        return any(_EMBEDDING.search(own) and np.array_equal(v, value) for own, v in replaced)

    def _fits(self, key: str, value: np.ndarray, name: str) -> bool:
        """Return whether a tensor can take values; note why not."""
        shape = self._base.shapes.get(key)
        if shape is None:
            self._miss(key)
        elif key in self._base.quantisation.problems:
            self._mismatch.misshapen.append(self._base.quantisation.problems[key])
        elif shape != value.shape:
            said = f"{key} is {list(shape)}, {name} is {list(value.shape)}"
            self._mismatch.misshapen.append(said)
        else:
            return True
        return False

    def _shape(self, key: str) -> tuple[int, ...]:
        return self._plan.resized.get(key, self._base.shapes[key])

    def _miss(self, key: str) -> None:
        """Note a tensor that the base does not have, with the reason if there is one."""
        why = self._base.quantisation.why_missing(key)
        tied = [k for k in self._base.shapes if _EMBEDDING.search(k)] if key.endswith(_HEAD) else []
        if tied:
            why = f" (tied: the base has {tied[0]} for both, which a merge would change too)"
        elif not why:
            self._unknown.append(key.removesuffix(".weight"))
        self._mismatch.missing.append(key + why)

    def finish(self) -> MergePlan:
        plan, shapes = self._plan, self._base.shapes
        self._mismatch.misshapen += resizing_problems(shapes, plan.resized, self._config)
        some, hint = ", ".join(list(shapes)[:3]), rename_hint(self._unknown, self._modules)
        self._mismatch.check(
            f"{self._base.path} and the adapter do not fit; nothing was written",
            f"The base has {len(shapes)} tensors, such as {some}.{hint}",
        )
        if both := sorted(plan.replaced.keys() & plan.added):
            raise ValueError(f"One adapter replaces and another one changes {', '.join(both)}")
        if plan.resized:
            plan.notes.append(resizing_note(shapes, plan.resized, self._config))
        return dataclasses.replace(plan, notes=list(dict.fromkeys(plan.notes)))


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
            f"dora_scale of {module.name} is {list(scale.shape)}: "
            "neither one per output feature nor one per input feature"
        )
    return norms.T if transposed else norms
