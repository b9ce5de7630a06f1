"""QLoHa: tunix' trainer on a base of 4-bit kernels (nf4) by qwix, which it leaves as they are.

    python examples/trainers/qloha_nf4.py [--steps N] [--out DIR]

A float base has the same lines without `weight_qtype` and `tile_size`. The adapter fits the float
model, which it is merged into at the end.

It takes about a minute on two cores. It needs the trainer's packages: docs/trainers.md.
"""

import argparse
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import qwix
from flax import nnx
from tunix.sft import peft_trainer, utils
from tunix.tests import test_common

import loha_jax
from loha_jax import interop
from loha_jax.qwix import LoHaProvider

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--out", type=Path, default=Path("out/qloha_nf4"))
args = parser.parse_args()


def inputs(batch):
    """Return the arguments of the trainer's loss."""
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": utils.build_positions_from_mask(batch.input_mask),
        "attention_mask": utils.make_causal_attn_mask(batch.input_mask),
    }


tokens = np.random.default_rng(0).integers(1, 255, (4, 16))
batch = peft_trainer.TrainingInput(input_tokens=jnp.array(tokens), input_mask=tokens != 0)
x = inputs(batch)
model = test_common.ToyTransformer(config=test_common.ModelConfig(num_layers=2), rngs=nnx.Rngs(0))
provider = LoHaProvider(
    module_path=".*(w1|w2)", rank=4, alpha=8.0, weight_qtype="nf4", tile_size=16
)
example = x["input_tokens"], x["positions"], None, x["attention_mask"]
model = qwix.apply_lora_to_model(model, provider, *example, rngs=nnx.Rngs(5))
print(loha_jax.summary(model))

training = peft_trainer.TrainingConfig(eval_every_n_steps=1000, max_steps=args.steps)
trainer = peft_trainer.PeftTrainer(model, optax.adamw(1e-2), training)
trainer.with_gen_model_input_fn(inputs).train([batch] * args.steps)
losses = trainer.metrics_logger.get_metric_history("", "loss", "train")
print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}")
interop.save_peft(args.out / "adapter", model)
print("merged:", loha_jax.merge(model).layers[0].w1.kernel.get_value().dtype)
