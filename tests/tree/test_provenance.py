"""Where a config comes from is no part of a tree's structure."""

import jax
import numpy as np
import optax
import pytest
from one_kernel import BASE, X, adapted, config_of, forward
from safetensors import safe_open

import loha_jax
from loha_jax import interop
from loha_jax.checkpoint import Checkpoints

PROVENANCE = [
    {"base_model_name_or_path": "org/base"},
    {"base_model_name_or_path": "/data/base", "revision": "main"},
    {"peft_version": "0.20.0"},
    {"task_type": "CAUSAL_LM", "auto_mapping": {"parent_library": "transformers"}},
    {"target_modules": "q", "init_weights": False},
]


def test_provenance_is_no_structure():
    """Trees that differ in provenance alone have one structure."""
    trees = [adapted(n, **fields) for n, fields in enumerate(PROVENANCE)]
    assert len({jax.tree.structure(tree) for tree in trees}) == 1
    mean = jax.tree.map(lambda *x: sum(x) / len(x), *trees)
    got = mean["q"]["kernel"].adapters["default"].hada_w2_a
    np.testing.assert_allclose(
        got, np.mean([t["q"]["kernel"].adapters["default"].hada_w2_a for t in trees], 0), rtol=1e-6
    )
    assert len({config_of(tree) for tree in trees}) == len(trees)


def test_two_adapters_share_a_jitted_step(tmp_path):
    """Two adapters through one jitted step keep their own provenance."""
    tx, traces = optax.sgd(0.1), []

    @jax.jit
    def step(trainable, opt_state, frozen):
        traces.append(1)
        grads = jax.grad(
            lambda t: (loha_jax.adapt(forward)(loha_jax.combine(t, frozen), X) ** 2).sum()
        )(trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state

    for n, name in enumerate(("org/one", "org/two")):
        trainable, frozen = loha_jax.partition(adapted(n, base_model_name_or_path=name))
        trainable, _ = step(trainable, tx.init(trainable), frozen)
        interop.save_peft(tmp_path / str(n), loha_jax.combine(trainable, frozen))
        assert (
            loha_jax.LoHaConfig.from_pretrained(tmp_path / str(n)).base_model_name_or_path == name
        )
    assert len(traces) == 1


def test_files_come_back_bit_for_bit(tmp_path):
    """Files come back bit for bit beside a shared compilation."""
    loaded = []
    for n in range(2):
        path = tmp_path / f"{n}.safetensors"
        interop.save_lycoris(path, adapted(n), prefix="lora_unet_", metadata={"ss_steps": str(n)})
        loaded.append(interop.load_lycoris(path, BASE))
        interop.save_lycoris(tmp_path / "again.safetensors", loaded[-1], prefix="lora_unet_")
        one, other = (safe_open(p, "np") for p in (path, tmp_path / "again.safetensors"))
        assert one.metadata() == other.metadata()  # safetensors writes its keys in any order
        assert one.metadata()["ss_steps"] == str(n)
        for name in {*one.keys(), *other.keys()}:
            np.testing.assert_array_equal(one.get_tensor(name), other.get_tensor(name))
    assert jax.tree.structure(loaded[0]) == jax.tree.structure(loaded[1])


def test_a_checkpoint_is_restored_after_provenance_has_changed(tmp_path):
    params = adapted(peft_version="0.20.0", base_model_name_or_path="/old")
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, params)
        restored = checkpoints.restore(
            adapted(5, peft_version="0.22.0", base_model_name_or_path="/new")
        )
        with pytest.raises(ValueError, match=r"rank_dropout: given 0\.5"):
            checkpoints.restore(adapted(rank_dropout=0.5))
    assert config_of(restored.params).base_model_name_or_path == "/new"
    for name, tensor in restored.params["q"]["kernel"].adapters["default"].tensors.items():
        np.testing.assert_array_equal(
            tensor, params["q"]["kernel"].adapters["default"].tensors[name]
        )
