"""Weights for tunix' rollouts by vLLM: what `as_lora` hands to its weight sync.

vLLM is not installed. tunix copies a state into its arrays by one function and a table of names,
which run here; the arrays have the axes that the table says.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tunix.generate import utils
from tunix.generate.mappings import MappingConfig
from tunix.models.qwen3 import model as qwen3

import loha_jax
from loha_jax import LoHaConfig, interop
from tests.trainers import qwen3_twin

# tunix calls what Flax 0.12.12 wants to remove: methods of `nnx.State`, and `.value`.
pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:(tunix|flax)\..*")

TARGETS = {"attn": ("q_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "down_proj")}
THEIRS = {"attn": "self_attn", "mlp": "mlp"}
LEAVES = {"attn": "w", "mlp": "kernel"}
RANK = 3


def adapted():
    """tunix' Qwen3 whose adapter changes it."""
    model = qwen3.Qwen3(qwen3_twin.model_config(), rngs=nnx.Rngs(0))
    targets = [name for names in TARGETS.values() for name in names]
    config = LoHaConfig(r=RANK, alpha=5, target_modules=targets, init_weights=False)
    return loha_jax.nnx.inject(model, config, rngs=nnx.Rngs(1))


def preprocess(model):
    """The hook of docs/trainers.md."""
    return lambda state: nnx.State(jax.tree.map(nnx.LoRAParam, interop.as_lora(model)))


def in_matrices(model, layer, part, name):
    """ΔW as [inputs, outputs], from the merged kernels."""

    def kernel(m):
        return getattr(getattr(m.layers[layer], part), name)

    def array(m):
        return np.asarray(getattr(kernel(m), LEAVES[part]).get_value())

    bare = loha_jax.unload(nnx.clone(model))
    update = array(loha_jax.merge(nnx.clone(model))) - array(bare)
    inputs = update.ndim - 1 if name == "o_proj" else 1
    return update.reshape(int(np.prod(update.shape[:inputs])), -1)


def rollout(model):
    """A state of zeros with vLLM's names: two arrays for each adapted module."""
    flat = {}
    for layer in range(2):
        for part, modules in TARGETS.items():
            for name in modules:
                path = ("model", "layers", layer, THEIRS[part], name)
                inputs, outputs = in_matrices(model, layer, part, name).shape
                flat[*path, "weight_lora_a"] = nnx.Param(jnp.zeros((inputs, RANK**2)))
                flat[*path, "weight_lora_b"] = nnx.Param(jnp.zeros((RANK**2, outputs)))
    return nnx.State.from_flat_path(flat)


def test_the_rollouts_arrays_are_the_update():
    model = adapted()
    config = MappingConfig.build(model=model, backend="vllm_jax")
    config.preprocess_src_state = preprocess(model)
    target = rollout(model)
    utils.transfer_state_with_mappings(
        src_state=config.preprocess_src_state(nnx.state(model, nnx.LoRAParam)),
        dst_state=target,
        key_mappings=config.to_hf_mappings | config.lora_to_hf_mappings,
        transpose_keys=config.to_hf_transpose_keys,
    )
    found = {path: value.get_value() for path, value in target.flat_state()}
    for layer in range(2):
        for part, modules in TARGETS.items():
            for name in modules:
                path = ("model", "layers", layer, THEIRS[part], name)
                want = in_matrices(model, layer, part, name)
                product = found[*path, "weight_lora_a"] @ found[*path, "weight_lora_b"]
                assert abs(want).max() > 0.01
                np.testing.assert_allclose(product, want, rtol=0, atol=1e-7)
