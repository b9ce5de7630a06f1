"""An adapter file as an Orbax checkpoint: its tensors as a tree, and what else there is to know as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from loha_jax.interop.disk.atomic import write_atomically
from loha_jax.interop.disk.tensor_files import FileError
from loha_jax.interop.formats.adapter_file import AdapterFile, AdapterModule

from loha_jax.runtime.untrusted import read_json

DESCRIPTION_NAME = "loha_adapter.json"
TENSORS_NAME = "tensors"
_FORMAT = 1


def is_orbax_folder(path: str | Path) -> bool:
    """Whether a folder is one that `write_orbax` made."""
    return (Path(path) / DESCRIPTION_NAME).is_file()


def write_orbax(folder: Path, adapter: AdapterFile) -> None:
    """Writes an adapter into a folder that is not there yet: a PyTree checkpoint in `tensors`, and a JSON file.

    The tree is `{module: {"hada_w1_a": array, …, "dora_scale": array}}` under "modules", and `{key: array}` under
    "others".

    Example:
        >>> import tempfile
        >>> module = AdapterModule("q", "lora", 1, 1.0, {"lora_A": np.ones((1, 3)), "lora_B": np.ones((2, 1))})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_orbax(Path(folder, "new"), AdapterFile(Path("x"), "lora", {"q": module}, {}, {}, {}))
        ...     read_orbax(Path(folder, "new")).modules["q"].tensors["lora_A"].tolist()
        [[1.0, 1.0, 1.0]]
    """
    import orbax.checkpoint as ocp

    tree = {"modules": {own: m.arrays for own, m in adapter.modules.items()}, "others": dict(adapter.others)}
    folder.mkdir(parents=True)
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save((folder / TENSORS_NAME).absolute(), {name: part for name, part in tree.items() if part})
    description = {
        "format": _FORMAT,
        "form": adapter.form,
        "modules": {
            own: {"name": m.name, "kind": m.kind, "r": m.r, "alpha": m.alpha, "prefix": m.prefix}
            for own, m in adapter.modules.items()
        },
        "config": adapter.config,
        "metadata": adapter.metadata,
    }
    write_atomically(folder / DESCRIPTION_NAME, json.dumps(description, indent=2).encode())


def read_orbax(folder: str | Path) -> AdapterFile:
    """Reads what `write_orbax` wrote; `form` is "orbax".

    Raises:
        FileError: the folder is not whole.
    """
    import orbax.checkpoint as ocp

    folder = Path(folder)
    try:
        description = read_json(folder / DESCRIPTION_NAME)
        if description["format"] != _FORMAT:
            raise FileError(f"{folder / DESCRIPTION_NAME} is of format {description['format']!r}, not {_FORMAT}")
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree: dict[str, Any] = checkpointer.restore((folder / TENSORS_NAME).absolute())
        tensors = {own: {part: np.asarray(t) for part, t in parts.items()} for own, parts in tree["modules"].items()}
        if tensors.keys() != description["modules"].keys():
            raise FileError(f"{folder}: {DESCRIPTION_NAME} and the checkpoint do not name the same modules")
        modules = {}
        for own, said in description["modules"].items():
            norms = tensors[own].pop("dora_scale", None)
            modules[own] = AdapterModule(**said, tensors=tensors[own], dora_scale=norms)
        others = {key: np.asarray(t) for key, t in tree.get("others", {}).items()}
        return AdapterFile(folder, "orbax", modules, others, description["config"], description["metadata"])
    except (KeyError, TypeError, AttributeError, OSError, ValueError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{folder} is not a whole adapter in Orbax' form: {error!r:.300}") from error
