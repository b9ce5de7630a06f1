"""`read_adapter`: an adapter of any format as an `AdapterFile`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from loha_jax.runtime.untrusted import FileError, read_json
from loha_jax.targets.config import LoHaConfig

from ..disk.paired_files import DIFFUSERS_NAME, find_adapter_file
from ..disk.tensor_files import read_metadata, read_tensors
from .adapter_file import AdapterFile, AdapterModule, errors_about
from .lora_config import check_lora_config
from .lora_files import lora_file
from .lycoris_files import KOHYA_PREFIX, NORM_PARTS, ModuleNames, read_module, split_prefix
from .lycoris_keys import PARAMETER_OF, foreign_message, group_keys
from .peft_files import check_peft_file, peft_file, read_folder
from .wrong_loader import (
    DIFFUSERS_CONFIG_KEY,
    has_peft_config,
    header_config,
    hints,
)

_LYCORIS_CONFIG = "lycoris_config.json"  # SimpleTuner's, in the same folder
_ALPHAS = ("alpha", "lora_alpha", "linear_alpha", "conv_alpha")
_BASE_LAYER = re.compile(r"(.*)\.base_layer\.([^.]+)")


def read_adapter(
    path: str | Path,
    *,
    modules: Iterable[str] | None = None,
    only: str | None = None,
    prefix: str = "",
    loader: str = "",
) -> AdapterFile:
    """Read an adapter: a PEFT folder (LoHa or LoRA), or a file of LyCORIS or kohya.

    Args:
        path: a folder with `adapter_config.json`, one with an adapter's file (`find_adapter_file`),
            or a file (`.safetensors`, or a torch pickle: `.pt`, `.pth`, `.bin`, `.ckpt`, which
            needs torch).
        modules: the dotted names of the model's modules, to find those that a LyCORIS file writes
            with underscores; one that is not among them keeps the file's name.
        only: a regular expression for the whole names of modules in the file; the others are left
            out.
        prefix: modules that LoHa cannot hold are refused only where their names begin so.
        loader: the function of `loha_jax.interop` that reads it, for messages; "" for a command.

    Returns:
        The tensors as they are in the file, in its dtype. LyCORIS' alpha is the rank where the file
        has none or 0, as in kohya's scripts, ComfyUI and PEFT's converter. LoRA modules of a file
        are of kind "lora". Token embeddings bundled with the weights (`bundle_emb.…`) are in
        `embeddings`, and no caller can put them into a model.

    Raises:
        FileNotFoundError: there is no such file, or the folder has no adapter.
        FileError: it is corrupted, or holds another kind of adapter, or modules of another kind
            that `only` does not leave out; the message names the key.
        ValueError: two of `modules` have the same name in the file, which writes their dots as
            underscores; or no module has a name that `only` matches.

    Example:
        >>> import tempfile, jax, loha_jax
        >>> config = loha_jax.LoHaConfig(r=2, target_modules=["q"])
        >>> base = {"a": {"q": {"kernel": jax.numpy.ones((3, 3))}}}
        >>> params = loha_jax.inject(base, config, key=jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = f"{folder}/adapter.safetensors"
        ...     loha_jax.interop.save_lycoris(path, params)
        ...     read_adapter(path, modules=["a.q"]).modules["lycoris_a_q"].name
        'a.q'
    """
    with hints(path, loader):
        adapter = _read(Path(path), None if modules is None else ModuleNames(modules))
        if only is not None:
            adapter = _chosen(adapter, only)
        foreign = {own: f for own, f in adapter.foreign.items() if own.startswith(prefix)}
        known = dict.fromkeys((*adapter.modules, *(module_of(key) for key in adapter.others)))
        if foreign:
            raise FileError(f"{path}: {foreign_message(foreign, known)}")
        if not known:
            bundled = f"only token embeddings ({', '.join(adapter.embeddings)})"
            held = bundled if adapter.embeddings else "no adapter"
            raise FileError(f"{path}: the file holds {held}")
    return adapter


def read_lycoris(
    path: str | Path, *, only: str | None = None, prefix: str | None = None
) -> AdapterFile:
    """Read a file of LyCORIS, kohya or diffusers; see `read_adapter`.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: see `read_adapter`; or it is an adapter of another format.
    """
    with hints(path, "load_lycoris"):
        adapter = read_adapter(path, only=only, prefix=prefix or "", loader="load_lycoris")
        if adapter.form not in ("lycoris", "kohya"):
            raise FileError(f"{path} is no file of LyCORIS or kohya")
    return adapter


def read_everything(path: str | Path, *, modules: Iterable[str] | None = None) -> AdapterFile:
    """Read everything in a file, also modules that LoHa cannot hold; see `read_adapter`."""
    with hints(path):
        return _read(Path(path), None if modules is None else ModuleNames(modules))


def _read(path: Path, names: ModuleNames | None) -> AdapterFile:
    if path.is_dir() and has_peft_config(path):
        return _read_peft(path)
    file = find_adapter_file(path) if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"There is no adapter at '{path}'")
    state, metadata = read_tensors(file), read_metadata(file)
    try:
        adapter = _lycoris(path, state, metadata, names)
        if without := [own for own in adapter.modules if f"{own}.alpha" not in state]:
            _check_scale(file, {adapter.modules[own].r for own in without}, without[0])
        return adapter
    except FileError as error:
        raise FileError(f"{file}: {error}") from error


def _check_scale(file: Path, ranks: set[int], example: str) -> None:
    """Raise FileError where a configuration scales modules without alpha by another number than 1.

    Args:
        file: of the adapter.
        ranks: of its modules without alpha.
        example: the name of one of these.
    """
    said = header_config(file)
    place, beside = f"its header ({DIFFUSERS_CONFIG_KEY})", file.parent / _LYCORIS_CONFIG
    if not said and file.name == DIFFUSERS_NAME and beside.is_file():
        said, place = read_json(beside), str(beside)
    alphas: dict[str, object] = {}
    odd: list[str] = []
    for key, value in said.items():
        last = key.rpartition(".")[2]
        if last in _ALPHAS and value is not None:
            alphas[key] = value
            odd += [key] * (not isinstance(value, int | float))
        elif last in ("alpha_pattern", "use_rslora") and value:
            odd.append(key)
    if odd or (alphas and set(alphas.values()) != ranks):
        shown = ", ".join(f"{key}={said[key]!r}" for key in dict.fromkeys((*alphas, *odd)))
        raise FileError(
            f"{example} has no alpha of its own, and {place} says {shown} for modules of rank "
            f"{', '.join(map(str, sorted(ranks)))}: how the updates are scaled cannot be told from "
            "the file. Add a tensor `<module>.alpha` for each module, or give PEFT's folder with "
            "its adapter_config.json"
        )


def _chosen(adapter: AdapterFile, only: str) -> AdapterFile:
    """Return the modules whose whole names match a pattern, with what belongs to them."""
    try:
        matches = re.compile(only).fullmatch
    except re.error as error:
        raise ValueError(f"`only=` {only!r} is not a regular expression: {error}") from error
    chosen = dataclasses.replace(
        adapter,
        modules={own: m for own, m in adapter.modules.items() if matches(own)},
        others={key: value for key, value in adapter.others.items() if matches(module_of(key))},
        foreign={own: f for own, f in adapter.foreign.items() if matches(own)},
        embeddings={},
    )
    if not (chosen.modules or chosen.others or chosen.foreign):
        own = list(adapter.modules)
        raise ValueError(
            f"{adapter.path} has no module whose whole name in the file matches `only=` {only!r}; "
            f"it has {', '.join(own[:5])}{', …' if len(own) > 5 else ''}"
        )
    return chosen


def module_of(key: str) -> str:
    """Return the module that a tensor of `AdapterFile.others` belongs to."""
    return split_parameter(key)[0]


def split_parameter(key: str) -> tuple[str, str]:
    """Return the module and the parameter, also of an adapted module's base layer."""
    if base_layer := _BASE_LAYER.fullmatch(key):
        return base_layer[1], base_layer[2]
    module, _, parameter = key.rpartition(".")
    return module, parameter


def _lycoris(
    path: Path, state: dict[str, np.ndarray], metadata: dict[str, str], names: ModuleNames | None
) -> AdapterFile:
    found: dict[str, AdapterModule] = {}
    others: dict[str, np.ndarray] = {}
    groups = group_keys(state)
    for own, parts in groups.modules.items():
        others |= {f"{own}.{part}": t for part, t in parts.items() if part in PARAMETER_OF}
        factors = {part: tensor for part, tensor in parts.items() if part not in PARAMETER_OF}
        # The alpha of a whole layer's difference has no effect.
        without_effect = {"alpha"} if "diff" in parts or "diff_b" in parts else set[str]()
        if len(factors) < len(parts) and factors.keys() <= without_effect:
            continue
        if mixed := [part for part in ("w_norm", "b_norm") if part in parts]:
            odd = sorted(parts.keys() - {*NORM_PARTS.values()})[0]
            raise FileError(
                f"{own} has both {odd} and the differences of a normalisation layer ({mixed[0]})"
            )
        if "diff" in parts and "dora_scale" in parts:
            raise FileError(f"{own} has a dora_scale and the difference of its whole weight (diff)")
        prefix, name = split_prefix(own)
        name = (names and names.find(prefix, name)) or name
        found[own] = dataclasses.replace(read_module(own, factors), name=name, prefix=prefix)
    form = "kohya" if any(own.startswith(KOHYA_PREFIX) for own in groups.modules) else "lycoris"
    return AdapterFile(path, form, found, others, {}, metadata, groups.foreign, groups.embeddings)


def _config(values: Mapping[str, Any]) -> LoHaConfig | dict[str, Any]:
    """Return the config of a LoHa, or the fields of one of a LoRA."""
    is_lora = values.get("peft_type") == "LORA"
    return check_lora_config(values) if is_lora else LoHaConfig.from_dict(values)


def _read_peft(folder: Path) -> AdapterFile:
    config, state, path = read_folder(folder, _config)
    if isinstance(config, dict):
        file = lora_file(config, state, path)
    else:
        with errors_about(path):
            file = peft_file(config, state, path)
            check_peft_file(file)
    return dataclasses.replace(file, path=folder)
