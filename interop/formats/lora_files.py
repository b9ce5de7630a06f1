"""PEFT's LoRA folders as they are, and files of kohya and diffusers, without a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from loha_jax.runtime.scalars import one_of
from loha_jax.runtime.untrusted import FileError

from ..disk.tensor_files import check_finite, read_metadata
from .adapter_file import AdapterFile, AdapterModule, errors_about
from .lora_config import check_lora_config, like_loha, rank_and_alpha
from .lycoris_files import KOHYA_PARTS, KOHYA_PREFIX, file_bytes, module_key
from .peft_files import read_folder, torch_name
from .peft_names import PREFIX
from .ranks import check_floating, check_present, misfit, shown_shapes
from .wrong_loader import hints

# The adapter's name stands in the keys of a model's state dict, not in those of a file.
_KEYS = re.compile(
    r"(?P<module>.+)\.(?:(?P<factor>lora_[AB])(?:\.[^.]+)?\.weight"
    r"|(?P<norms>lora_magnitude_vector)(?:\.[^.]+){0,2})"
)
LORA_FILES = ("kohya", "diffusers")
"""The forms of a LoRA in one file."""

_OTHER_PART = re.compile(r"(?:^|\.)(lora_\w+)")


def read_lora(folder: str | Path) -> AdapterFile:
    """Read a folder that PEFT wrote for a LoRA (or DoRA) adapter; see `lora_file`.

    Raises:
        FileNotFoundError: there is no config or no weights.
        FileError: they are corrupted, hold NaN or infinity, do not fit each other, or are a variant
            of LoRA that LoHa has no counterpart of.
    """
    with hints(folder, "load_lora"):
        values, state, path = read_folder(Path(folder), check_lora_config)
        check_finite(state, path)
        return lora_file(values, state, path)


def lora_file(values: dict[str, Any], state: Mapping[str, np.ndarray], path: Path) -> AdapterFile:
    """Return the adapter of a folder that has been read.

    The tensors are as they are in the file. Rank stabilisation (`use_rslora`) is folded into alpha,
    and DoRA's magnitudes have the shape of LyCORIS' norms. `r` and `alpha` follow the config's
    patterns.

    Args:
        values: from `check_lora_config`.
        state: the tensors by the file's keys.
        path: of the file that held them.
    """
    parts_of: dict[str, dict[str, np.ndarray]] = {}
    others: dict[str, np.ndarray] = {}
    keys: dict[str, str] = {}
    for key, tensor in state.items():
        name = torch_name(key)
        if found := _KEYS.fullmatch(name):
            part = found["factor"] or found["norms"]
            parts_of.setdefault(found["module"], {})[part] = tensor
            keys[f"{found['module']}.{part}{'.weight' if found['factor'] else ''}"] = key
        elif other := _OTHER_PART.search(name):
            raise FileError(
                f"{path}: {key} ({other[1]}) belongs to a variant of LoRA that LoHa has no "
                "counterpart of"
            )
        else:
            others[name], keys[name] = tensor, key
    if not parts_of:
        raise FileError(f"{path} has no lora_A and lora_B")
    config = like_loha(values)
    modules: dict[str, AdapterModule] = {}
    with errors_about(path):
        for name, parts in parts_of.items():
            r, alpha = rank_and_alpha(values, config, name)
            modules[name] = _module(name, parts, r, alpha, bool(values.get("use_dora", False)))
    return AdapterFile(path, "lora", modules, others, values, read_metadata(path), keys=keys)


def _module(
    name: str, parts: dict[str, np.ndarray], r: int, alpha: float, use_dora: bool
) -> AdapterModule:
    wanted = ("lora_A", "lora_B", *(("lora_magnitude_vector",) if use_dora else ()))
    check_present(name, parts, wanted)
    if len(parts) > len(wanted):
        raise FileError(
            f"{name} has a lora_magnitude_vector, and adapter_config.json does not say use_dora"
        )
    check_floating(name, parts)
    tensors = {part: parts[part] for part in ("lora_A", "lora_B")}
    a, b = (tensor.shape for tensor in tensors.values())
    shown = shown_shapes(tensors)
    fits = len(a) == len(b) >= 2 and 0 not in (*a, *b) and set(b[2:]) <= {1} and a[0] % b[1] == 0
    groups = a[0] // b[1] if fits else 0
    if not fits or b[0] % groups or a[1] % groups or (groups > 1 and len(a) == 2):
        raise misfit(name, tensors)
    if a[0] != r:
        raise FileError(
            f"the factors of {name} have rank {a[0]} ({shown}), adapter_config.json says {r}"
        )
    if not use_dora:
        return AdapterModule(name, "lora", r, alpha, tensors)
    norms = parts["lora_magnitude_vector"]
    if groups > 1 or norms.size != b[0] or norms.shape not in ((b[0],), (1, b[0], *b[2:])):
        raise FileError(
            f"{name} does not fit its lora_magnitude_vector {list(norms.shape)}: {shown}"
        )
    return AdapterModule(name, "lora", r, alpha, tensors, norms.reshape(b[0], *(1,) * (len(b) - 1)))


def check_form(form: str, prefix: str | None) -> None:
    """Raise ValueError for a form that there is not, or a prefix that it does not take."""
    one_of("`form`", form, ("peft", *LORA_FILES))
    if form == "peft" and prefix is not None:
        raise ValueError('`prefix=` is for `form="kohya"` and `form="diffusers"`')
    if form == "diffusers" and not (prefix or "").endswith("."):
        raise ValueError(
            '`form="diffusers"` needs the part of the model and a dot as `prefix=`, such as '
            f'"unet." or "transformer."; got {prefix!r}'
        )
    module_key(prefix or "", "")


def single_file(form: str, prefix: str | None, tensors: Mapping[str, np.ndarray]) -> bytes:
    """Return the content of kohya's or diffusers' file of a LoRA.

    Args:
        form: one of `LORA_FILES`.
        prefix: of all keys, by `check_form`; None for kohya's default.
        tensors: by PEFT's keys, with alpha = r in every module.

    Raises:
        ValueError: a file has no place for a tensor, or two modules would have one name.
    """
    prefix = f"{KOHYA_PREFIX}unet_" if prefix is None else prefix
    state: dict[str, np.ndarray] = {}
    for key, tensor in tensors.items():
        found = _KEYS.fullmatch(key.removeprefix(PREFIX))
        if found is None or found["factor"] is None:
            raise ValueError(
                f"A LoRA file of {form} has no place for {key}: write a folder of PEFT, or merge "
                "the adapter"
            )
        part = f"{found['factor']}.weight"
        own = f"{module_key(prefix, found['module'])}."
        if form == "kohya":
            part = f"{KOHYA_PARTS[found['factor']]}.weight"
        if own + part in state:
            raise ValueError(
                f"{found['module']} and another module would both be {own[:-1]!r} in the file: "
                "give a `prefix=` that ends with a dot"
            )
        state[own + part] = tensor
        if found["factor"] == "lora_A":
            a, b = tensor, tensors[f"{key.removesuffix('lora_A.weight')}lora_B.weight"]
            if len(a) != b.shape[1]:
                raise ValueError(
                    f"{found['module']} is a convolution in groups, which a LoRA file of {form} "
                    "cannot hold: write a folder of PEFT, or merge the adapter"
                )
            if form == "kohya":
                state[f"{own}alpha"] = np.array(len(a), np.float32)
    return file_bytes(state, {}, [])
