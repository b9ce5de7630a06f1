"""The README.md beside an adapter: what the Hugging Face hub reads of it, as PEFT writes it."""

from __future__ import annotations

import json

from loha_jax.config import PEFT_VERSION, LoHaConfig

MODEL_CARD_NAME = "README.md"


def model_card(config: LoHaConfig) -> str:
    """The text: PEFT's front matter (library, base model, task) and its block of versions.

    Example:
        >>> config = LoHaConfig(base_model_name_or_path="org/base", task_type="CAUSAL_LM")
        >>> print(model_card(config).split("---")[1].strip())
        base_model: "org/base"
        library_name: peft
        pipeline_tag: text-generation
        tags:
        - "base_model:adapter:org/base"
    """
    base = config.base_model_name_or_path
    front = ["---"]
    if base:
        front.append(f"base_model: {json.dumps(base)}")  # a JSON string is a YAML one
    front.append("library_name: peft")
    if config.task_type == "CAUSAL_LM":
        front.append("pipeline_tag: text-generation")
    if base:
        front += ["tags:", f"- {json.dumps(f'base_model:adapter:{base}')}"]
    front.append("---")
    on = f" of `{base}`" if base else ""
    text = f"# LoHa adapter{on}\n\nTrained with loha-jax; `PeftModel.from_pretrained` opens this folder.\n"
    return "\n".join(front) + f"\n\n{text}\n### Framework versions\n\n- PEFT {PEFT_VERSION}\n"
