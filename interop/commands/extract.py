"""`extract_adapter`: a LoHa from the difference of a tuned and a base checkpoint."""

from __future__ import annotations

import dataclasses
import enum
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from jax.typing import DTypeLike

from loha_jax.runtime.scalars import one_of

from ..disk.atomic import check_place
from ..disk.base_checkpoint import Checkpoint, accumulator, is_floating, read_config
from ..formats.adapter_file import AdapterFile
from ..formats.module_lookup import ModuleLookup
from ..names.conv1d import conv1d_test
from ..updates.fitting import FittedLoHa, checked_settings, fit_loha
from .conversion_source import ConversionSource
from .lycoris_file import lycoris_file
from .peft_folder import loha_folder, owner


class Format(enum.StrEnum):
    """The formats that an extracted LoHa is written in."""

    peft = enum.auto()
    lycoris = enum.auto()
    kohya = enum.auto()


FORMATS = tuple(Format)

_EMBEDDING = re.compile(
    r"(.*\.)?(\w*embeddings?|emb|embeds?|embed_(?!out$)\w+|tok_embeddings|wte|wpe|shared|relative_attention_bias)"
)
"""Modules that look up rows of a matrix, for which no format has a LoHa."""


@dataclasses.dataclass(frozen=True)
class ExtractedModule:
    """What became of one module.

    Attributes:
        name: of the module.
        size: ‖tuned − base‖ (Frobenius).
        error: of the LoHa, relative to the size.
        lora_error: of the best LoRA with equally many parameters, of rank 2r.
    """

    name: str
    size: float
    error: float
    lora_error: float


@dataclasses.dataclass(frozen=True)
class Extraction:
    """The result of an extraction.

    Attributes:
        r: the rank of each module.
        modules: that were fitted.
        unchanged: how many modules are the same in both checkpoints.
        left_out: what differs and is not in the adapter: the reason, by name.
        notes: remarks for the user, one sentence each.
    """

    r: int
    modules: tuple[ExtractedModule, ...]
    unchanged: int
    left_out: dict[str, str]
    notes: tuple[str, ...]

    def _overall(self, errors: list[float]) -> float:
        largest = max(module.size for module in self.modules)
        sizes = [module.size / largest for module in self.modules]  # their squares are finite
        missing = (error * size for error, size in zip(errors, sizes, strict=True))
        return math.hypot(*missing) / math.hypot(*sizes)

    @property
    def error(self) -> float:
        """The relative error of all modules together."""
        return self._overall([module.error for module in self.modules])

    @property
    def lora_error(self) -> float:
        """The relative error of the best LoRAs together."""
        return self._overall([module.lora_error for module in self.modules])

    def to_json(self) -> dict[str, object]:
        """Return the result in JSON's types."""
        return {
            "r": self.r,
            "error": self.error,
            "lora_error": self.lora_error,
            "modules": [dataclasses.asdict(module) for module in self.modules],
            "unchanged": self.unchanged,
            "left_out": self.left_out,
            "notes": list(self.notes),
        }


