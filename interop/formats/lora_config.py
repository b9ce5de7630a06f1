"""PEFT's `LoraConfig` as JSON: written for a converted adapter, and read into a LoHa's config."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from loha_jax.targets.config import PEFT_VERSION, LoHaConfig, peft_fields
from loha_jax.targets.lycoris_config import LycorisConfig
from loha_jax.targets.matching import (
    exact_patterns,
    find_minimal_target_modules,
    match_pattern,
    name_endings,
)

from .adapter_file import AdapterModule

# Fields of both configs, by LoHa's names.
_SHARED = (
    *("task_type", "auto_mapping", "base_model_name_or_path", "revision", "modules_to_save"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern"),
)
_OTHERS_READ = (
    *("peft_type", "r", "lora_alpha", "alpha_pattern", "use_rslora", "use_dora", "bias"),
    "init_lora_weights",
)
# They have no bearing on what a trained adapter computes.
_WITHOUT_EFFECT = (
    *("peft_version", "inference_mode", "lora_dropout", "fan_in_fan_out", "runtime_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_config"),
    "megatron_core",
)
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def lora_config(
    config: LoHaConfig,
    modules: Mapping[str, AdapterModule],
    targets: list[str] | str,
    *,
    fan_in_fan_out: bool,
) -> dict[str, Any]:
    """Return the content of `adapter_config.json`: fields that PEFT has always had, and alpha = r.

    Args:
        config: of the LoHa adapter, for what both have.
        modules: of kind "lora", by name.
        targets: `target_modules`.
        fan_in_fan_out: whether some are transformers' `Conv1D`.
    """
    r = max(module.r for module in modules.values())
    smaller = exact_patterns({name: m.r for name, m in sorted(modules.items())}, r)
    common = config.to_dict()
    return {
        "alpha_pattern": smaller,
        "auto_mapping": common["auto_mapping"],
        "base_model_name_or_path": config.base_model_name_or_path,
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "modules_to_save": list(config.all_modules_to_save) or None,
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "r": r,
        "rank_pattern": smaller,
        "revision": config.revision,
        "target_modules": targets,
        "task_type": config.task_type,
        "use_dora": any(module.dora_scale is not None for module in modules.values()),
        "use_rslora": False,
    }


def exact_targets(adapted: set[str], others: set[str]) -> list[str] | str:
    """Return `target_modules` that PEFT matches with the adapted modules and no other one.

    Args:
        adapted: their names.
        others: the names of the other modules; those that contain modules are known from these.

    Returns:
        The shortest name endings, sorted. Where no list does, since an adapted module's whole name
        ends another module's, a regular expression.

    Example:
        >>> exact_targets({"layers.0.q", "layers.1.q", "head.0"}, {"layers.0.k"})
        ['head.0', 'q']
        >>> exact_targets({"q"}, {"layers.q"})
        '(q)'
    """
    parts = [name.split(".") for name in adapted | others]
    others = others | {".".join(of_one[:n]) for of_one in parts for n in range(1, len(of_one))}
    # A number is a place in a container, and torch has modules without parameters in some of these.
    numbers = {last for name in adapted if (last := name.rpartition(".")[2]).isdigit()}
    chosen = find_minimal_target_modules(adapted, (others - adapted) | numbers)
    if all(chosen.isdisjoint(name_endings(name)) for name in others - adapted):
        return sorted(chosen)
    return f"({'|'.join(map(re.escape, sorted(adapted)))})"


def check_lora_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checked fields of a LoRA's `adapter_config.json`.

    Raises:
        ValueError: it is not the configuration of a LoRA, or one with an option that LoHa has no
            counterpart of.
    """
    if (kind := values.get("peft_type")) != "LORA":
        raise ValueError(f"This is the configuration of a {kind!r} adapter, not of a 'LORA' one")
    if (bias := values.get("bias", "none")) != "none":
        raise ValueError(f"bias={bias!r}: trained biases have no place in a LoHa adapter")
    if (init := values.get("init_lora_weights", True)) not in _HARMLESS_INITS:
        raise ValueError(
            f"init_lora_weights={init!r} changes the base weights, which an adapter does not. "
            "Save it in PEFT with `path_initial_model_for_weight_conversion`, which makes an "
            "ordinary LoRA of it"
        )
    known = (*_SHARED, *_OTHERS_READ, *_WITHOUT_EFFECT)
    # A number by itself turns nothing on; it belongs to an option.
    others = {name: value for name, value in values.items() if name not in known and value}
    if odd := [
        f"{name}={value!r}"
        for name, value in others.items()
        if value is True or not isinstance(value, int | float)
    ]:
        raise ValueError(f"{', '.join(odd)}: loha_jax knows no LoHa for this variant of LoRA")
    like_loha(values)  # its checks of what both have
    for name in ("use_rslora", "use_dora"):
        if not isinstance(values.get(name, False), bool):
            raise ValueError(f"`{name}` should be true or false but is {values[name]!r}")
    return dict(values)


def check_decomposed(modules: Mapping[str, AdapterModule]) -> None:
    """Raise ValueError where some modules have a weight decomposition and others have not."""
    without = [name for name, module in modules.items() if module.dora_scale is None]
    if 0 < len(without) < len(modules):
        raise ValueError(
            f"PEFT's config has one use_dora for all modules, and {', '.join(without)} has no "
            "weight decomposition, unlike the others. Keep them in adapters of their own."
        )


def like_loha(values: Mapping[str, Any]) -> LoHaConfig:
    """Return the fields that LoHa has too; alpha is `lora_alpha`, not stabilised."""
    fields = {name: values.get(name) for name in (*_SHARED, "r", "alpha_pattern")}
    given = {name: value for name, value in fields.items() if value is not None}
    return LoHaConfig(**given, alpha=values.get("lora_alpha", 8))


def rank_and_alpha(values: Mapping[str, Any], config: LoHaConfig, name: str) -> tuple[int, float]:
    """Return a module's rank, and its alpha with rank stabilisation folded in.

    Args:
        values: from `check_lora_config`.
        config: `like_loha` of them.
        name: of the module.
    """
    r = match_pattern(name, config.rank_pattern, config.r)
    alpha = match_pattern(name, config.alpha_pattern, config.alpha)
    return r, alpha * math.sqrt(r) if values.get("use_rslora", False) else alpha


def loha_config(values: Mapping[str, Any], modules: Mapping[str, AdapterModule]) -> LoHaConfig:
    """Return the config of the LoHa adapter that equals a LoRA.

    Args:
        values: from `check_lora_config`.
        modules: of the file, by name.
    """
    config = like_loha(values)
    if values.get("use_rslora", False):
        alpha = config.alpha * math.sqrt(config.r)
        patterns = exact_patterns({name: m.alpha for name, m in modules.items()}, alpha)
        config = dataclasses.replace(config, alpha=alpha, alpha_pattern=patterns)
    if config.target_modules is None:
        config = dataclasses.replace(config, target_modules=sorted(modules))
    if not values.get("use_dora", False):
        return config
    return LycorisConfig(**peft_fields(config), weight_decompose=True)
