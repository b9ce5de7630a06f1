"""PEFT's adapter folders: how one is read, and what is written into one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from loha_jax.lowrank.initial_values import FACTOR_NAMES
from loha_jax.runtime.untrusted import FileError, read_json
from loha_jax.targets.config import CONFIG_NAME, LoHaConfig
from loha_jax.targets.matching import match_pattern

from ..disk.paired_files import DIFFUSERS_NAME, pending_or_own
from ..disk.tensor_files import (
    check_finite,
    read_metadata,
    read_tensors,
    safetensors_bytes,
    without_wrappers,
)
from .adapter_file import AdapterFile, AdapterModule, errors_about
from .peft_names import BIN_NAME, PREFIX, SAFETENSORS_NAME
from .ranks import rank_of
from .wrong_loader import DIFFUSERS_CONFIG_KEY, header_config, hints

C = TypeVar("C")


def read_folder(
    folder: Path, config_of: Callable[[Mapping[str, Any]], C]
) -> tuple[C, dict[str, np.ndarray], Path]:
    """Return the config and the tensors of an adapter, and the file that holds the tensors.

    Args:
        folder: of PEFT or diffusers.
        config_of: makes the config of its fields, as `LoHaConfig.from_dict` does, and raises
            ValueError.
    """
    values, origin = _config_values(folder)
    with errors_about(origin):
        config = config_of(values)
    own = [pending_or_own(folder, SAFETENSORS_NAME), folder / BIN_NAME]
    for path in [origin] if origin.name == DIFFUSERS_NAME else own:
        if path.is_file():
            return config, read_tensors(path), path
    raise FileNotFoundError(f"Can't find '{SAFETENSORS_NAME}' or '{BIN_NAME}' at '{folder}'")


def _config_values(folder: Path) -> tuple[dict[str, Any], Path]:
    """Return the fields of an adapter's config, and the file that holds them."""
    if (path := pending_or_own(folder, CONFIG_NAME)).is_file():
        return read_json(path), path
    if (path := folder / DIFFUSERS_NAME).is_file():
        if values := header_config(path):
            return values, path
        raise FileError(
            f"{path} has no adapter configuration in its header ({DIFFUSERS_CONFIG_KEY!r}): read "
            "its tensors, and give a config to `from_peft_state_dict`."
        )
    hint = ""
    if inside := sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}")):
        first = folder / inside[0]
        hint = f"; there is one in its sub-folder(s) {', '.join(inside)}: load '{first}'"
    raise FileNotFoundError(f"Can't find '{CONFIG_NAME}' at '{folder}'{hint}")


def torch_name(key: str) -> str:
    """Return a key without PEFT's prefix and without an adapter's name: "layer.q.hada_w1_a"."""
    key = without_wrappers(key)
    if key.startswith(f"module.{PREFIX}"):  # DataParallel around PEFT's model
        key = key.removeprefix("module.")
    key = key.removeprefix(PREFIX)
    return re.sub(rf"\.({'|'.join(FACTOR_NAMES)})\.[^.]+$", r".\1", key)


def read_peft(folder: str | Path) -> AdapterFile:
    """Read a folder that PEFT wrote for a LoHa adapter.

    Raises:
        FileNotFoundError: there is no config or no weights.
        FileError: they are corrupted, hold NaN or infinity, or are those of another kind of
            adapter.
    """
    with hints(folder, "load_peft"):
        config, state, path = read_folder(Path(folder), LoHaConfig.from_dict)
    check_finite(state, path)
    with errors_about(path):
        return peft_file(config, state, path)


def peft_file(config: LoHaConfig, state: Mapping[str, Any], path: Path) -> AdapterFile:
    """Return the adapter of a state dict that PEFT wrote for a LoHa.

    Nothing is checked: modules may lack factors, or have others than their config says; see
    `check_peft_file`.

    Args:
        config: the adapter's; it says the modules' ranks and alphas.
        state: arrays by PEFT's keys, with or without the prefix.
        path: of the file that held them.
    """
    modules: dict[str, AdapterModule] = {}
    others: dict[str, np.ndarray] = {}
    keys = {torch_name(key): key for key in state}
    for name, key in keys.items():
        module, _, part = name.rpartition(".")
        if part not in FACTOR_NAMES:
            others[name] = state[key]
            continue
        if module not in modules:
            r = match_pattern(module, config.rank_pattern, config.r)
            alpha = float(match_pattern(module, config.alpha_pattern, config.alpha))
            modules[module] = AdapterModule(module, "loha", r, alpha, {})
        modules[module].tensors[part] = state[key]
    metadata = read_metadata(path)
    return AdapterFile(path, "peft", modules, others, config.to_dict(), metadata, keys=keys)


def check_peft_file(file: AdapterFile) -> None:
    """Raise FileError where a module's factors do not fit each other, or not the config."""
    for name, module in file.modules.items():
        if (r := rank_of(name, module.tensors)) != module.r:
            raise FileError(
                f"the factors of {name} have rank {r}, adapter_config.json says {module.r}"
            )


def peft_tensors(module: AdapterModule) -> dict[str, np.ndarray]:
    """Return one module's tensors by PEFT's names, without its prefix.

    Example:
        >>> tensors = {"lora_A": np.ones((1, 3)), "lora_B": np.ones((2, 1))}
        >>> list(peft_tensors(AdapterModule("q", "lora", 1, 1.0, tensors)))
        ['q.lora_A.weight', 'q.lora_B.weight']
    """
    suffix = ".weight" if module.kind == "lora" else ""
    tensors = {f"{module.name}.{part}{suffix}": tensor for part, tensor in module.tensors.items()}
    if module.kind == "lora" and module.dora_scale is not None:
        spatial = module.tensors["lora_A"].ndim - 2
        # [out], or [1, out, 1, ...] of a convolution
        shape = (1, -1, *(1,) * spatial) if spatial else (-1,)
        tensors[f"{module.name}.lora_magnitude_vector"] = module.dora_scale.reshape(shape)
    return tensors


def peft_state(
    modules: Iterable[AdapterModule], others: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return PEFT's state dict of some modules and of other parameters."""
    own = [item for module in modules for item in peft_tensors(module).items()]
    return {PREFIX + name: tensor for name, tensor in [*own, *others.items()]}


def folder_contents(state: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the contents of PEFT's files, by their names.

    Args:
        state: from `peft_state`.
        config: the content of `adapter_config.json`.
    """
    return {
        SAFETENSORS_NAME: safetensors_bytes(state, {"format": "pt"}),
        CONFIG_NAME: json.dumps(config, indent=2, sort_keys=True).encode(),
    }
