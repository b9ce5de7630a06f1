"""PEFT's rules for the modules that an adapter targets, on dotted module names.

They are checked against PEFT 0.21.2 on several thousand cases
(tests/data/peft/matching_cases.json).
"""

from __future__ import annotations

import collections
import difflib
import enum
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from loha_jax.runtime.untrusted import fullmatch, match
from loha_jax.targets.config import LoHaConfig
from loha_jax.targets.target_advice import spelling_advice

T = TypeVar("T")


class Match(enum.Enum):
    """How a config treats a module."""

    TARGETED = enum.auto()
    UNTARGETED = enum.auto()
    EXCLUDED = enum.auto()
    """By `exclude_modules`, or because `modules_to_save` saves the module whole."""


_QV = ("q_proj", "v_proj")
DEFAULT_TARGET_MODULES: Mapping[str, tuple[str, ...] | str] = {
    **dict.fromkeys(("t5", "mt5"), ("q", "v")),
    **dict.fromkeys(
        ("bart", "opt", "gptj", "gpt_neo", "llama", "llama4", "mistral", "mixtral", "stablelm"), _QV
    ),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), _QV),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    **dict.fromkeys(
        ("bloom", "gpt_neox", "chatglm", "RefinedWebModel", "RefinedWeb", "falcon"),
        ("query_key_value",),
    ),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "layoutlm"), ("query", "value")),
    "blip-2": ("q", "v", "q_proj", "v_proj"),
    "deberta-v2": ("query_proj", "value_proj"),
    "deberta": ("in_proj",),
    "mpt": ("Wqkv",),
    "btlm": ("c_proj", "c_attn"),
    "codegen": ("qkv_proj",),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
}
"""PEFT 0.21.2's default `target_modules` for LoHa by `model_type`."""

ALL_LINEAR = "all-linear"
_OUTPUT_HEADS = (
    # transformers
    *("lm_head", "lm_head.decoder", "embed_out", "predictions.decoder", "output_projection"),
    # MaxText and other JAX models
    *("logits_dense", "logits", "to_logits", "unembed", "unembedding"),
)
_CONDENSE_FROM = 20


def name_endings(name: str) -> frozenset[str]:
    """Return a dotted name and its endings: a.b.c, b.c and c."""
    parts = name.split(".")
    return frozenset(".".join(parts[n:]) for n in range(len(parts)))


def name_beginnings(name: str) -> list[str]:
    """Return the modules above a module and itself: a, a.b and a.b.c."""
    return list(itertools.accumulate(name.split("."), "{}.{}".format))


def match_target(name: str, config: LoHaConfig) -> Match:
    """Return how PEFT would treat the module `name`.

    The rules are those of PEFT's `check_target_module_exists`: `exclude_modules`, then
    `modules_to_save`, then `target_modules`. `layers_to_transform` and `layers_pattern` restrict
    only the matches by name ending.

    Args:
        name: dotted module name, e.g. "encoder.layer.0.attention.self.query".
        config: the adapter's config. "all-linear" and None must have been resolved before
            (`resolve_target_modules`).

    Example:
        >>> match_target("layers.0.q", LoHaConfig(target_modules=["q"]))
        <Match.TARGETED: 1>
    """
    if _is_excluded(name, config):
        return Match.EXCLUDED
    return Match.TARGETED if _is_targeted(name, config) else Match.UNTARGETED


def _is_excluded(name: str, config: LoHaConfig) -> bool:
    exclude = config.exclude_modules
    if isinstance(exclude, str):
        if exclude and fullmatch(exclude, name):
            return True
    elif exclude and name_endings(name) & frozenset(exclude):
        return True
    saved = config.all_modules_to_save
    return any(match(rf"(^|.*\.){entry}($|\..*)", name) for entry in saved)


def _is_targeted(name: str, config: LoHaConfig) -> bool:
    targets = config.target_modules
    if isinstance(targets, str):
        return fullmatch(targets, name) is not None
    targets = targets if isinstance(targets, frozenset) else frozenset(targets or ())
    if name in targets:
        return True
    if not name_endings(name) & targets:
        return False
    layers = config.layers_to_transform
    if layers is None or layers == ():
        return True
    index = _layer_index(name, config.layers_pattern)
    if index is None:
        return False
    return index == layers if isinstance(layers, int) else index in tuple(layers)


