"""Fine-tunes levanter's Llama with LoHa by levanter's own trainer, and saves the adapter for PEFT.

    python examples/trainers/levanter_llama.py [--steps N] [--out DIR]

The model is a tiny one with random weights. With real ones, the line marked with (*) is another.

It takes a minute, most of it the import of levanter. It needs levanter: docs/trainers.md.
"""

import argparse
from pathlib import Path

import haliax as hax
import jax
import numpy as np
import optax
from levanter.models.llama import LlamaConfig
from levanter.models.lm_model import LmExample
from levanter.tracker import NoopConfig
from levanter.trainer import Trainer, TrainerConfig

import loha_jax
from loha_jax import interop

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--out", type=Path, default=Path("out/levanter_llama"))
args = parser.parse_args()

sizes = {"hidden_dim": 32, "intermediate_dim": 64, "num_layers": 2, "max_seq_len": 64}
config = LlamaConfig(**sizes, num_heads=4, num_kv_heads=2)
vocabulary = hax.Axis("vocab", 256)
model = config.model_type.init(vocabulary, config, key=jax.random.key(0))  # (*) load_pretrained

loha = loha_jax.LoHaConfig(r=4, alpha=8, target_modules=["q_proj", "v_proj", "gate_proj"])
adapted = loha_jax.inject(model, loha, key=jax.random.key(1))
trainable, frozen = map(jax.tree.flatten, loha_jax.partition(adapted))


def joined(parts):
    """Return the adapted model of what the trainer has: the factors, and the model as it was."""
    factors, model = parts
    base = jax.tree.unflatten(frozen[1], jax.tree.leaves(model))
    return loha_jax.combine(jax.tree.unflatten(trainable[1], factors), base)


def loss_fn(parts, example, *, key=None):
    """Return the loss of levanter's model."""
    return loha_jax.adapt(config.model_type.compute_next_token_loss)(
        joined(parts), example, key=key
    )


off = {"tracker": NoopConfig(), "log_jaxprs": False, "log_xla_hlo": False}
settings = TrainerConfig(
    **off, id="loha", num_train_steps=args.steps, train_batch_size=4, require_accelerator=False
)
settings.checkpointer.base_path = str(args.out / "checkpoints")
tokens = np.frombuffer(__doc__.encode()[:256], np.uint8).reshape(4, 64).astype(np.int32)
batch = hax.named(tokens, (settings.TrainBatch, config.max_Pos))
example = hax.vmap(LmExample.causal, settings.TrainBatch)(batch)

with Trainer(settings, optax.adamw(1e-2), loss_fn) as trainer:
    parts = (trainable[0], model)  # levanter takes a NamedArray as a whole
    state = trainer.initial_state(jax.random.PRNGKey(2), model=parts, is_trainable=(True, False))
    print("starts at step", int(state.step))  # a second run with more steps resumes
    losses = []
    trainer.add_hook(lambda info: losses.append(info.loss))
    trained = trainer.train(state, [example] * args.steps).model
print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}")
interop.save_peft(args.out / "adapter", joined(trained))
