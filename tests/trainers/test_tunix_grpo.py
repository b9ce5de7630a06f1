"""Reinforcement learning: tunix' `GRPOLearner` with its own sampler, on one mesh and on two."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tunix.rl import rl_cluster
from tunix.rl import utils as rl_utils
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout
from tunix.tests import test_common

from tests.trainers.tunix_models import (
    BASES,
    base_arrays,
    changed,
    factors,
    toy,
    with_inject,
    with_provider,
    without_adapter,
)

WAYS = {
    "provider": with_provider,
    "int8 provider": partial(with_provider, **BASES["int8"]),
    "inject": with_inject,
}
VOCABULARY = test_common.MockVocab()
PROMPT, ANSWER = (
    jnp.array([[0, 0, 3, 4], [0, 0, 5, 6]]),
    jnp.array([[7, 8, 9, 2], [10, 11, 12, 13]]),
)


def mesh(device):
    return jax.sharding.Mesh(np.array(jax.devices()[device]).reshape(1, 1), ("fsdp", "tp"))


def rewards(prompts, completions, **_):
    """One point for each "hello"."""
    return [float(text.split().count("hello")) for text in completions]


@dataclasses.dataclass
class Run:
    """A finished run of a learner.

    Attributes:
        cluster: tunix' models.
        before, factors_before, of_reference: the arrays before the first step.
        shared: whether actor and reference shared their base arrays at first.
    """

    cluster: rl_cluster.RLCluster
    before: dict[str, np.ndarray]
    factors_before: dict[str, np.ndarray]
    of_reference: dict[str, np.ndarray]
    shared: bool

    @property
    def actor(self):
        return self.cluster.actor_trainer.model

    @property
    def reference(self):
        return self.cluster.inference_worker.get_model("reference")


def train(way, meshes):
    """Three steps of learning to say "hello"."""
    base = toy(VOCABULARY.GetPieceSize())
    actor = WAYS[way](nnx.clone(base))
    reference = without_adapter(actor) if way == "int8 provider" else base
    of_reference = base_arrays(reference)
    before, factors_before = base_arrays(actor), factors(actor)
    role = rl_cluster.Role
    actor_mesh, rollout_mesh = mesh(0), mesh(meshes - 1)
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.adamw(1e-1), eval_every_n_steps=1000, max_steps=3
    )
    rollout = base_rollout.RolloutConfig(
        max_tokens_to_generate=8, max_prompt_length=4, kv_cache_size=16
    )
    config = rl_cluster.ClusterConfig(
        role_to_mesh={
            role.ACTOR: actor_mesh,
            role.REFERENCE: actor_mesh,
            role.ROLLOUT: rollout_mesh,
        },
        training_config=training,
        rollout_config=rollout,
    )
    cluster = rl_cluster.RLCluster(
        actor=actor, reference=reference, tokenizer=VOCABULARY, cluster_config=config
    )
    algorithm = grpo_learner.GRPOConfig(num_generations=4)
    learner = grpo_learner.GRPOLearner(cluster, algorithm, rewards)
    assert learner.should_sync_weights == (meshes == 2)
    shared = rl_utils.is_sharing_backbone(actor, reference)
    learner.train([{"prompts": np.array(["input string", "hello world"])}] * 3)
    return Run(cluster, before, factors_before, of_reference, shared)


CASES = [(way, meshes) for way in WAYS for meshes in (1, 2)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}, meshes: {case[1]}")
def run(request):
    return train(*request.param)


def test_only_the_factors_of_the_actor_change(run):
    """0 of N base arrays, and nothing of the reference."""
    assert run.cluster.actor_trainer.train_steps == 3
    assert not changed(run.before, base_arrays(run.actor))
    assert len(changed(run.factors_before, factors(run.actor))) == len(run.factors_before) > 0
    assert not changed(run.of_reference, base_arrays(run.reference))


def test_actor_and_reference_share_their_base(run):
    """An adapter takes no second copy of the base."""
    assert run.shared


def test_rollout_has_the_trained_adapter(run):
    """Its factors and log probabilities are the actor's, and not the base's."""
    rollout = run.cluster.rollout
    assert not changed(factors(run.actor), factors(rollout.model()))
    scores = np.array(rollout.get_per_token_logps(PROMPT, ANSWER))
    np.testing.assert_allclose(scores, log_probabilities(run.actor), atol=1e-5)
    assert np.abs(scores - log_probabilities(run.reference)).max() > 0.1


def test_rollout_samples_from_the_trained_adapter(run):
    """The sampler's log probability of each first token is the actor's, and not the base's."""
    config = dataclasses.replace(
        run.cluster.cluster_config.rollout_config,
        temperature=0.0,  # the likeliest token
        top_p=None,
        eos_tokens=[VOCABULARY.pad_id()],
        return_logprobs=True,
    )
    output = run.cluster.rollout.generate(["input string", "hello world"], config)
    prompts = jnp.array(output.left_padded_prompt_tokens)
    first = jnp.array([tokens[0] for tokens in output.tokens])
    sampled = np.array([scores[0] for scores in output.logprobs])

    def own(model):
        scores = jax.nn.log_softmax(model(prompts, None)[0][:, -1])
        return np.array(scores[jnp.arange(len(first)), first])

    np.testing.assert_allclose(sampled, own(run.actor), atol=1e-5)
    assert np.abs(sampled - own(run.reference)).max() > 0.1


def log_probabilities(model):
    """The log probability of each token of the answers."""
    logits = model(jnp.concatenate([PROMPT, ANSWER], 1), None)[0][:, PROMPT.shape[1] - 1 : -1]
    scores = jax.nn.log_softmax(logits.astype(jnp.float32))
    return np.array(jnp.take_along_axis(scores, ANSWER[..., None], -1)[..., 0])
