"""A script for an environment with PyTorch, PEFT and transformers: their side of the comparisons.

It reads commands from standard input, one JSON list a line, and prints `done` after each:

["checkpoint", FOLDER]              write transformers' Qwen3 with random weights
["logits", FOLDER, TOKENS, OUT]     compute the logits of a model; TOKENS and OUT are .npy
["logits", FOLDER, TOKENS, OUT, DIR]  with the adapter in DIR, opened by PEFT
["update", DIR, MODULE, OUT]        compute ΔW of a module of an adapter by PEFT
"""

import json
import sys
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from peft.tuners.loha.layer import make_weight
from safetensors.torch import load_file


def checkpoint(folder):
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rope_theta=1e6,  # tunix 0.1.7's, whatever its config says
        tie_word_embeddings=False,
        initializer_range=0.2,
        attn_implementation="eager",
    )
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)


def logits(folder, tokens, out, adapter=None):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        np.save(out, model.eval()(torch.tensor(np.load(tokens)).long()).logits.numpy())


def update(adapter, module, out):
    config = peft.PeftConfig.from_pretrained(adapter)
    tensors = load_file(Path(adapter) / "adapter_model.safetensors")
    factors = (
        tensors[f"base_model.model.{module}.hada_{part}"]
        for part in ("w1_a", "w1_b", "w2_a", "w2_b")
    )
    np.save(out, make_weight(*factors, scale=torch.tensor(config.alpha / config.r)).numpy())


COMMANDS = {"checkpoint": checkpoint, "logits": logits, "update": update}

if __name__ == "__main__":
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        COMMANDS[command](*arguments)
        print("done", flush=True)
