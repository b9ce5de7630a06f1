"""Tiny models and adapters for the tests of google-tunix' trainers, and what the tests read."""

import jax.numpy as jnp
import numpy as np
import qwix
from flax import nnx
from tunix.sft import peft_trainer, utils
from tunix.tests import test_common

import loha_jax
from loha_jax import LoHaConfig
from loha_jax.nnx import inject
from loha_jax.qwix import LoHaProvider

RANK, ALPHA = 4, 8.0
BASES = {
    "float": {},
    "int8": {"weight_qtype": "int8"},
    "nf4": {"weight_qtype": "nf4", "tile_size": 16},
}
"""Fields of a rule, by the kind of base."""


def toy(vocabulary=256):
    """tunix' toy transformer; its weights are the same at each call."""
    config = test_common.ModelConfig(num_layers=2, vocab_size=vocabulary)
    return test_common.ToyTransformer(config=config, rngs=nnx.Rngs(0))


def with_provider(model, targets=("w1", "w2"), seed=5, names=None, **fields):
    """The model with LoHa by a provider; `fields` are of its rule."""
    rule = {"module_path": path_of(targets), "rank": RANK, "alpha": ALPHA, **fields}
    provider = LoHaProvider(names=names, **rule)
    return qwix.apply_lora_to_model(model, provider, *model_inputs(), rngs=nnx.Rngs(seed))


def without_adapter(model):
    """A model of the same base arrays, quantised ones too."""
    return loha_jax.unload(nnx.clone(model))


def with_inject(model, targets=("w1", "w2"), seed=5, names=None):
    """The model with LoHa by `loha_jax.nnx.inject`."""
    config = LoHaConfig(r=RANK, alpha=ALPHA, target_modules=list(targets))
    return inject(model, config, rngs=nnx.Rngs(seed), names=names)


def with_lora(model, targets=("w1", "w2"), **fields):
    """The model with qwix' own LoRA, of twice the rank: as many parameters."""
    provider = qwix.LoraProvider(
        module_path=path_of(targets), rank=2 * RANK, alpha=2 * ALPHA, **fields
    )
    return qwix.apply_lora_to_model(model, provider, *model_inputs(), rngs=nnx.Rngs(5))


def path_of(targets):
    return f".*({'|'.join(targets)})"


def batches(count):
    """Two batches in turn, so that it is seen which ones a resumed run takes; of few tokens."""
    tokens = np.random.default_rng(0).integers(1, 9, (2, 4, 16))
    mask = jnp.ones((4, 16), bool)
    both = [peft_trainer.TrainingInput(input_tokens=jnp.array(t), input_mask=mask) for t in tokens]
    return [both[n % 2] for n in range(count)]


def trainer_inputs(batch):
    """The arguments of tunix' loss for a batch."""
    mask = batch.input_tokens != 0
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": utils.build_positions_from_mask(mask),
        "attention_mask": utils.make_causal_attn_mask(mask),
    }


def model_inputs():
    """The arguments of a model for the first batch: tokens, positions, cache, mask."""
    inputs = trainer_inputs(batches(1)[0])
    return inputs["input_tokens"], inputs["positions"], None, inputs["attention_mask"]


def logits(model):
    """The logits of the first batch."""
    return np.array(model(*model_inputs())[0])


def base_arrays(model):
    """Copies of all arrays besides the factors, by path."""
    return arrays(model, nnx.Not(nnx.LoRAParam))


def factors(model):
    """Copies of the trained arrays, by path."""
    return arrays(model, nnx.LoRAParam)


def arrays(node, kind):
    flat = nnx.to_flat_state(nnx.state(node, kind))
    return {"/".join(map(str, path)): np.array(v.get_value()) for path, v in flat}


def changed(before, after):
    """The paths of arrays that differ by a bit; both hold the same paths."""
    assert before.keys() == after.keys()
    return [k for k in before if before[k].tobytes() != after[k].tobytes()]


def size(arrays):
    return sum(array.size for array in arrays.values())
