"""Reinforcement learning with LoHa by tunix' `GRPOLearner`: a toy model learns to say "hello".

    python examples/trainers/tunix_grpo.py [--meshes 1|2] [--steps N] [--out DIR]

On one mesh, actor and rollout are one model. On two, the rollout has a device of its own, and tunix
sends it the factors alone after each step.

It takes about a minute on two cores. It needs the trainer's packages: docs/trainers.md.
"""

import argparse
from pathlib import Path

import jax
import numpy as np
import optax
import qwix
from flax import nnx
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig
from tunix.tests import test_common

from loha_jax import interop
from loha_jax.qwix import LoHaProvider

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--meshes", type=int, default=1)
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--out", type=Path, default=Path("out/tunix_grpo"))
args = parser.parse_args()
jax.config.update("jax_num_cpu_devices", 2)  # where there are no others

vocabulary = test_common.MockVocab()
config = test_common.ModelConfig(num_layers=2, vocab_size=vocabulary.GetPieceSize())
base = test_common.ToyTransformer(config=config, rngs=nnx.Rngs(0))
provider = LoHaProvider(module_path=".*(w1|w2)", rank=4, alpha=8.0)
copy = nnx.clone(base)  # of the same arrays: actor and reference share the base
actor = qwix.apply_lora_to_model(copy, provider, **base.get_model_input(), rngs=nnx.Rngs(1))


seen = []


def rewards(prompts, completions, **_):
    """Give one point for each "hello"."""
    seen.append([float(text.split().count("hello")) for text in completions])
    return seen[-1]


def mesh(device):
    """Return a mesh of one device; on real hardware, of all that a role has."""
    return jax.sharding.Mesh(np.array(device).reshape(1, 1), ("fsdp", "tp"))


first, *_, last = jax.devices()
training = RLTrainingConfig(
    actor_optimizer=optax.adamw(2e-2), eval_every_n_steps=1000, max_steps=args.steps
)
rollout = RolloutConfig(max_tokens_to_generate=8, max_prompt_length=8, kv_cache_size=32)
meshes = {Role.ACTOR: mesh(first), Role.REFERENCE: mesh(first)}
meshes[Role.ROLLOUT] = mesh(last) if args.meshes == 2 else meshes[Role.ACTOR]
config = ClusterConfig(role_to_mesh=meshes, training_config=training, rollout_config=rollout)
cluster = RLCluster(actor=actor, reference=base, tokenizer=vocabulary, cluster_config=config)
learner = GRPOLearner(cluster, GRPOConfig(num_generations=8), rewards)
learner.train([{"prompts": np.array(["input string", "hello world"])}] * args.steps)
print("mean reward:", np.mean(seen[0]), "->", np.mean(seen[-1]))
interop.save_peft(args.out / "adapter", cluster.actor_trainer.model)