def extract_adapter(
    tuned: str | Path,
    base: str | Path,
    target: str | Path,
    *,
    r: int,
    alpha: float | None = None,
    to: str = "peft",
    prefix: str | None = None,
    only: str | None = None,
    steps: int = 200,
    starts: int = 1,
    dtype: DTypeLike | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Extraction:
    """Write the LoHa that comes closest to the difference of two checkpoints.

    Each changed matrix and convolution gets one; see `fit_loha`. One of them is in memory at a
    time. The target appears whole or not at all.

    Args:
        tuned, base: safetensors checkpoints with the same names.
        target: the folder (or, of LyCORIS and kohya, file) to write.
        r, alpha, steps, starts: see `fit_loha`.
        to: "peft", "lycoris" or "kohya".
        prefix: of keys in LyCORIS' and kohya's files.
        only: a regular expression for the whole names of modules; the others are left alone.
        dtype: of the factors; float32 by default, in which the errors are taken.
        force: a target that is there is replaced.
        progress: is called with the number of tensors done and that of all.

    Raises:
        FileExistsError: the target is there.
        ValueError: wrong arguments; the target is, or holds, a checkpoint; the checkpoints have no
            module in common or no difference that a LoHa can hold; or the difference of a module is
            not finite. Nothing is written then.

    Example:
        >>> import tempfile
        >>> from safetensors.numpy import save_file
        >>> rng = np.random.default_rng(0)
        >>> base = rng.normal(size=(12, 16))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name, weight in (("base", base), ("tuned", base + rng.normal(size=base.shape))):
        ...         save_file({"q.weight": weight}, f"{folder}/{name}.safetensors")
        ...     done = extract_adapter(
        ...         f"{folder}/tuned.safetensors",
        ...         f"{folder}/base.safetensors",
        ...         f"{folder}/adapter",
        ...         r=4,
        ...     )
        >>> [module.name for module in done.modules], done.error < 0.5
        (['q'], True)
    """
    one_of("`to`", to, FORMATS)
    if prefix is not None and to == "peft":
        raise ValueError('`prefix=` is for `to="lycoris"` and `to="kohya"`')
    r, alpha, steps, starts = checked_settings(r, alpha, steps, starts)
    target = Path(os.path.abspath(target))
    check_place(target, force, [tuned, base])
    differences = _Differences(Checkpoint(tuned), Checkpoint(base), only, to)
    shapes: dict[str, tuple[int, ...]] = {}
    fits: dict[str, FittedLoHa] = {}
    rows: list[ExtractedModule] = []
    for name, change in differences.changes(progress):
        try:
            fit = fit_loha(change, r, alpha=alpha, steps=steps, starts=starts)
        except ValueError as error:
            raise ValueError(
                f"{name}, {tuned} less {base}: {error}. `only=` can leave it out"
            ) from error
        shapes[name], fits[name] = change.shape, fit
        rows.append(ExtractedModule(name, fit.size, fit.error, fit.lora_error))
    differences.check(rows)
    source = _source(differences.base, fits, shapes)
    if dtype is not None:
        source.cast(dtype)
    made = loha_folder(source) if to == "peft" else lycoris_file(source, to, prefix)
    made.write(target, force)
    notes = (*source.notes, *differences.notes)
    return Extraction(r, tuple(rows), differences.unchanged, differences.left_out, notes)


class _Differences:
    """The differences of two checkpoints, and what of them no LoHa holds.

    Attributes:
        base: the base checkpoint.
        unchanged: how many weights are the same in both.
        left_out: what differs and has no place: the reason, by the tensor's name.
        notes: remarks for the user.
    """

    def __init__(self, tuned: Checkpoint, base: Checkpoint, only: str | None, to: str):
        self.tuned, self.base = tuned, base
        self._to = to
        self.unchanged = 0
        self.left_out: dict[str, str] = {}
        self.notes: list[str] = []
        self._conv1d: list[str] = []
        config = read_config(base.folder)
        self._is_conv1d = conv1d_test(base)
        parts = [config, *(part for part in config.values() if isinstance(part, dict))]
        self._has_tied_head = any(part.get("tie_word_embeddings") for part in parts)
        scales = {
            scale.key
            for checkpoint in (tuned, base)
            for scale in checkpoint.quantisation.scales.values()
        }
        chosen = re.compile(only or ".*")
        self._keys = [
            key
            for key in dict.fromkeys([*base.shapes, *tuned.shapes])
            if key not in scales and chosen.fullmatch(owner(key))
        ]
        if not any(key in tuned.shapes and key in base.shapes for key in self._keys):
            raise ValueError(
                f"{tuned.path} and {base.path} have no tensor of one name in "
                f"common{f' that `only=` {only!r} chooses' if only else ''}: the first has "
                f"{', '.join([*tuned.shapes][:3])}, the second {', '.join([*base.shapes][:3])}"
            )

    def changes(
        self, progress: Callable[[int, int], None] | None
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yield each changed module and its difference, `[out, in, *spatial]`."""
        for done, key in enumerate(self._keys, 1):
            change = self._change(key)
            if change is not None:
                yield owner(key), change
            if progress is not None:
                progress(done, len(self._keys))

    def _change(self, key: str) -> np.ndarray | None:
        """Return the difference of a tensor, or None where there is none or it has no place."""
        if reason := self._why_not_comparable(key):
            self.left_out[key] = reason
            return None
        if _same(self.tuned.read(key), self.base.read(key)) and self._has_same_scale(key):
            self.unchanged += key.endswith(".weight")
            return None
        if reason := self._why_no_loha(key):
            self.left_out[key] = reason
            return None
        for checkpoint in (self.tuned, self.base):
            checkpoint.check_readable(key)
        tuned, base = (c.read_values(key) for c in (self.tuned, self.base))
        dtype = accumulator(tuned.dtype, base.dtype)
        with np.errstate(over="ignore", invalid="ignore"):  # fit_loha refuses what is not finite
            difference = tuned.astype(dtype) - base.astype(dtype)
        if difference.ndim == 3:
            self._conv1d.append(owner(key))
        if self._is_conv1d(owner(key)):
            return difference.T  # GPT-2's projections are stored as [in, out]
        return difference

    def _has_same_scale(self, key: str) -> bool:
        scales = [c.quantisation.scales.get(key) for c in (self.tuned, self.base)]
        if scales == [None, None]:
            return True
        return None not in scales and _same(self.tuned.read_scale(key), self.base.read_scale(key))

    def _why_not_comparable(self, key: str) -> str | None:
        for checkpoint in (self.tuned, self.base):
            if key not in checkpoint.shapes:
                return f"it is not in {checkpoint.path}"
        shapes = self.tuned.shapes[key], self.base.shapes[key]
        if shapes[0] != shapes[1]:
            return f"it is {list(shapes[0])} in {self.tuned.path}, {list(shapes[1])} in the base"
        return None

    def _why_no_loha(self, key: str) -> str | None:
        shape = self.base.shapes[key]
        module = owner(key)
        if not is_floating(self.base.dtypes[key]) or not is_floating(self.tuned.dtypes[key]):
            return "its values are integers, or quantised"
        if not key.endswith(".weight") or len(shape) < 2 or "" in module.split("."):
            return "a LoHa changes `<module>.weight` of two or more axes only"
        if len(shape) > 4 and self._to == "peft":
            return "PEFT's LoHa cannot hold a Conv3d"
        if len(shape) == 2 and _EMBEDDING.fullmatch(module):
            return "no format has a LoHa for an embedding"
        if module.rpartition(".")[2] == "lm_head" and self._has_tied_head:
            return "it is tied to the embeddings (tie_word_embeddings in config.json)"
        return None

    def check(self, found: list[ExtractedModule]) -> None:
        """Raise ValueError where no module was fitted; note what was left out."""
        what = f"{self.tuned.path} and {self.base.path}"
        reasons = "; ".join(f"{key}: {reason}" for key, reason in [*self.left_out.items()][:5])
        if not found and not reasons:
            raise ValueError(f"{what} have the same values; there is nothing to extract")
        if not found:
            raise ValueError(f"{what} differ in nothing that a LoHa can hold. {reasons}")
        if self._conv1d:
            self.notes.append(
                f"weights of three axes count as those of a Conv1d: {', '.join(self._conv1d)}"
            )


def _source(
    base: Checkpoint, fits: dict[str, FittedLoHa], shapes: dict[str, tuple[int, ...]]
) -> ConversionSource:
    """Return the fitted modules as an adapter to write."""
    modules = {name: fit.module(name, shapes[name]) for name, fit in fits.items()}
    adapter = AdapterFile(base.path, "tree", modules, {}, {}, {})
    lookup = ModuleLookup(base.modules, modules.values())
    return ConversionSource(adapter, base, shapes, lookup, is_unchanged=True, notes=[])


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Return whether two arrays have the same values; NaN is the same as NaN."""
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()
