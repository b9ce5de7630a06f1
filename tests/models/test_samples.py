"""PEFT's samples on real Flax models: outputs, gradients and training trajectories."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from peft_samples import TRAINED, Sample

import loha_jax
from loha_jax import interop

MODEL_TYPES = {"llama_default_targets": "llama", "llama_tied": "llama", "bert_seqcls": "bert"}
SLOW = ("llama_patterns", "llama_default_targets", "bert_seqcls")


def linear_net(params, x):
    hidden = x @ params["lin0"]["kernel"] + params["lin0"]["bias"]
    if "lin1" in params:
        return jnp.tanh(hidden) @ params["lin1"]["kernel"]
    bn, head = params["bn"], params["head"]
    hidden = (hidden - bn["mean"]) / jnp.sqrt(bn["var"] + 1e-5) * bn["scale"] + bn["bias"]
    hidden = jnp.tanh(hidden @ head["0"]["kernel"] + head["0"]["bias"])
    return hidden @ head["2"]["kernel"] + head["2"]["bias"]


def flax_model(sample, params):
    """transformers' Flax twin of the sample's PyTorch model."""
    transformers = pytest.importorskip(
        "transformers", "4.57.6", reason="the last transformers with Flax"
    )
    config = json.loads((sample.folder / "base_config.json").read_text())
    if config["model_type"] == "llama":
        from transformers.models.llama.modeling_flax_llama import (
            FlaxLlamaForCausalLMModule as Module,
        )

        made = transformers.LlamaConfig(**config | {"rope_theta": 10000.0})
    else:
        from transformers.models.bert.modeling_flax_bert import (
            FlaxBertForSequenceClassificationModule as Module,
        )

        made = transformers.BertConfig(**config)
    module = Module(made)

    def fn(params, input_ids, attention_mask):
        position_ids = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        if config["model_type"] == "llama":
            return module.apply({"params": params}, input_ids, attention_mask, position_ids).logits
        args = (input_ids, attention_mask, jnp.zeros_like(input_ids), position_ids, None)
        return module.apply({"params": params}, *args).logits

    return fn


def conv_net(sample):
    """The samples' convolution in torch's axis order, a tanh and a linear head."""
    groups = re.search(r"groups=(\d+)", sample.meta["layers"]["conv"]["base"])

    def fn(params, x):
        space = "HW"[: x.ndim - 2]
        x = jax.lax.conv_general_dilated(
            x,
            jnp.asarray(params["conv"]["kernel"]),
            (1,) * len(space),
            "VALID",
            dimension_numbers=("NC" + space, space + "IO", "NC" + space),
            feature_group_count=int(groups[1]) if groups else 1,
        )
        x = jnp.tanh(x + params["conv"]["bias"].reshape(-1, *(1,) * len(space)))
        return x.reshape(len(x), -1) @ params["head"]["kernel"] + params["head"]["bias"]

    return fn


def model(sample, params):
    if "conv" in params:
        return conv_net(sample)
    return linear_net if "x" in sample.inputs else flax_model(sample, params)


def rename_norms(node):
    if not isinstance(node, dict):
        return node
    return {"weight" if key == "scale" else key: rename_norms(value) for key, value in node.items()}


def loaded(name):
    sample = Sample(name)
    assert sample.state  # skips where torch is missing for the one pickle
    base = sample.params()
    if name.startswith("llama"):  # FlaxLlama's norms keep torch's name
        base = {"model": rename_norms(base["model"]), "lm_head": base.get("lm_head")}
    if name == "llama_tied":  # the module holds a head of its own
        base["lm_head"] = {
            "kernel": np.ascontiguousarray(base["model"]["embed_tokens"]["embedding"].T)
        }
    params = interop.load_peft(
        sample.adapter, base, model_type=MODEL_TYPES.get(name), layouts=sample.layouts
    )
    inputs = {
        k: v if v.dtype == np.float32 else v.astype(np.int32) for k, v in sample.inputs.items()
    }
    return sample, params, tuple(inputs.values()), model(sample, base)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in TRAINED],
)
def test_outputs_gradients_and_trajectory(name):
    sample, params, inputs, fn = loaded(name)
    base = jax.jit(fn)(loha_jax.unload(params), *inputs)
    np.testing.assert_allclose(base, sample.io["out_base"], rtol=0, atol=1e-5 * np.abs(base).max())
    trainable, frozen = loha_jax.partition(params)
    cotangent, target = sample.io["cotangent"], sample.io.get("train_target")

    for strategy in ("factored", "fused"):
        run = loha_jax.adapt(fn, strategy=strategy)

        @jax.jit
        def apply(trainable, run=run):
            return run(loha_jax.combine(trainable, frozen), *inputs)

        out, pullback = jax.vjp(apply, trainable)
        want = sample.io["out_adapter"]
        np.testing.assert_allclose(out, want, rtol=0, atol=1e-4 * np.abs(want).max())
        (gradient,) = pullback(jnp.asarray(cotangent))
        ours = interop.to_peft_state_dict(loha_jax.combine(gradient, frozen))
        for key, value in ours.items():
            if (reference := sample.io.get(f"grad::{key}")) is not None:
                np.testing.assert_allclose(
                    value, reference, rtol=0, atol=1e-4 * np.abs(reference).max(), err_msg=key
                )

        if target is None:  # the sample holds outputs and gradients only
            assert name == "llama_lm_head_targeted"
            continue
        tx = optax.sgd(0.01)

        @jax.jit
        def step(trainable, opt_state, apply=apply, tx=tx):
            loss, gradient = jax.value_and_grad(lambda t: ((apply(t) - target) ** 2).mean())(
                trainable
            )
            updates, opt_state = tx.update(gradient, opt_state)
            return optax.apply_updates(trainable, updates), opt_state, loss

        state, opt_state = trainable, tx.init(trainable)
        for expected in sample.io["train_losses"]:
            state, opt_state, loss = step(state, opt_state)
            np.testing.assert_allclose(loss, expected, rtol=1e-5)
        final = interop.to_peft_state_dict(loha_jax.combine(state, frozen))
        references = {
            key: sample.io[f"train_final::{key}"]
            for key in final
            if f"train_final::{key}" in sample.io
        }
        assert len(references) >= 4
        for key, reference in references.items():
            np.testing.assert_allclose(
                final[key], reference, rtol=0, atol=1e-5 * np.abs(reference).max(), err_msg=key
            )
