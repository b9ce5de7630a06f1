"""Fine-tunes tunix' Qwen3 with LoHa by tunix' own trainer, and saves the adapter for PEFT.

    python examples/trainers/tunix_sft.py [--steps N] [--out DIR]

The model is a tiny one with random weights. With real ones, the lines marked with (*) are others.

It takes about a minute on two cores. It needs the trainer's packages: docs/trainers.md.
"""

import argparse
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from tunix.models.qwen3 import model as qwen3
from tunix.sft import peft_trainer, utils

import loha_jax
from loha_jax import interop

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--out", type=Path, default=Path("out/tunix_sft"))
args = parser.parse_args()

sizes = {"num_layers": 2, "embed_dim": 32, "hidden_dim": 64, "vocab_size": 256}
heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
config = qwen3.ModelConfig(**sizes, **heads, rope_theta=1_000_000, norm_eps=1e-6)
model = qwen3.Qwen3(config, rngs=nnx.Rngs(0))  # (*) params.create_model_from_safe_tensors(...)


def names(name):
    """Return what transformers calls a module, so that PEFT opens the file."""
    return "model." + name.replace(".attn.", ".self_attn.")


loha = loha_jax.LoHaConfig(r=4, alpha=8, target_modules=["q_proj", "v_proj", "gate_proj"])
loha_jax.nnx.inject(model, loha, rngs=nnx.Rngs(1), names=names)


def inputs(batch):
    """Return the arguments of the trainer's loss."""
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": utils.build_positions_from_mask(batch.input_mask),
        "attention_mask": utils.make_causal_attn_mask(batch.input_mask),
    }


tokens = np.frombuffer(__doc__.encode()[:256], np.uint8).reshape(4, 64)  # (*) your text
batch = peft_trainer.TrainingInput(input_tokens=jnp.array(tokens, int), input_mask=tokens != 0)
training = peft_trainer.TrainingConfig(
    eval_every_n_steps=1000,
    max_steps=args.steps,
    checkpoint_root_directory=str((args.out / "checkpoints").resolve()),
    checkpointing_options=ocp.CheckpointManagerOptions(save_interval_steps=20),
)
trainer = peft_trainer.PeftTrainer(model, optax.adamw(1e-2), training)
print("starts at step", trainer.train_steps)  # a second run with more steps resumes
trainer.with_gen_model_input_fn(inputs).train([batch] * args.steps)
losses = trainer.metrics_logger.get_metric_history("", "loss", "train")
print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}")
interop.save_peft(args.out / "adapter", model)
