"""The content that a conversion writes for PEFT: a folder of a LoHa or a LoRA, or a LoRA file."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np
from jax.typing import DTypeLike

from loha_jax.targets.config import PEFT_VERSION, LoHaConfig

from ..disk.base_checkpoint import Checkpoint
from ..formats.adapter_file import AdapterModule
from ..formats.lora_config import check_decomposed, exact_targets, like_loha, lora_config
from ..formats.lora_files import single_file
from ..formats.lycoris_files import KOHYA_PREFIX
from ..formats.lycoris_keys import PARAMETER_OF
from ..formats.model_card import MODEL_CARD_NAME, model_card
from ..formats.peft_files import folder_contents, peft_state
from ..formats.ranks import ranks_and_alphas
from ..names.conv1d import NO_LOHA_NOTE, conv1d_test
from ..updates.lora_conversion import lora_of, of_one_rank
from .conversion_source import ConversionSource, Converted, cast_module

Modules = Mapping[str, AdapterModule]


def loha_folder(source: ConversionSource) -> Converted:
    """Return a PEFT LoHa folder.

    Raises:
        ValueError: PEFT's LoHa cannot hold something.
    """
    modules = _dotted(source, source.lohas())
    _check_for_peft(source, modules)
    saved = _saved(source)
    if _has_conv1d(source, modules):
        source.notes.append(NO_LOHA_NOTE)
    return Converted(
        [*modules.values()], _files(modules, saved, _config(source, modules, saved).to_dict())
    )


def lora_folder(
    source: ConversionSource,
    rank: int | None,
    energy: float | None,
    dtype: DTypeLike | None,
    form: str,
    prefix: str | None,
) -> Converted:
    """Return a PEFT LoRA folder, or a LoRA file of another form.

    Args:
        source: the adapter.
        rank, energy: as for `lora_of`.
        dtype: of the factors, instead of their own.
        form, prefix: as for `save_lora`.

    Raises:
        ValueError: the folder or the file cannot hold something.
    """
    modules: dict[str, AdapterModule] = {}
    errors: dict[str, float] = {}
    for name, module in _dotted(source, source.adapter.modules).items():
        shape = source.shapes.get(name)
        lora, errors[name] = lora_of(module, rank, energy, shape=shape)
        modules[name] = lora if dtype is None else cast_module(lora, dtype)
    saved = _saved(source)
    check_decomposed(modules)
    if convolutions := [name for name in modules if len(source.shapes.get(name, ())) > 2]:
        source.notes.append(
            "a checkpoint does not show the groups of convolutions: "
            f"{', '.join(convolutions)} count as having none"
        )
    if form != "peft":
        if source.checkpoint is None:
            source.notes.append(
                "without the base model's checkpoint (`base=`) flat factors count as those of "
                "linear layers"
            )
        prefix = _own_prefix(source) if prefix is None else prefix
        modules = of_one_rank(modules) if form == "diffusers" else modules
        content = single_file(form, prefix, peft_state(modules.values(), saved))
        return Converted([*modules.values()], content, errors)
    config, conv1d = _config(source, modules, saved), _has_conv1d(source, modules)
    fields = lora_config(config, modules, _targets(source, modules), fan_in_fan_out=conv1d)
    return Converted([*modules.values()], _files(modules, saved, fields), errors)


def _has_conv1d(source: ConversionSource, modules: Modules) -> bool:
    """Return whether a module is GPT-2's `Conv1D`, as the base or a LoRA's settings say."""
    if source.checkpoint is not None:
        return any(map(conv1d_test(source.checkpoint), modules))
    return bool(source.adapter.config.get("fan_in_fan_out"))


def _own_prefix(source: ConversionSource) -> str | None:
    """Return the prefix of a kohya source, which says the part of the model; else None."""
    given = {module.prefix for module in source.adapter.modules.values()}
    return next((p for p in given if p.startswith(KOHYA_PREFIX)), None)


def _files(
    modules: Modules, saved: Mapping[str, np.ndarray], config: Mapping[str, object]
) -> dict[str, bytes]:
    files = folder_contents(peft_state(modules.values(), saved), config)
    return {**files, MODEL_CARD_NAME: model_card(config).encode()}


def _config(
    source: ConversionSource, modules: Modules, saved: Mapping[str, np.ndarray]
) -> LoHaConfig:
    """Return a LoHa's config; the source's own if it has one."""
    given, is_loha = source.adapter.config, source.adapter.config.get("peft_type") == "LOHA"
    if is_loha:
        config = LoHaConfig.from_dict(given)
    elif given:
        config = like_loha(given)
    else:
        config = LoHaConfig(modules_to_save=sorted({*map(owner, saved)}) or None)
    config = dataclasses.replace(config, inference_mode=True, peft_version=PEFT_VERSION)
    if is_loha and source.is_unchanged:
        return config
    return dataclasses.replace(
        config,
        **ranks_and_alphas(modules),
        use_effective_conv2d=any("hada_t1" in m.tensors for m in modules.values()),
        target_modules=_targets(source, modules),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
    )


def _targets(source: ConversionSource, modules: Modules) -> list[str] | str:
    given = source.adapter.config.get("target_modules")
    if source.is_unchanged and given and not isinstance(given, str):
        return sorted(given)
    if source.checkpoint is None:
        return sorted(modules)
    return exact_targets(set(modules), set(map(owner, source.checkpoint.shapes)) - {""})


def _dotted(source: ConversionSource, modules: Modules) -> Modules:
    """Return the modules by their torch names, for a folder of one model."""
    if len(prefixes := sorted({m.prefix for m in modules.values()})) > 1:
        raise ValueError(
            f"The source holds several models' modules ({', '.join(prefixes)}), PEFT's folder "
            f"those of one. Choose with `only=`, such as `only=` '{re.escape(prefixes[0])}.*'"
        )
    unknown = [
        own
        for own, m in modules.items()
        if source.checkpoint is None and m.prefix.endswith("_") and "_" in m.name
    ]
    if unknown:
        raise ValueError(
            f"The source writes dots of module names as underscores ({', '.join(unknown[:5])}"
            f"{', …' if len(unknown) > 5 else ''}); `base=`, the base model's checkpoint, says "
            "which they are"
        )
    owners: dict[str, str] = {}
    for own, module in modules.items():
        if (other := owners.setdefault(module.name, own)) != own:
            raise ValueError(
                f"{other} and {own} would both be {module.name} in the folder. Choose with `only=`"
            )
    return {module.name: module for module in modules.values()}


def _saved(source: ConversionSource) -> Mapping[str, np.ndarray]:
    """Return PEFT's tensors besides the factors; LyCORIS' differences are added to the base's."""
    others, base = source.adapter.others, source.checkpoint
    if source.adapter.config or not others:
        return others
    if base is None:
        raise ValueError(
            "The source has differences of whole parameters "
            f"({', '.join(sorted(set(map(owner, others))))}), PEFT has the parameters themselves: "
            "give the base model's checkpoint, `base=`"
        )
    differences = {
        f"{source.lookup.find_own(owner(key))}.{PARAMETER_OF[part]}": value
        for key, value in others.items()
        if (part := key.rpartition(".")[2]) in PARAMETER_OF
    }
    changed = set(map(owner, differences))
    if both := sorted(changed & {module.name for module in source.adapter.modules.values()}):
        raise ValueError(
            f"{', '.join(both)} have factors and differences of whole parameters (diff, diff_b), "
            "and PEFT adapts a module or saves it. Leave them out with `only=`, or merge the "
            "adapter"
        )
    for key, difference in differences.items():
        if base.shapes.get(key) != difference.shape:
            raise ValueError(f"The base has no {key} of the shape {list(difference.shape)}")
    parameters = [f"{module}.{part}" for module in sorted(changed) for part in ("weight", "bias")]
    return {
        key: _changed(base, key, differences.get(key)) for key in parameters if key in base.shapes
    }


