"""PEFT's adapter folders: names, keys, and how a folder is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from loha_jax.interop.disk.paired_files import DIFFUSERS_NAME, pending_or_own
from loha_jax.interop.disk.tensor_files import (
    FileError,
    read_metadata,
    read_safetensors,
    read_torch_pickle,
    without_wrappers,
)
from loha_jax.interop.formats.wrong_loader import DIFFUSERS_CONFIG_KEY

from loha_jax.lowrank.initial_values import FACTOR_NAMES
from loha_jax.runtime.untrusted import json_object, read_json
from loha_jax.targets.config import CONFIG_NAME

PREFIX = "base_model.model."
"""What stands before every key of PEFT's files."""

C = TypeVar("C")

SAFETENSORS_NAME = "adapter_model.safetensors"

BIN_NAME = "adapter_model.bin"


def read_folder(folder: Path, config_of: Callable[[Mapping[str, Any]], C]) -> tuple[C, dict[str, np.ndarray], Path]:
    """The config and the tensors of an adapter, and the file that holds the latter.

    Args:
        folder: of PEFT or diffusers.
        config_of: makes the config of its fields, as `LoHaConfig.from_dict` does, and raises ValueError.
    """
    config_path, diffusers = pending_or_own(folder, CONFIG_NAME), folder / DIFFUSERS_NAME
    has_config = config_path.is_file()
    if not has_config and diffusers.is_file():
        text = read_metadata(diffusers).get(DIFFUSERS_CONFIG_KEY)
        if text is None:
            raise FileError(
                f"{diffusers} has no adapter configuration in its header ({DIFFUSERS_CONFIG_KEY!r}): read its tensors, "
                "and give a config to `from_peft_state_dict`."
            )
        try:
            config = config_of(json_object(text, "the adapter configuration"))
        except ValueError as error:
            raise FileError(f"{diffusers}: {error}") from error
        return config, read_safetensors(diffusers), diffusers
    if not has_config:
        inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}")) if folder.is_dir() else []
        hint = f"; there is one in its sub-folder(s) {', '.join(inside)}: load '{folder / inside[0]}'" if inside else ""
        raise FileNotFoundError(f"Can't find '{CONFIG_NAME}' at '{folder}'{hint}")
    values = read_json(config_path)
    try:
        config = config_of(values)
    except ValueError as error:
        raise FileError(f"{config_path}: {error}") from error
    if (path := pending_or_own(folder, SAFETENSORS_NAME)).is_file():
        return config, read_safetensors(path), path
    if (path := folder / BIN_NAME).is_file():
        return config, read_torch_pickle(path), path
    raise FileNotFoundError(f"Can't find '{SAFETENSORS_NAME}' or '{BIN_NAME}' at '{folder}'")


def module_key(key: str) -> str:
    """A key without PEFT's prefix and without an adapter's name: "layer.q.hada_w1_a"."""
    key = without_wrappers(key)
    if key.startswith(f"module.{PREFIX}"):  # DataParallel around PEFT's model
        key = key.removeprefix("module.")
    key = key.removeprefix(PREFIX)
    return re.sub(rf"\.({'|'.join(FACTOR_NAMES)})\.[^.]+$", r".\1", key)
