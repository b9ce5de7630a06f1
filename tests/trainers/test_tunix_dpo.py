"""Preferences: tunix' `DPOTrainer`, with the base as the reference."""

import math
from functools import partial

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tunix.sft.dpo import dpo_trainer

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

STEPS = 10


def pairs():
    """Prompts with a chosen and a rejected answer each."""
    prompts, chosen, rejected = np.random.default_rng(0).integers(3, 255, (3, 4, 8))
    mask = jnp.ones((4, 8), bool)
    return dpo_trainer.TrainingInput(
        prompt_ids=jnp.array(prompts),
        prompt_mask=mask,
        chosen_ids=jnp.array(chosen),
        chosen_mask=mask,
        rejected_ids=jnp.array(rejected),
        rejected_mask=mask,
    )


def float_by_inject():
    return with_inject(toy()), toy()


def by_provider(base):
    model = with_provider(toy(), **BASES[base])
    return model, without_adapter(model)


PAIRS = {"inject": float_by_inject} | {base: partial(by_provider, base) for base in BASES}


@pytest.mark.parametrize("made", PAIRS.values(), ids=PAIRS)
def test_preferences_are_learned(made):
    """The loss of an untrained adapter is log 2; 10 steps halve it. No base array changes."""
    model, reference = made()
    before, first, of_reference = base_arrays(model), factors(model), base_arrays(reference)
    config = dpo_trainer.DPOTrainingConfig(eval_every_n_steps=1000, max_steps=STEPS)
    trainer = dpo_trainer.DPOTrainer(model, reference, optax.adamw(3e-2), config)
    trainer.train([pairs()] * STEPS)
    losses = trainer.metrics_logger.get_metric_history("", "loss", "train")
    assert len(losses) == STEPS
    np.testing.assert_allclose(losses[0], math.log(2), rtol=1e-6)
    assert losses[-1] < 0.5 * math.log(2), losses
    assert not changed(before, base_arrays(model))
    assert not changed(of_reference, base_arrays(reference))
    assert len(changed(first, factors(model))) == len(first) > 0
