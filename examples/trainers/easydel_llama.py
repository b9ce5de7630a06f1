"""Fine-tunes EasyDeL's Llama with LoHa, and saves the adapter for PEFT.

    python examples/trainers/easydel_llama.py [--steps N] [--out DIR]

The model is a tiny one with random weights. With real ones, the line marked with (*) is another.

It takes two minutes, most of it the import of EasyDeL. It needs EasyDeL: docs/trainers.md.
"""

import argparse
from pathlib import Path

import easydel
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import loha_jax
from loha_jax import interop

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--out", type=Path, default=Path("out/easydel_llama"))
args = parser.parse_args()

sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 256}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
config = easydel.LlamaConfig(**sizes, **heads, attn_dtype=jnp.float32)  # else bfloat16
types = {"dtype": jnp.float32, "param_dtype": jnp.float32, "precision": None}
model = easydel.LlamaForCausalLM(config=config, **types, rngs=nnx.Rngs(0))  # (*) from_pretrained

loha = loha_jax.LoHaConfig(r=4, alpha=8, target_modules=["q_proj", "v_proj", "gate_proj"])
loha_jax.nnx.inject(model, loha, rngs=nnx.Rngs(1))
print("EasyDeL trains:", model.graphstate_type.__name__)  # LoRAParam
optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.LoRAParam)
tokens = jnp.array(np.frombuffer(__doc__.encode()[:256], np.uint8).reshape(4, 64), int)


@nnx.jit
def step(model, optimizer):
    """Take a step, and return the loss before it."""

    def loss_fn(model):
        logits = model(input_ids=tokens).logits[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    trained = nnx.DiffState(0, nnx.LoRAParam)
    loss, grads = nnx.value_and_grad(loss_fn, argnums=trained)(model)
    optimizer.update(model, grads)
    return loss


with model.mesh:
    losses = [float(step(model, optimizer)) for _ in range(args.steps)]
print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}")
interop.save_peft(args.out / "adapter", model)
