"""GPT-2's projections: transformers' own `Conv1D`, whose weights are [in, out]."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from loha_jax.lowrank.layout import Layout
from loha_jax.targets.default_layouts import is_input_first, is_torch_oriented

from ..disk.base_checkpoint import Checkpoint, read_config

GPT2_CONV1D = r"(.*\.)?(c_attn|q_attn|c_proj|c_fc)"

NO_LOHA_NOTE = (
    "PEFT has no LoHa for GPT-2's Conv1D and will not open this folder: merge the adapter, or "
    "convert it to lora"
)


def looks_like_conv1d(name: str) -> bool:
    """Return whether a module is called like GPT-2's projections."""
    return re.fullmatch(GPT2_CONV1D, name) is not None


def is_conv1d(name: str, path: Sequence[str], layout: Layout) -> bool:
    """Return whether a kernel is called like GPT-2's projections and has their order of axes.

    In Flax that is `oi`, while a Dense is `io`; under torch's names `io`, while a Linear is `oi`.

    Args:
        name: of the module in torch.
        path: of the kernel.
        layout: of the kernel.
    """
    turned = "io" if is_torch_oriented(path[-1]) else "oi"
    return layout.word == turned and looks_like_conv1d(name)


def conv1d_test(checkpoint: Checkpoint) -> Callable[[str], bool]:
    """Return a test by name for the modules of a checkpoint that are `Conv1D`.

    They are called like GPT-2's projections, and the config says GPT-2, or a bias as long as the
    second axis shows it. A square weight goes by those beside it.
    """
    if read_config(checkpoint.folder).get("model_type") in ("gpt2", "openai-gpt"):
        return looks_like_conv1d
    shape_at = {tuple(key.split(".")): shape for key, shape in checkpoint.shapes.items()}

    def test(name: str) -> bool:
        path = (*name.split("."), "weight")
        shape = shape_at.get(path, ())
        return looks_like_conv1d(name) and len(shape) == 2 and is_input_first(shape, path, shape_at)

    return test
