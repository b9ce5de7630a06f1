"""`LoHaConfig`: PEFT's configuration of a LoHa adapter, field for field."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from loha_jax.lowrank.initial_values import INIT_SCHEMES
from loha_jax.runtime.caller import warn_caller
from loha_jax.runtime.scalars import plain_scalar
from loha_jax.runtime.untrusted import FileError, check_pattern, json_object, read_json

CONFIG_NAME = "adapter_config.json"
PEFT_VERSION = "0.21.2"
"""The PEFT release whose file format is written."""

_LORA_NAMES = {
    "lora_alpha": "`alpha`",
    "lora_dropout": "`rank_dropout` or `module_dropout`",
    **dict.fromkeys(("rank", "lora_r", "lora_rank", "linear_dim", "network_dim"), "`r`"),
    **dict.fromkeys(("linear_alpha", "network_alpha"), "`alpha`"),
    "use_dora": "`LycorisConfig(weight_decompose=True)`",
    "use_rslora": "`LycorisConfig(rs_lora=True)`",
}

TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


@dataclasses.dataclass(frozen=True, eq=False)
class LoHaConfig:
    """The settings of one LoHa adapter: PEFT's `LoHaConfig`, with its fields, order, defaults and JSON form.

    The config is immutable; `dataclasses.replace(config, r=4)` makes another one.

    Args:
        task_type: one of `TASK_TYPES` or None. As in PEFT, SEQ_CLS and TOKEN_CLS add `classifier` and `score` to the
            modules that are saved and trained whole, QUESTION_ANS adds `qa_outputs`.
        peft_type: always "LOHA".
        auto_mapping, base_model_name_or_path, revision, peft_version: kept for PEFT, not used here.
        inference_mode: written as true by `interop.save_peft`, as PEFT does.
        rank_pattern: `{pattern: r}`; the first pattern for which `re.match(rf"(.*\\.)?({pattern})$", name)` holds wins.
        alpha_pattern: `{pattern: alpha}`, the same way.
        r: rank of each of the two factor pairs. The update has rank up to r²; the parameters are those of a LoRA
            of rank 2r.
        alpha: the update is scaled by alpha/r.
        rank_dropout: probability with which a row (output) of the update is dropped in training.
        module_dropout: probability with which a module's whole update is dropped in training.
        use_effective_conv2d: convolution kernels larger than 1 get a CP core (`hada_t1`, `hada_t2`).
        target_modules: a list of module names or name endings, a regular expression for the whole name, "all-linear",
            or None for the defaults of the model type (`inject(..., model_type=...)`).
        exclude_modules: names, endings or a regular expression, never adapted.
        init_weights: True (PEFT's law: the adapter starts as an exact no-op), False (all factors random: the adapter
            starts as noise), or "lycoris" (LyCORIS' normal law, also a no-op at the start).
        layers_to_transform: index or indices of the layers to adapt.
        layers_pattern: name(s) of the container that holds the layers.
        modules_to_save: modules trained and saved whole.

    Raises:
        ValueError: a field that no adapter can be made from; PEFT's own checks and those it lacks (r an int ≥ 1,
            finite alpha, dropouts in [0, 1), patterns that are no regular expressions).

    Example:
        >>> LoHaConfig(r=4, alpha=8, target_modules=["query", "value"]).r
        4
    """

    task_type: str | None = None
    peft_type: str = "LOHA"
    auto_mapping: Mapping[str, Any] | None = None
    peft_version: str | None = PEFT_VERSION
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    target_modules: Iterable[str] | str | None = None
    exclude_modules: Iterable[str] | str | None = None
    init_weights: bool | str = True
    layers_to_transform: int | Iterable[int] | None = None
    layers_pattern: str | Iterable[str] | None = None
    modules_to_save: Iterable[str] | None = None

    def __new__(cls, *args: Any, **fields: Any) -> Self:
        """Refuses LoRA's names for LoHa's fields."""
        for name in fields:
            if name in _LORA_NAMES:
                raise TypeError(f"LoHaConfig has no `{name}`: LoHa's is {_LORA_NAMES[name]}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        def store(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for field in dataclasses.fields(self):
            store(field.name, _plain(getattr(self, field.name)))
        store("peft_type", "LOHA")
        if self.task_type is not None and self.task_type not in TASK_TYPES:
            raise ValueError(
                f"Invalid task type: {self.task_type!r}. Must be one of the following task types: "
                f"{', '.join(TASK_TYPES)}."
            )
        _check_rank("r", self.r)
        _check_alpha("alpha", self.alpha)
        for name in ("rank_dropout", "module_dropout"):
            p = getattr(self, name)
            if not _is_number(p) or not 0 <= p < 1:
                raise ValueError(f"`{name}` should be a probability in [0, 1) but the value passed is {p!r}")
        for name, check in (("rank_pattern", _check_rank), ("alpha_pattern", _check_alpha)):
            patterns = getattr(self, name)
            if patterns is None:
                patterns = {}
            if not isinstance(patterns, Mapping):
                raise ValueError(f"`{name}` should be a dict of pattern: value but the value passed is {patterns!r}")
            for pattern, value in patterns.items():
                _check_regex(name, pattern)
                check(f"{name}[{pattern!r}]", value)
            store(name, dict(patterns))
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                if value:
                    _check_regex(name, value)
            elif value is not None:
                store(name, frozenset(_strings(name, value)))
        if self.modules_to_save is not None:
            if isinstance(self.modules_to_save, str):
                raise ValueError(
                    f"`modules_to_save` should be a list of module names but the value passed is the string "
                    f"{self.modules_to_save!r}; write [{self.modules_to_save!r}]"
                )
            store("modules_to_save", tuple(dict.fromkeys(_strings("modules_to_save", self.modules_to_save))))
            for pattern in self.modules_to_save:
                _check_regex("modules_to_save", pattern)
        if self.layers_pattern and not self.layers_to_transform and self.layers_to_transform != 0:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")
        if self.layers_to_transform is not None and not isinstance(self.layers_to_transform, int):
            if not isinstance(self.layers_to_transform, Iterable):
                raise ValueError(
                    f"`layers_to_transform` should hold integers but the value passed is {self.layers_to_transform!r}"
                )
            store("layers_to_transform", tuple(self.layers_to_transform))
        layers = self.layers_to_transform
        for index in layers if isinstance(layers, tuple) else () if layers is None else (layers,):
            if isinstance(index, bool) or not isinstance(index, int):
                raise ValueError(
                    f"`layers_to_transform` should hold integers but the value passed is {self.layers_to_transform!r}"
                )
        if self.layers_pattern is not None and not isinstance(self.layers_pattern, str):
            store("layers_pattern", tuple(_strings("layers_pattern", self.layers_pattern)))
        for pattern in (self.layers_pattern,) if isinstance(self.layers_pattern, str) else self.layers_pattern or ():
            _check_regex("layers_pattern", pattern)
        if isinstance(self.init_weights, str) and self.init_weights not in INIT_SCHEMES:
            raise ValueError(
                f"`init_weights` should be True, False or one of {sorted(INIT_SCHEMES)} but the value passed is "
                f"{self.init_weights!r}"
            )

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, LoHaConfig) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: another process has other hashes of strings."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @functools.cached_property
    def _key(self) -> tuple[Any, ...]:
        """The values of all fields, hashable. The order of the patterns counts: the first match wins."""
        return tuple((f.name, _hashable(getattr(self, f.name))) for f in dataclasses.fields(self))

    @property
    def computing(self) -> tuple[Any, ...]:
        """The part of a config that an adapted tree computes with: the dropouts, and whether kept rows are rescaled.

        Ranks, alphas and layouts are in the tree itself. All else in a config is provenance: it is written to files,
        but trees that differ in it alone have the same structure.
        """
        return self.rank_dropout, self.module_dropout, True

    @property
    def all_modules_to_save(self) -> tuple[str, ...]:
        """`modules_to_save` with the heads that the task type adds, each once."""
        heads = {
            "SEQ_CLS": ("classifier", "score"),
            "TOKEN_CLS": ("classifier", "score"),
            "QUESTION_ANS": ("qa_outputs",),
        }.get(self.task_type or "", ())
        return tuple(dict.fromkeys((*(self.modules_to_save or ()), *heads)))

    def to_dict(self) -> dict[str, Any]:
        """The 20 fields as JSON types. Sets become sorted lists (PEFT's order is that of its hash seed)."""

        def plain(value: Any) -> Any:
            if isinstance(value, frozenset):
                return sorted(value)
            if isinstance(value, tuple):
                return list(value)
            if isinstance(value, Mapping):
                return dict(value)
            return value

        return {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def to_json(self) -> str:
        """The text of `adapter_config.json` as PEFT writes it: 20 keys, sorted, indent 2, no newline at the end.

        Sorting reorders `rank_pattern` and `alpha_pattern`, of which the first match wins; `interop.save_peft` writes
        patterns that do not depend on their order where that would change a rank or an alpha.
        """
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoHaConfig:
        """The config of `values`, the parsed content of an `adapter_config.json`.

        Missing keys take the defaults, as in PEFT. Unknown keys are reported by a UserWarning and left out.

        Raises:
            ValueError: `peft_type` is there and is not "LOHA", or a field is invalid.
        """
        peft_type = values.get("peft_type", "LOHA")
        if peft_type != "LOHA":
            raise ValueError(f"This is the configuration of a {peft_type!r} adapter; loha_jax reads 'LOHA' only.")
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            warn_caller(
                f"Unexpected keys {unknown} in the LoHa configuration are ignored; they may come from a newer PEFT "
                f"than {PEFT_VERSION}.",
            )
        given = {k: v for k, v in values.items() if k in known}
        for name in ("rank_pattern", "alpha_pattern"):
            if given.get(name) is None:
                given.pop(name, None)
        scheme = given.get("init_weights", True)
        if not isinstance(scheme, bool) and scheme not in INIT_SCHEMES:  # PEFT uses it for its truth only
            given["init_weights"] = bool(given["init_weights"])
        return cls(**given)

    @classmethod
    def from_json(cls, text: str) -> LoHaConfig:
        """The config of the text of an `adapter_config.json`; see `from_dict`."""
        return cls.from_dict(json_object(text, "the adapter configuration"))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> LoHaConfig:
        """The config of a folder that PEFT or loha_jax wrote (PEFT's name for it).

        Raises:
            FileNotFoundError: there is no `adapter_config.json` in the folder.
            FileError: the file is not the configuration of a LoHa adapter.
        """
        path = Path(folder) / CONFIG_NAME
        if not path.exists():
            raise FileNotFoundError(f"Can't find '{CONFIG_NAME}' at '{folder}'")
        values = read_json(path)
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise FileError(f"{path}: {error}") from error


_LARGEST_RANK = 2**31 - 1
_LARGEST_ALPHA = 3.4e38  # float32


def _hashable(value: Any) -> Any:
    """A field's value with tuples in place of dicts and lists."""
    if isinstance(value, Mapping):
        return ("a mapping", *((key, _hashable(x)) for key, x in value.items()))
    if isinstance(value, list | tuple):
        return tuple(_hashable(x) for x in value)
    try:
        hash(value)
    except TypeError:
        return str(value)
    return value


def _plain(value: Any) -> Any:
    """A field's value with Python's own numbers for numpy's, in its lists and dicts too."""
    if isinstance(value, np.ndarray) and value.ndim:
        return value.tolist()
    if type(value) in (list, tuple, set, frozenset):
        return type(value)([plain_scalar(item) for item in value])
    if type(value) is dict:
        return {key: plain_scalar(item) for key, item in value.items()}
    return plain_scalar(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_rank(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LARGEST_RANK:
        raise ValueError(f"`{name}` should be a positive integer value but the value passed is {value!r}")


def _check_alpha(name: str, value: Any) -> None:
    if not _is_number(value) or not abs(value) <= _LARGEST_ALPHA:
        raise ValueError(f"`{name}` should be a finite number but the value passed is {value!r}")


def _check_regex(name: str, pattern: Any) -> None:
    if not isinstance(pattern, str):
        raise ValueError(f"`{name}` should hold strings but holds {pattern!r}")
    try:
        check_pattern(pattern)
    except ValueError as error:
        raise ValueError(f"`{name}` holds {pattern!r}, which is not a regular expression: {error}") from None


def _strings(name: str, values: Any) -> list[str]:
    if not isinstance(values, Iterable):
        raise ValueError(f"`{name}` should be a list of strings but the value passed is {values!r}")
    values = list(values)
    if not all(isinstance(v, str) for v in values):
        raise ValueError(f"`{name}` should be a list of strings but the value passed is {values!r}")
    return values
