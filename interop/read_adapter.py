"""`read_adapter`: an adapter of any format as an `AdapterFile`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from loha_jax.config import LoHaConfig
from loha_jax.init import FACTOR_NAMES
from loha_jax.matching import match_pattern

from .adapter_file import AdapterFile, AdapterModule
from .factors import rank_of
from .files import FileError, read_metadata, read_safetensors, read_torch_pickle
from .lora_config import check_lora_config
from .lora_folder import lora_file
from .lycoris_format import KOHYA_PREFIX, NORM_PARTS, ModuleNames, group_keys, is_norm, read_module, split_prefix
from .orbax_folder import is_orbax_folder, read_orbax
from .peft import module_key, read_folder

_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


def read_adapter(path: str | Path, *, modules: Iterable[str] | None = None) -> AdapterFile:
    """Reads an adapter: a PEFT folder (LoHa or LoRA), or a file of LyCORIS or kohya.

    Args:
        path: a folder with `adapter_config.json`, one that `write_orbax` made, or a file (`.safetensors`, or a torch
            pickle: `.pt`, `.pth`, `.bin`, `.ckpt`, which needs torch).
        modules: the dotted names of the model's modules, to find those that a LyCORIS file writes with underscores;
            one that is not among them keeps the file's name.

    Returns:
        The tensors as they are in the file, in its dtype. LyCORIS' alpha is the rank where the file has none or 0, as
        in kohya's scripts, ComfyUI and PEFT's converter.

    Raises:
        FileNotFoundError: there is no such file, or the folder has no adapter.
        FileError: it is broken, or another kind of adapter; the message names the key.
        ValueError: two of `modules` have the same name in the file, which writes their dots as underscores.

    Example:
        >>> import tempfile, jax, loha_jax
        >>> config = loha_jax.LoHaConfig(r=2, target_modules=["q"])
        >>> params = loha_jax.inject({"a": {"q": {"kernel": jax.numpy.ones((3, 3))}}}, config, key=jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     loha_jax.interop.save_lycoris(f"{folder}/adapter.safetensors", params)
        ...     read_adapter(f"{folder}/adapter.safetensors", modules=["a.q"]).modules["lycoris_a_q"].name
        'a.q'
    """
    path = Path(path)
    if path.is_dir():
        return read_orbax(path) if is_orbax_folder(path) else _read_peft(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no adapter at '{path}'")
    if path.suffix in _TORCH_SUFFIXES:
        state, metadata = read_torch_pickle(path), {}
    else:
        state, metadata = read_safetensors(path), read_metadata(path)
    try:
        return _lycoris(path, state, metadata, None if modules is None else ModuleNames(modules))
    except FileError as error:
        raise FileError(f"{path}: {error}") from error


def _lycoris(
    path: Path, state: dict[str, np.ndarray], metadata: dict[str, str], names: ModuleNames | None
) -> AdapterFile:
    found: dict[str, AdapterModule] = {}
    others: dict[str, np.ndarray] = {}
    for own, parts in group_keys(state).items():
        if is_norm(parts):
            if mixed := sorted(parts.keys() - set(NORM_PARTS.values())):
                raise FileError(f"{own} has both {mixed[0]} and the differences of a normalisation layer")
            others.update({f"{own}.{part}": tensor for part, tensor in parts.items()})
            continue
        prefix, name = split_prefix(own)
        name = (names.find(prefix, name) if names else None) or name
        found[own] = dataclasses.replace(read_module(own, parts), name=name, prefix=prefix)
    form = "kohya" if any(own.startswith(KOHYA_PREFIX) for own in found) else "lycoris"
    return AdapterFile(path, form, found, others, {}, metadata)


def _config(values: Mapping[str, Any]) -> LoHaConfig | dict[str, Any]:
    """The config of a LoHa, or the fields of one of a LoRA."""
    return check_lora_config(values) if values.get("peft_type") == "LORA" else LoHaConfig.from_dict(values)


def _read_peft(folder: Path) -> AdapterFile:
    config, state, path = read_folder(folder, _config)
    if isinstance(config, dict):
        return lora_file(folder, config, state, path)
    parts_of: dict[str, dict[str, np.ndarray]] = {}
    others: dict[str, np.ndarray] = {}
    for key, tensor in state.items():
        module, _, part = module_key(key).rpartition(".")
        if part in FACTOR_NAMES:
            parts_of.setdefault(module, {})[part] = tensor
        else:
            others[f"{module}.{part}"] = tensor
    found: dict[str, AdapterModule] = {}
    for name, tensors in parts_of.items():
        try:
            r = rank_of(name, tensors)
            if r != (wanted := match_pattern(name, config.rank_pattern, config.r)):
                raise FileError(f"the factors of {name} have rank {r}, adapter_config.json says {wanted}")
            alpha = float(match_pattern(name, config.alpha_pattern, config.alpha))
        except ValueError as error:
            raise FileError(f"{path}: {error}") from error
        found[name] = AdapterModule(name, "loha", r, alpha, tensors)
    metadata = read_metadata(path) if path.suffix == ".safetensors" else {}
    return AdapterFile(folder, "peft", found, others, config.to_dict(), metadata)
