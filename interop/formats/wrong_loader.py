"""Recognises what is at a path, for errors of functions and commands that open something else."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import NamedTuple

from loha_jax.runtime.untrusted import FileError, json_object, read_json
from loha_jax.targets.config import CONFIG_NAME

from ..disk.base_checkpoint import Checkpoint
from ..disk.paired_files import DIFFUSERS_NAME, find_adapter_file, pending_or_own
from ..disk.tensor_files import TORCH_SUFFIXES, read_metadata
from .lycoris_keys import are_adapters
from .peft_names import BIN_NAME, PREFIX, SAFETENSORS_NAME

DIFFUSERS_CONFIG_KEY = "lora_adapter_metadata"


class Kind(NamedTuple):
    """A description of what is at a path.

    Attributes:
        name: as it stands after "is".
        loader: the function that opens it, "" where there is none.
        advice: what to do, where naming the loader does not say it.
    """

    name: str
    loader: str
    advice: str = ""


_PEFT_KINDS = {
    "LOHA": Kind("a PEFT folder of a LoHa", "load_peft"),
    "LORA": Kind("a PEFT folder of a LoRA", "load_lora"),
}
_BARE_FILE = "a file of PEFT's without its settings"
_BARE_FOLDER = Kind("a PEFT folder without its settings", "", f"put its {CONFIG_NAME} into it")
_CHECKPOINT = Kind("the checkpoint of a model and not an adapter", "load_base")


def kind_of(path: str | Path) -> Kind | None:
    """Tell what is at a path by names and headers only; None if that cannot be told."""
    path = Path(path)
    try:
        return _folder_kind(path) if path.is_dir() else _file_kind(path)
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def hints(path: str | Path, loader: str = "") -> Generator[None]:
    """Add a description of the path to errors from the block, if another function opens it.

    Args:
        path: what was given.
        loader: the function that it was given to; "" for a command, whose user knows no functions.
    """
    try:
        yield
    except (FileError, FileNotFoundError) as error:
        raise _with_hint(error, path, loader) from error


def has_peft_config(folder: Path) -> bool:
    """Return whether a folder has PEFT's configuration, in a file or in a header."""
    if pending_or_own(folder, CONFIG_NAME).is_file():
        return True
    diffusers = folder / DIFFUSERS_NAME
    return diffusers.is_file() and "peft_type" in header_config(diffusers)


def header_config(file: Path) -> dict[str, object]:
    """Return the configuration that diffusers keeps in the header of an adapter's file, or {}.

    Raises:
        FileError: it is not a JSON object.
    """
    text = read_metadata(file).get(DIFFUSERS_CONFIG_KEY)
    return {} if text is None else json_object(text, f"{file}: the adapter configuration")


def _with_hint(error: Exception, path: str | Path, loader: str) -> Exception:
    kind = kind_of(path)
    if kind is None or (loader and kind.loader == loader and not kind.advice):
        return error
    if not loader and kind.loader not in ("", "load_base"):
        return error  # every command opens every adapter
    advice = kind.advice or (
        f"`{kind.loader}` opens it" if kind.loader else "loha_jax does not read it"
    )
    said = f"'{path}' is {kind.name}" + (f"; {advice}" if loader or kind.advice else "")
    text = str(error).rstrip(".")
    return error if said in text else type(error)(f"{text}. {said}")


def _folder_kind(folder: Path) -> Kind | None:
    if has_peft_config(folder):
        config = pending_or_own(folder, CONFIG_NAME)
        values = read_json(config) if config.is_file() else header_config(folder / DIFFUSERS_NAME)
        kind = values.get("peft_type")
        return _PEFT_KINDS.get(str(kind)) or Kind(f"an adapter of PEFT's {kind!r}", "")
    if any(folder.glob("*.safetensors.index.json")):
        return _CHECKPOINT
    kind = _file_kind(find_adapter_file(folder))
    return _BARE_FOLDER if kind and kind.name == _BARE_FILE else kind


def _file_kind(file: Path) -> Kind | None:
    if file.name in (BIN_NAME, SAFETENSORS_NAME):
        return _peft_file(file)
    if file.suffix in TORCH_SUFFIXES:
        advice = "`load_lycoris` opens it if it holds only an adapter's tensors"
        return Kind("a torch pickle", "load_lycoris", advice)
    keys = list(Checkpoint(file).shapes)
    if any(key.startswith(PREFIX) for key in keys):
        return _peft_file(file)
    if are_adapters(keys):
        return Kind("an adapter's file of LyCORIS, kohya or diffusers", "load_lycoris")
    return _CHECKPOINT if keys else None


def _peft_file(file: Path) -> Kind:
    if has_peft_config(file.parent):
        return Kind(_BARE_FILE, "", f"give its folder, '{file.parent}'")
    return Kind(_BARE_FILE, "", f"put its {CONFIG_NAME} beside it, and give the folder")