def _layer_index(name: str, layers_pattern: str | Iterable[str] | None) -> int | None:
    if not layers_pattern:
        # PEFT wants a dot before the container's name here: "layers.0.q" has no layer index,
        # "model.layers.0.q" has.
        patterns = [r".*?\.[^.]*\.(?P<index>\d+)\."]
    else:
        containers = (layers_pattern,) if isinstance(layers_pattern, str) else layers_pattern
        patterns = [rf"(?:^|.*?\.){container}\.(?P<index>\d+)\." for container in containers]
    for pattern in patterns:
        if found := match(pattern, name):
            return int(found["index"])
    return None


def match_pattern(name: str, patterns: Mapping[str, T], default: T) -> T:
    """Return the value of the first pattern that matches the end of `name` at a dot.

    Args:
        name: dotted module name.
        patterns: `rank_pattern` or `alpha_pattern`.
        default: the value where no pattern matches.

    Example:
        >>> match_pattern("layers.0.q", {"v": 2, "q": 4}, 8)
        4
    """
    key = match_pattern_key(name, patterns)
    return default if key is None else patterns[key]


def match_pattern_key(name: str, patterns: Iterable[str]) -> str | None:
    """Return the first pattern that matches `name`, or None (PEFT's `get_pattern_key`)."""
    return next((p for p in patterns if match(rf"(.*\.)?({p})$", name)), None)


def exact_patterns(values: Mapping[str, T], default: T) -> dict[str, T]:
    """Return the `rank_pattern` or `alpha_pattern` that gives each of some modules its own value.

    A key matches only one full name. Modules with the default value need none.
    """
    return {f"^{re.escape(name)}": value for name, value in values.items() if value != default}


def most_common(values: Iterable[T]) -> T:
    """Return the value that occurs most often; the first of several."""
    return collections.Counter(values).most_common(1)[0][0]


def resolve_target_modules(
    config: LoHaConfig, modules: Sequence[str], linear: Iterable[str], model_type: str | None
) -> str | frozenset[str]:
    """Return the `target_modules` that PEFT would put in place of None and "all-linear".

    "all-linear" takes all linear modules except the output head. The head is a module named as in
    `_OUTPUT_HEADS`. If there is none and the task type is SEQ_CLS, it is `score` or `classifier`.

    Args:
        config: the adapter's config.
        modules: all module names of the model.
        linear: names of the modules with a linear (matrix product) kernel.
        model_type: a key of `DEFAULT_TARGET_MODULES`, read only if `target_modules` is None.

    Raises:
        ValueError: `target_modules` is empty, or None and `model_type` is None or unknown.
    """
    targets = config.target_modules
    if targets is None:
        return _default_targets(model_type)
    if not targets:
        raise ValueError("No `target_modules` passed. Please check the values for these arguments.")
    if not isinstance(targets, str):
        return frozenset(targets)
    if targets.lower() != ALL_LINEAR:
        return targets

    linear = list(linear)
    heads = {name for name in linear if name_endings(name) & set(_OUTPUT_HEADS)}
    if not heads and config.task_type == "SEQ_CLS":
        found = [name for head in ("score", "classifier") for name in linear if name == head]
        heads = set(found[:1])
    chosen = [name for name in linear if name not in heads]
    if len(chosen) < _CONDENSE_FROM:
        return frozenset(chosen)
    return frozenset(
        find_minimal_target_modules(chosen, [m for m in modules if m not in set(chosen)])
    )


def _default_targets(model_type: str | None) -> str | frozenset[str]:
    if model_type is None:
        raise ValueError(
            "Please specify `target_modules` in the LoHaConfig, or pass `model_type=` (one of "
            f"{sorted(DEFAULT_TARGET_MODULES)}) for PEFT's defaults."
        )
    if model_type not in DEFAULT_TARGET_MODULES:
        near = difflib.get_close_matches(model_type, DEFAULT_TARGET_MODULES)
        raise ValueError(
            f"PEFT has no default `target_modules` for model_type={model_type!r}"
            + (f" (did you mean {' or '.join(map(repr, near))}?)" if near else "")
            + ". Please specify `target_modules` in the LoHaConfig."
        )
    default = DEFAULT_TARGET_MODULES[model_type]
    return default if isinstance(default, str) else frozenset(default)


