"""What LoRA servers take, by the rules of their own loaders.

vLLM: `lora/peft_helper.py`, `lora/lora_model.py` and `config/lora.py`. sglang-jax:
`srt/lora/lora_config.py` and `srt/lora/lora_memory_pool.py`. Both read one scaling, `lora_alpha /
r`, for all modules, and no patterns: ours is 1 everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from loha_jax.runtime.scalars import one_of

from .peft_names import PREFIX

_PROJECTIONS = frozenset(
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
)


class LoraServer(NamedTuple):
    """A server that loads PEFT's LoRA folders.

    Attributes:
        title: its name in messages.
        ranks: what `--max-lora-rank` takes; empty where it takes any.
        modules: the last parts of the names that it knows; empty where it knows all linear layers.
    """

    title: str
    ranks: tuple[int, ...]
    modules: frozenset[str]


SERVERS = {
    "vllm": LoraServer("vLLM", (1, 8, 16, 32, 64, 128, 256, 320, 512), frozenset()),
    "sglang": LoraServer("sglang-jax", (), _PROJECTIONS),
}


def find_server(name: str) -> LoraServer:
    """Return a server; raise ValueError for a name that is not one."""
    return SERVERS[one_of("`server`", name, tuple(SERVERS))]


def server_option(
    server: LoraServer, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> str:
    """Return the option that the server has to be started with, for a LoRA folder.

    Args:
        server: from `find_server`.
        config: the content of `adapter_config.json`.
        tensors: by PEFT's keys.

    Raises:
        ValueError: the server would refuse the folder, or leave a part of it out in silence.
    """
    factors = {
        key.removeprefix(PREFIX).removesuffix(".lora_A.weight"): tensor
        for key, tensor in tensors.items()
        if key.endswith(".lora_A.weight")
    }
    if problem := next(_problems(server, config, factors), None):
        raise ValueError(f"{server.title} does not take {problem}; merge the adapter instead")
    rank = next((most for most in server.ranks if most >= config["r"]), config["r"])
    return f"--max-lora-rank {rank}"


def _problems(
    server: LoraServer, config: Mapping[str, Any], factors: Mapping[str, np.ndarray]
) -> Iterator[str]:
    """Yield what the server has no place for."""
    if config["use_dora"]:
        yield "a weight decomposition (DoRA)"
    if config["modules_to_save"]:
        yield f"modules_to_save ({', '.join(config['modules_to_save'])})"
    if solid := [name for name, tensor in factors.items() if tensor.ndim > 2]:
        yield f"convolutions ({', '.join(solid)})"
    if not server.modules:
        return
    seen: dict[tuple[str, str], str] = {}
    for name in factors:
        layer, last = re.search(r"(?:^|\.)layers\.(\d+)\.", name), name.rpartition(".")[2]
        if layer is None or last not in server.modules:
            yield (
                f"{name}: it reads {', '.join(sorted(server.modules))} of `layers.<number>` alone"
            )
        elif (other := seen.setdefault((layer[1], last), name)) != name:
            yield f"{other} and {name}, which it takes for one"
