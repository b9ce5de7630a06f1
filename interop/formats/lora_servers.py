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

_PROJECTIONS = r"(?:model\.)?layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)"


class LoraServer(NamedTuple):
    """A server that loads PEFT's LoRA folders.

    Attributes:
        title: its name in messages.
        ranks: what `--max-lora-rank` takes; empty where it takes any.
        modules: a regular expression of the names that it reads; None where the model that it
            serves says which these are.
    """

    title: str
    ranks: tuple[int, ...]
    modules: str | None


SERVERS = {
    "vllm": LoraServer("vLLM", (1, 8, 16, 32, 64, 128, 256, 320, 512), None),
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
        raise ValueError(f"{server.title} does not take {problem}. Merge the adapter instead")
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
    if server.modules is None:
        return
    for name in factors:
        if not re.fullmatch(server.modules, name):
            yield (
                f"{name}: it reads only model.layers.<n>.self_attn.{{q,k,v,o}}_proj and "
                "model.layers.<n>.mlp.{gate,up,down}_proj. Where it is one of these under another "
                "name, give inject names={regex: template}, or rename it in a saved adapter "
                "(`loha-jax convert SRC DST --to lora --names 'REGEX=TEMPLATE'`)"
            )
    if isinstance(config["target_modules"], str):
        yield (
            f"`target_modules` as a regular expression ({config['target_modules']}), which is "
            "needed as other modules' names end as these"
        )
