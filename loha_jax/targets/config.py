"""`LoHaConfig`: PEFT's configuration of a LoHa adapter, field for field."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import jax
from jax.typing import DTypeLike

from loha_jax.lowrank.initial_values import INIT_SCHEMES
from loha_jax.lowrank.layout import Layout
from loha_jax.runtime.caller import warn_caller
from loha_jax.runtime.untrusted import FileError, json_object, read_json
from loha_jax.targets.field_checks import checked_field

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


@dataclasses.dataclass(frozen=True, eq=False)
class LoHaConfig:
    """The settings of one LoHa adapter: PEFT's fields, in its order, with its defaults.

    A config is immutable; `dataclasses.replace(config, r=4)` makes another one. Its JSON form is
    that of PEFT's `LoHaConfig`.

    Args:
        task_type: one of `TASK_TYPES` or None. As in PEFT, SEQ_CLS and TOKEN_CLS add `classifier`
            and `score` to the modules that are saved and trained whole, QUESTION_ANS adds
            `qa_outputs`.
        peft_type: always "LOHA".
        auto_mapping, base_model_name_or_path, revision, peft_version: kept for PEFT, not used here.
        inference_mode: `interop.save_peft` writes true, as PEFT does.
        rank_pattern: `{pattern: r}`. The first pattern for which
            `re.match(rf"(.*\\.)?({pattern})$", name)` holds wins.
        alpha_pattern: `{pattern: alpha}`, matched in the same way.
        r: rank of each of the two factor pairs. The update has rank up to r². It has as many
            parameters as a LoRA of rank 2r.
        alpha: the update is scaled by alpha/r.
        rank_dropout: probability that a row (an output) of the update is dropped in training.
        module_dropout: probability that a module's whole update is dropped in training.
        use_effective_conv2d: convolution kernels larger than 1 get a CP core (`hada_t1`,
            `hada_t2`).
        target_modules: a list of module names or name endings, a regular expression for the whole
            name, "all-linear", or None for the defaults of the model type
            (`inject(..., model_type=...)`).
        exclude_modules: names, endings or a regular expression of modules that are never adapted.
        init_weights: True (PEFT's initial values: the adapter starts as an exact no-op), False (all
            factors random: the adapter starts as noise), or the name of another no-op: "lycoris"
            (LyCORIS' normal distribution), "calibrated" (the first steps move ΔW as LoRA's of equal
            rank do, whatever the rank and the width), "abba" (the same, and the first pair of
            factors holds the kernel's largest singular vectors). See docs/initial-values.md.
        layers_to_transform: index or indices of the layers to adapt.
        layers_pattern: name or names of the container that holds the layers.
        modules_to_save: modules that are trained and saved whole.

    Raises:
        ValueError: no adapter can be made from a field. Besides PEFT's own checks: r is an int ≥ 1,
            alpha is finite, dropouts are in [0, 1), patterns are regular expressions.

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

    def __new__(cls, *args: object, **fields: object) -> Self:
        """Refuse LoRA's names for LoHa's fields."""
        for name in fields:
            if name in _LORA_NAMES:
                raise TypeError(f"LoHaConfig has no `{name}`: LoHa's is {_LORA_NAMES[name]}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = checked_field(field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        if self.layers_pattern and self.layers_to_transform in (None, ()):
            raise ValueError(
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified. "
            )

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, LoHaConfig) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __getstate__(self) -> dict[str, Any]:
        """Return only the fields: another process hashes strings differently."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @functools.cached_property
    def _key(self) -> tuple[Any, ...]:
        """All fields as hashable values. The order of the patterns counts: the first match wins."""
        return tuple((f.name, _hashable(getattr(self, f.name))) for f in dataclasses.fields(self))

    @property
    def computing(self) -> tuple[Any, ...]:
        """The fields that computing needs: both dropouts, and whether kept rows are rescaled.

        Ranks, alphas and layouts are in the tree itself. All other fields are provenance: they are
        written to files, but trees that differ only in them have the same structure.
        """
        return self.rank_dropout, self.module_dropout, True

    @property
    def initial_values(self) -> bool | str:
        """The distribution that the factors are drawn from, for `init_factors`."""
        return self.init_weights

    @property
    def file_metadata(self) -> Mapping[str, str]:
        """Strings for the header of a LyCORIS file."""
        return {}

    def effective_alpha(self, alpha: float, r: int) -> float:
        """Return the alpha for which alpha/r is the scale of a module's update.

        Args:
            alpha: of the module, from `alpha` or `alpha_pattern`.
            r: rank of the module.
        """
        return alpha

    def extra_arrays(
        self, kernel: jax.Array, layout: Layout, dtype: DTypeLike
    ) -> dict[str, jax.Array]:
        """Return the trained arrays besides the factors, by their names in `Factors`: none here."""
        return {}

    def as_peft(self, alphas: Iterable[float]) -> LoHaConfig:
        """Return the config with only the fields that PEFT has.

        Args:
            alphas: of the adapted modules, as `effective_alpha` returns them.
        """
        return self

    @property
    def all_modules_to_save(self) -> tuple[str, ...]:
        """`modules_to_save` and the heads that the task type adds, each once."""
        heads = {
            "SEQ_CLS": ("classifier", "score"),
            "TOKEN_CLS": ("classifier", "score"),
            "QUESTION_ANS": ("qa_outputs",),
        }.get(self.task_type or "", ())
        return tuple(dict.fromkeys((*(self.modules_to_save or ()), *heads)))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types.

        Sets become sorted lists; in PEFT their order depends on the hash seed.
        """

        def plain(value: object) -> object:
            if isinstance(value, frozenset):
                return sorted(value)
            if isinstance(value, tuple):
                return list(value)
            if isinstance(value, Mapping):
                return dict(value)
            return value

        return {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def to_json(self) -> str:
        """Return the text of `adapter_config.json` as PEFT writes it.

        It has 20 sorted keys, indented by 2, and no newline at the end. Sorting reorders
        `rank_pattern` and `alpha_pattern`, of which the first match wins. Where that would change a
        rank or an alpha, `interop.save_peft` writes patterns that do not depend on their order.
        """
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoHaConfig:
        """Return the config of a parsed `adapter_config.json`.

        Missing keys take the defaults, as in PEFT. A UserWarning reports unknown keys, which are
        left out.

        Raises:
            ValueError: `peft_type` is present and not "LOHA", or a field is invalid.
        """
        peft_type = values.get("peft_type", "LOHA")
        if peft_type != "LOHA":
            raise ValueError(
                f"This is the configuration of a {peft_type!r} adapter; loha_jax reads 'LOHA' only."
            )
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(values.keys() - known):
            warn_caller(
                f"Unexpected keys {unknown} in the LoHa configuration are ignored; they may come "
                f"from a newer PEFT than {PEFT_VERSION}.",
            )
        given = {k: v for k, v in values.items() if k in known}
        scheme = given.get("init_weights", True)
        if not isinstance(scheme, bool) and scheme not in INIT_SCHEMES:
            given["init_weights"] = bool(scheme)  # PEFT uses it for its truth only
        return cls(**given)

    @classmethod
    def from_json(cls, text: str) -> LoHaConfig:
        """Return the config of the text of an `adapter_config.json`; see `from_dict`."""
        return cls.from_dict(json_object(text, "the adapter configuration"))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> LoHaConfig:
        """Read the config of a folder that PEFT or loha_jax wrote (PEFT's name for it).

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


def peft_fields(config: LoHaConfig) -> dict[str, Any]:
    """Return the fields of a config that PEFT has, by name."""
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(LoHaConfig)}


def _hashable(value: object) -> Hashable:
    """Return a field's value with tuples in place of dicts and lists."""
    if isinstance(value, Mapping):
        return ("a mapping", *((key, _hashable(x)) for key, x in value.items()))
    if isinstance(value, list | tuple):
        return tuple(_hashable(x) for x in value)
    return value if isinstance(value, Hashable) else str(value)
