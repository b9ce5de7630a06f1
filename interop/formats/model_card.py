"""The README.md of an adapter's folder, with the front matter that the Hugging Face hub reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from loha_jax.targets.config import PEFT_VERSION

MODEL_CARD_NAME = "README.md"


def model_card(config: Mapping[str, Any]) -> str:
    """Return the text: PEFT's front matter (library, base model, task) and its block of versions.

    Args:
        config: the content of `adapter_config.json`, of a LoHa or a LoRA.

    Example:
        >>> from loha_jax import LoHaConfig
        >>> config = LoHaConfig(base_model_name_or_path="org/base", task_type="CAUSAL_LM")
        >>> print(model_card(config.to_dict()).split("---")[1].strip())
        base_model: "org/base"
        library_name: peft
        pipeline_tag: text-generation
        tags:
        - "base_model:adapter:org/base"
    """
    base = config["base_model_name_or_path"]
    is_lora = config["peft_type"] == "LORA"
    front = ["---"]
    if base:
        front.append(f"base_model: {json.dumps(base)}")  # a JSON string is a YAML one
    front.append("library_name: peft")
    if config["task_type"] == "CAUSAL_LM":
        front.append("pipeline_tag: text-generation")
    tags = [json.dumps(f"base_model:adapter:{base}")] if base else []
    if tags := [*tags, *(["lora"] if is_lora else [])]:
        front += ["tags:", *(f"- {tag}" for tag in tags)]
    front.append("---")
    on = f" of `{base}`" if base else ""
    kind = "LoRA" if is_lora else "LoHa"
    front += ["", f"# {kind} adapter{on}", ""]
    front += ["Trained with loha-jax; `PeftModel.from_pretrained` opens this folder."]
    front += ["", "### Framework versions", "", f"- PEFT {PEFT_VERSION}", ""]
    return "\n".join(front)
