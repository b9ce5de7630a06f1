"""From PEFT to JAX and back in ten lines: an adapter of PyTorch PEFT goes on training in JAX.

Where torch and peft are installed, PEFT makes the adapter here, for a tiny Llama with random
weights, and opens it again in the end; without them it is one of the adapters in tests/data/peft,
which PEFT wrote. The text is Python's documentation. The model is far too small to write; what the
losses show is that nothing is lost on the way.

    python examples/from_peft.py [--quick]

It takes 2.5 minutes on two cores (--quick: 10 s). It needs `pip install -e ".[examples]"`.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from common import missing, run_example, show_results
from report import console
from transformers import FlaxLlamaForCausalLM, LlamaConfig

import loha_jax
from loha_jax import interop  # pyright: ignore[reportAttributeAccessIssue]  # pyright sees loha_jax/ alone
from loha_jax.train import fit

SIDE_BY_SIDE = """
  PEFT                                                loha-jax
  model = LlamaForCausalLM.from_pretrained(base)      params = interop.load_base(base, shapes, …)
  model = PeftModel.from_pretrained(model, folder,    params = interop.load_peft(folder, params)
                                    is_trainable=True)
  [p for p in model.parameters() if p.requires_grad]  trainable, frozen = loha_jax.partition(params)
  model(ids).logits                                   loha_jax.adapt(apply)(params, ids)
  model.save_pretrained(folder)                       interop.save_peft(folder, params)
"""
SAMPLE = Path(__file__).parents[1] / "tests" / "data" / "peft" / "llama_default_targets"
RATE, BATCH, LENGTH = 1e-2, 16, 24


def batches(vocabulary: int, count: int, seed: int, held_out: bool = False) -> list[np.ndarray]:
    """Stretches of text, [BATCH, LENGTH]: bytes modulo the vocabulary; a fifth is held out."""
    text = (
        np.frombuffer("\n".join(pydoc_data.topics.topics.values()).encode(), np.uint8).astype(
            np.int32
        )
        % vocabulary
    )
    text = np.split(text, [len(text) * 4 // 5])[held_out]
    starts = np.random.default_rng(seed).integers(0, len(text) - LENGTH, (count, BATCH, 1))
    return list(text[starts + np.arange(LENGTH)])


def train_in_peft(folder: Path, steps: int, seed: int) -> tuple[Path, Path]:
    """A tiny PyTorch Llama and a PEFT LoHa adapter, briefly trained; the folders of both."""
    import torch
    from peft import LoHaConfig, get_peft_model
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    sizes: Any = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=256, initializer_range=0.1, **sizes))
    model.save_pretrained(folder / "base")
    targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
    model = get_peft_model(
        model, LoHaConfig(r=8, alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    )
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for batch in batches(256, steps, seed):
        ids = torch.tensor(batch, dtype=torch.int64)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "from_peft")
    return folder / "base", folder / "from_peft"


def run_in_torch(base: Path, adapter: Path | None, ids: np.ndarray) -> tuple[float, np.ndarray]:
    """Loss and logits of the model, with an adapter that PEFT opens or without, in PyTorch."""
    import torch
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(base)
    model = (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()
    tokens = torch.tensor(ids, dtype=torch.int64)
    with torch.inference_mode():
        output = model(tokens, labels=tokens)
    return float(output.loss), output.logits.numpy()


def run(options: argparse.Namespace) -> None:
    """PEFT, JAX, PEFT."""
    steps = 30 if options.quick else 300
    with_peft = not missing()
    if with_peft:
        base_folder, adapter = train_in_peft(options.out, steps, options.seed)
    else:
        base_folder, adapter = SAMPLE / "base.safetensors", SAMPLE / "adapter"
    config_file = base_folder / "config.json" if with_peft else SAMPLE / "base_config.json"
    print(SIDE_BY_SIDE)

    config = LlamaConfig(**json.loads(config_file.read_text(encoding="utf-8")))
    model: Any = FlaxLlamaForCausalLM(config, _do_init=False)
    # -- In ----------------------------------------------------------------------------------------
    names = interop.NameMap.transformers()
    base = interop.load_base(base_folder, model.params_shape_tree, names=names)
    arrived = interop.load_peft(adapter, base, names=names)
    apply = loha_jax.adapt(lambda params, ids: model(ids, params=params).logits)  # no ΔW is built
    # ----------------------------------------------------------------------------------------------
    print(loha_jax.summary(arrived).totals)

    def loss_fn(params: Any, ids: Any, key: jax.Array | None = None) -> jax.Array:
        logits, labels = apply(params, ids)[:, :-1], ids[:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    data = batches(config.vocab_size, steps, options.seed + 1)
    key = jax.random.key(options.seed)
    continued = fit(loss_fn, arrived, optax.adam(RATE), data, key=key).params
    # -- And out -----------------------------------------------------------------------------------
    interop.save_peft(options.out / "from_jax", continued)
    # ----------------------------------------------------------------------------------------------
    console.print(f"Saved as PEFT saves it: {options.out / 'from_jax'}")

    held_out = np.concatenate(batches(config.vocab_size, 16, options.seed, held_out=True))
    states = {
        "frozen base": (base, None),
        "as it came from PEFT": (arrived, adapter),
        f"after {steps} steps in JAX": (continued, options.out / "from_jax"),
    }
    rows = []
    for name, (params, folder) in states.items():
        row: list[Any] = [name, float(jax.jit(loss_fn)(params, held_out)), None, None]
        if with_peft:
            row[2], logits = run_in_torch(base_folder, folder, held_out)
            row[3] = float(np.abs(logits - jax.jit(apply)(params, held_out)).max())
        rows.append(row)
    if not with_peft:
        console.print(f"To have PEFT make and open the adapter: pip install {missing()}")
    title = f"Loss on held-out text, nats per byte (seed {options.seed})"
    head = ["", "JAX", "PyTorch", "largest difference of a logit"]
    show_results(options.out / "results.json", title, head, rows)


if __name__ == "__main__":
    run_example(run, __doc__, "from_peft")