def _changed(base: Checkpoint, key: str, difference: np.ndarray | None) -> np.ndarray:
    base.check_readable(key)
    value = base.read_values(key)
    if difference is None:
        return value
    return (value.astype(np.float32) + difference.astype(np.float32)).astype(value.dtype)


def _check_for_peft(source: ConversionSource, modules: Modules) -> None:
    """Refuse what PEFT's LoHa has no place for."""
    shapes, base = source.shapes, source.checkpoint
    cores = {name: m.tensors["hada_t1"] for name, m in modules.items() if "hada_t1" in m.tensors}
    decomposed = [name for name, m in modules.items() if m.dora_scale is not None]
    solid = [n for n in modules if len(shapes.get(n, ())) > 4 or (n in cores and cores[n].ndim > 4)]
    refused = {"a weight decomposition (DoRA)": decomposed, "a Conv3d": solid}
    if problems := [f"{what} in {', '.join(names)}" for what, names in refused.items() if names]:
        raise ValueError(
            f"PEFT's LoHa cannot hold {' and '.join(problems)}. Leave them out with `only=`, or "
            "merge the adapter"
        )
    flat = [name for name in modules if name not in cores]
    if cores and flat and base is None and not source.adapter.config:
        raise ValueError(
            f"The source has modules with cores ({next(iter(cores))}) and without ({flat[0]}); "
            "whether the latter are convolutions, which PEFT cannot hold together, only the base "
            "model's checkpoint says: give `base=`"
        )
    mixed = [name for name in flat if math.prod(shapes.get(name, ())[2:]) > 1]
    if cores and mixed:
        raise ValueError(
            "PEFT's config has one use_effective_conv2d for all modules, and the source has "
            f"convolutions with cores ({', '.join(cores)}) and without ({', '.join(mixed)})"
        )


def owner(key: str) -> str:
    """Return the module of a parameter."""
    return key.rpartition(".")[0]
