"""`AdapterFile`: an adapter as it lies on disk, of whatever format, module by module and without a model.

The command line works on these; what needs a model's tree (`load_peft`, `load_lycoris`) does not.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class AdapterModule:
    """One module of an adapter, in torch's orientation.

    Attributes:
        name: torch's dotted module name; or the file's own, where nothing says which dots its underscores stand for.
        kind: "loha" or "lora".
        r, alpha: of the module; its update is scaled by alpha/r.
        tensors: "loha": `hada_*` in PEFT's shapes (the core of a Conv1d with its trailing 1). "lora": `lora_A`
            `[r, in, *spatial]` and `lora_B` `[out, r]` (with 1s for spatial axes).
        dora_scale: norms of a weight decomposition, `[out, 1, ...]` or `[1, in, 1, ...]`, or None.
    """

    name: str
    kind: str
    r: int
    alpha: float
    tensors: dict[str, np.ndarray]
    dora_scale: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """An adapter read from a file or folder.

    Attributes:
        path: what was read.
        form: "peft" (a LoHa folder), "lora" (a PEFT LoRA folder), "lycoris" or "kohya" (one file), or "orbax".
        modules: by name.
        others: other tensors by their keys, without PEFT's prefix: parameters of `modules_to_save`, `base_layer`s,
            LyCORIS' norm layers (`<module>.w_norm`, `<module>.b_norm`).
        config: the parsed `adapter_config.json`, or {} where the format has none.
        metadata: the strings in the file's header.
    """

    path: Path
    form: str
    modules: dict[str, AdapterModule]
    others: dict[str, np.ndarray]
    config: dict[str, Any]
    metadata: dict[str, str]
