"""`AdapterFile`: an adapter of any format, module by module and without a model.

Every reader returns one, every writer takes one, and `exchange` turns them into trees and back.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from loha_jax.runtime.untrusted import FileError


@dataclasses.dataclass(frozen=True)
class AdapterModule:
    """One module of an adapter, in torch's orientation.

    Attributes:
        name: torch's dotted module name; or the file's own after the prefix, where nothing says
            which dots its underscores stand for.
        kind: "loha" or "lora".
        r, alpha: of the module; its update is scaled by alpha/r.
        tensors: "loha": `hada_*` in PEFT's shapes (the core of a Conv1d with its trailing 1).
            "lora": `lora_A` `[r, in, *spatial]` and `lora_B` `[out, r]` (with 1s for spatial axes;
            of a convolution in groups, in is that of all groups and r that of one).
        dora_scale: norms of a weight decomposition, `[out, 1, ...]` or `[1, in, 1, ...]`, or None.
        prefix: what the file writes before the name: LyCORIS' and kohya's `lycoris_`, `lora_unet_`,
            `lora_te1_`, `diffusion_model.`, …, one per component (a UNet, a text encoder); "" in
            PEFT's folders.
        in_shape: `(in, *spatial)` of a convolution, where the file shows it, or None. PEFT's does
            not: flat factors are matrices, and the core of a Conv1d is that of a Conv2d.
    """

    name: str
    kind: str
    r: int
    alpha: float
    tensors: dict[str, np.ndarray]
    dora_scale: np.ndarray | None = None
    prefix: str = ""
    in_shape: tuple[int, ...] | None = None

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays of the module by the ends of their keys."""
        extra = {} if self.dora_scale is None else {"dora_scale": self.dora_scale}
        return {**self.tensors, **extra}


class Foreign(NamedTuple):
    """A module that is no LoHa and cannot become one.

    Attributes:
        kind: "LoKr", "OFT", …; "" where its keys are not known.
        key: one of its keys, which shows the kind.
        tensors: all of its tensors by their keys.
    """

    kind: str
    key: str
    tensors: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """An adapter read from a file or folder.

    Attributes:
        path: what was read; of a PEFT folder that is loaded, the file in it that holds the tensors.
        form: "peft" (a LoHa folder), "lora" (a PEFT LoRA folder), "lycoris" or "kohya" (one file);
            "tree" (modules that were read off a tree).
        modules: by the name that the file itself has for them, with the prefix.
        others: other tensors by their keys, without PEFT's prefix: parameters of `modules_to_save`,
            `base_layer`s, LyCORIS' differences (of norm layers, `<module>.w_norm`,
            `<module>.b_norm`; of others, `.diff`, `.diff_b`).
        config: the parsed `adapter_config.json`, or {} where the format has none.
        metadata: the strings in the file's header.
        foreign: modules that LoHa cannot hold, by the file's name for them; `read_adapter` refuses
            them.
        embeddings: token embeddings that are bundled with the weights, by their keys.
        keys: PEFT's formats: the file's own keys by the names of `peft_tensors` and of `others`,
            for messages.
    """

    path: Path
    form: str
    modules: dict[str, AdapterModule]
    others: dict[str, np.ndarray]
    config: dict[str, Any]
    metadata: dict[str, str]
    foreign: dict[str, Foreign] = dataclasses.field(default_factory=dict[str, Foreign])
    embeddings: dict[str, np.ndarray] = dataclasses.field(default_factory=dict[str, np.ndarray])
    keys: dict[str, str] = dataclasses.field(default_factory=dict[str, str])

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by their keys: those of the modules, then the others."""
        own = {
            f"{own}.{part}": array
            for own, module in self.modules.items()
            for part, array in module.arrays.items()
        }
        return {**own, **self.others}


def times_core(core: np.ndarray, w_b: np.ndarray) -> np.ndarray:
    """Return a core `[r, r, *spatial]` times a right factor `[r, in]`: `[r, in, *spatial]`."""
    return np.einsum("pq...,qi->pi...", core, w_b)


@contextlib.contextmanager
def errors_about(path: str | Path) -> Generator[None]:
    """Re-raise any ValueError from the block as a `FileError` with `path` in its message."""
    try:
        yield
    except ValueError as error:
        raise FileError(f"{path}: {error}") from error
