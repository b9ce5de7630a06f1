"""Fine-tunes EasyDeL's Llama with LoHa by EasyDeL's own trainer, and saves the adapter for PEFT.

    python examples/trainers/easydel_llama.py [--steps N] [--out DIR] [--compare]

The model is a tiny one with random weights. With real ones, the line marked with (*) is another.

It takes two minutes, most of it the import of EasyDeL. It needs EasyDeL: docs/trainers.md.
"""

import argparse
import re
from pathlib import Path

import datasets
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
parser.add_argument("--compare", action="store_true", help="with PEFT, which opens the adapter")
args = parser.parse_args()

sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 256}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
config = easydel.LlamaConfig(**sizes, **heads, attn_dtype=jnp.float32)  # else bfloat16
types = {"dtype": jnp.float32, "param_dtype": jnp.float32, "precision": None}
model = easydel.LlamaForCausalLM(config=config, **types, rngs=nnx.Rngs(0))  # (*) from_pretrained
tokens = np.frombuffer(__doc__.encode()[:256], np.uint8).reshape(4, 64).astype(int)


def logits(model):
    """Return the logits of all tokens."""
    with model.mesh:
        return model(input_ids=jnp.array(tokens)).logits


def loss(model):
    """Return the mean loss of the tokens."""
    of_each = optax.softmax_cross_entropy_with_integer_labels(logits(model)[:, :-1], tokens[:, 1:])
    return of_each.mean()


def base_arrays(model):
    """Return copies of the model's parameters but for the factors, by their paths."""
    state = nnx.state(model, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)))
    return {".".join(map(str, path)): np.array(x[...]) for path, x in state.flat_state()}


plain, base = logits(model), base_arrays(model)
loha = loha_jax.LoHaConfig(r=4, alpha=8, target_modules=["q_proj", "v_proj", "gate_proj"])
loha_jax.nnx.inject(model, loha, rngs=nnx.Rngs(1))
print("EasyDeL trains:", model.graphstate_type.__name__)  # LoRAParam
off = {"use_wandb": False, "do_last_save": False, "save_optimizer_state": False}
settings = easydel.TrainingArguments(
    **off,
    save_directory=str(args.out / "checkpoints"),
    num_train_epochs=args.steps,  # of one batch each
    total_batch_size=len(tokens),
    max_length=tokens.shape[1],
    learning_rate=1e-2,
    scheduler=easydel.EasyDeLSchedulers.NONE,
    log_steps=1,
)
columns = {"input_ids": tokens, "labels": tokens, "attention_mask": np.ones_like(tokens)}
rows = datasets.Dataset.from_dict({name: column.tolist() for name, column in columns.items()})
trainer = easydel.Trainer(arguments=settings, model=model, dataset_train=rows)
start = loss(model)
model = trainer.train().state.model
print(f"loss: {start:.3f} -> {loss(model):.3f}")
after = base_arrays(model)
changed = sum(not np.array_equal(x, after[path]) for path, x in base.items())
print(f"changed arrays of the base: {changed} of {len(base)}")
interop.save_peft(args.out / "adapter", model)

if args.compare:
    import peft
    import torch
    import transformers

    def in_torch(arrays):
        """Return transformers' Llama with these weights."""
        llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
        weights = {
            re.sub(r"\.\w+$", ".weight", path): torch.tensor(x.T if path.endswith("kernel") else x)
            for path, x in arrays.items()
        }
        llama.load_state_dict(weights)
        return llama

    def difference(llama, ours):
        """Return how far EasyDeL's logits are from transformers', at most."""
        with torch.no_grad():
            return f"{abs(llama(torch.tensor(tokens)).logits.numpy() - ours).max():.1e}"

    print("EasyDeL - transformers, without the adapter:", difference(in_torch(base), plain))
    merged = loha_jax.merge(nnx.clone(model))
    print("merged:", difference(in_torch(base_arrays(merged)), logits(merged)))
    opened = peft.PeftModel.from_pretrained(in_torch(base), args.out / "adapter")
    print("PEFT opens the adapter:", difference(opened, logits(model)))
    print(f"the adapter moves the logits by up to {abs(logits(model) - plain).max():.2g}")