def find_minimal_target_modules(targets: Iterable[str], others: Iterable[str]) -> set[str]:
    """Return the shortest name endings that match all `targets` and none of `others`, as in PEFT.

    Example:
        >>> find_minimal_target_modules(["layers.0.q", "layers.1.q"], ["layers.0.k"])
        {'q'}
    """
    other_endings = {ending for name in others for ending in name_endings(name)}
    chosen: set[str] = set()
    for name in sorted(set(targets)):
        if not name_endings(name) & chosen:
            chosen.add(min(name_endings(name) - other_endings, key=len, default=name))
    return chosen


def no_match_message(config: LoHaConfig, names: Sequence[str], excluded: Sequence[str]) -> str:
    """Return the reason why nothing was adapted, in PEFT's words, with the nearest names.

    Args:
        config: with resolved `target_modules`.
        names: of all modules with a weight.
        excluded: those of them that the config excludes.
    """
    targets = config.target_modules
    shown = ", ".join(map(repr, sorted(targets or ())))
    shown = repr(targets) if isinstance(targets, str) else f"{{{shown}}}"
    if excluded and len(excluded) == len(names):
        return (
            "All modules were excluded. This is likely unintended. Check your `target_modules`, "
            "`exclude_modules` and `modules_to_save` configuration."
        )
    message = (
        "No modules were targeted for adaptation. This might be caused by a combination of "
        "mismatched target modules and excluded modules. Please check your `target_modules` and "
        "`exclude_modules` configuration. You may also have only targeted modules that are marked "
        "to be saved (`modules_to_save`)."
        if excluded
        else f"Target modules {shown} not found in the base model. Please check the target "
        "modules and try again."
        if targets
        else "'all-linear' finds no kernel here. It takes leaves called kernel, w or weight, "
        "without output heads, and those that `layouts=` knows: pass "
        "layouts=loha_jax.infer_layouts(fn, params, *args), or name the modules."
    )
    if config.layers_to_transform is not None:
        layers = config.layers_to_transform
        layers = list(layers) if isinstance(layers, tuple) else layers
        message += f" Note: You specified 'layers_to_transform': {layers}."
        if config.layers_pattern is not None:
            message += f" You also specified 'layers_pattern': {config.layers_pattern}."
        else:
            message += (
                " Without 'layers_pattern' an index is found where two parts of a name stand before"
                " it ('model.layers.3.q'); for 'layers.3.q', give layers_pattern='layers'."
            )
    return message + (spelling_advice(targets, names) or near_misses(targets, names))


def near_misses(targets: str | Iterable[str] | None, names: Sequence[str]) -> str:
    """Return sentences with the module names nearest to `targets`; "" if there are no names.

    Of an entry that names a module of modules, these are the modules in it. Where no name is near,
    it is the ends of all names.
    """
    wanted = [targets] if isinstance(targets, str) else sorted(targets or ())
    inside = {target: held for target in wanted if (held := _modules_in(target, names))}
    said = "".join(
        f" {target!r} has no kernel of its own; the modules in it are {', '.join(held)}."
        for target, held in inside.items()
    )
    wanted = [target for target in wanted if target not in inside]
    return said + (_nearest(targets, wanted, names) if wanted or not said else "")


def _modules_in(target: str, names: Iterable[str]) -> list[str]:
    """Return the names, quoted and at most ten, of the modules in one whose name ends so."""
    found = sorted(
        name
        for name in names
        if any(target in name_endings(above) for above in name_beginnings(name)[:-1])
    )
    return [*map(repr, found[:10]), *(["…"] if len(found) > 10 else [])]


def _nearest(
    targets: str | Iterable[str] | None, wanted: Sequence[str], names: Sequence[str]
) -> str:
    lasts = sorted({name.rsplit(".", 1)[-1] for name in names})
    near: list[str] = []
    for target in wanted:
        near += difflib.get_close_matches(target.rsplit(".", 1)[-1], lasts, n=3, cutoff=0.5)
        near += difflib.get_close_matches(target, names, n=2, cutoff=0.7)
    if isinstance(targets, str) and targets in lasts:
        return (
            f" A string is a regular expression for whole names: give the list [{targets!r}] for "
            "the modules whose names end so."
        )
    if not near and lasts:
        more = ", …" if len(lasts) > 20 else ""
        return f" Modules end in: {', '.join(map(repr, lasts[:20]))}{more}."
    near = list(dict.fromkeys(near))
    return f" The nearest module names are: {', '.join(map(repr, near))}." if near else ""
