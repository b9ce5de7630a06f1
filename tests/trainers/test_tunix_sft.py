"""Supervised fine-tuning by tunix' `PeftTrainer`, of float and of quantised bases."""

import dataclasses
import re
import shutil
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import qwix
from flax import nnx
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file
from tunix.sft import peft_trainer

from loha_jax import interop
from tests.trainers import qwen3_twin, torch_process
from tests.trainers.tunix_models import (
    ALPHA,
    BASES,
    RANK,
    arrays,
    base_arrays,
    batches,
    changed,
    factors,
    logits,
    model_inputs,
    path_of,
    size,
    toy,
    trainer_inputs,
    with_inject,
    with_lora,
    with_provider,
)

STEPS = 20
TOY_TARGETS = ("w1", "w2")
CASES = [("Qwen3", "inject"), ("Qwen3", "provider"), ("int8", "provider"), ("nf4", "provider")]
"""A base, and the way the adapter is put on it."""


@dataclasses.dataclass
class Case:
    """The models of a case, made anew at each call.

    Attributes:
        base: makes the float model without adapters; a quantised base is dequantised.
        adapted: makes it with LoHa, with other factors for another seed.
        lora: makes it with qwix' own LoRA.
        name: returns the name in a file of the module with a default name.
    """

    base: Callable[[], nnx.Module]
    adapted: Callable[..., nnx.Module]
    lora: Callable[[], nnx.Module]
    name: Callable[[str], str] = str


def case_of(base, way, checkpoint):
    if base != "Qwen3":
        return Case(
            lambda: dequantised_toy(**BASES[base]),
            lambda seed=5: with_provider(toy(), seed=seed, **BASES[base]),
            lambda: with_lora(toy(), **BASES[base]),
        )

    def load():
        return qwen3_twin.load(checkpoint)

    way_to = with_inject if way == "inject" else with_provider
    names = qwen3_twin.names(checkpoint)
    return Case(
        load,
        lambda seed=5: way_to(load(), qwen3_twin.TARGETS, seed, names),
        lambda: with_lora(load(), qwen3_twin.TARGETS),
        names,
    )


def dequantised_toy(**fields):
    """The toy transformer with the kernels that qwix computes with."""
    rule = qwix.QuantizationRule(module_path=path_of(TOY_TARGETS), **fields)
    quantised = qwix.quantize_model(toy(), qwix.PtqProvider([rule]), *model_inputs())
    model = toy()
    for layer, packed in zip(model.layers, quantised.layers, strict=True):
        for name in TOY_TARGETS:
            array = getattr(packed, name).kernel.array
            values = jax.tree.map(
                nnx.Variable.get_value, array, is_leaf=lambda x: isinstance(x, nnx.Variable)
            )
            getattr(layer, name).kernel.set_value(qwix.dequantize(values))
    return model


@dataclasses.dataclass
class Run:
    """A finished training run.

    Attributes:
        trainer: tunix' trainer with the trained model.
        before: the base arrays before the first step.
        losses: of the steps.
    """

    trainer: peft_trainer.PeftTrainer
    before: dict[str, np.ndarray]
    losses: np.ndarray

    @property
    def model(self):
        return self.trainer.model


def train(model, folder):
    """Train a model, or resume where the checkpoints in the folder end."""
    config = peft_trainer.TrainingConfig(
        eval_every_n_steps=1000,
        max_steps=STEPS,
        checkpoint_root_directory=str(folder),
        checkpointing_options=ocp.CheckpointManagerOptions(save_interval_steps=STEPS // 2),
    )
    before = base_arrays(model)
    trainer = peft_trainer.PeftTrainer(model, optax.adamw(3e-2), config)
    trainer.with_gen_model_input_fn(trainer_inputs).train(batches(STEPS))
    losses = trainer.metrics_logger.get_metric_history("", "loss", "train")
    return Run(trainer, before, np.array(losses))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    torch_process.save_checkpoint(folder)
    return folder


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def case(request, checkpoint):
    return case_of(*request.param, checkpoint)


@pytest.fixture(scope="module")
def folder(case, tmp_path_factory):
    """The folder of the run's checkpoints."""
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def run(case, folder):
    return train(case.adapted(), folder)


def test_base_stays_bit_for_bit(run):
    """0 of N arrays change: embeddings and norms, quantised values and their scales."""
    assert len(run.before) > 15
    assert not changed(run.before, base_arrays(run.model))


def test_loss_falls(run):
    """20 steps take a fifth off the first loss."""
    assert len(run.losses) == STEPS
    assert run.losses[-1] < 0.8 * run.losses[0], run.losses


@pytest.mark.parametrize("case", CASES[1:], ids=" ".join, indirect=True)
def test_lora_of_as_many_parameters(case, run, tmp_path):
    """qwix' own LoRA of rank 2r starts at the same loss, falls as far, and keeps the base too."""
    lora = train(case.lora(), tmp_path)
    assert size(factors(lora.model)) == size(factors(run.model))
    np.testing.assert_allclose(run.losses[0], lora.losses[0], rtol=1e-6)
    assert lora.losses[-1] < 0.8 * lora.losses[0], lora.losses
    assert not changed(lora.before, base_arrays(lora.model))


def test_optimizer_and_checkpoint_hold_the_factors_alone(run, folder):
    """AdamW has two moments per factor; the checkpoint has the factors and these."""
    trained = factors(run.model)
    moments = arrays(run.trainer.optimizer, nnx.optimizer.OptState)
    of = [re.sub(r"opt_state/\d/(mu|nu)/", "", path) for path, x in moments.items() if x.ndim]
    assert sorted(of) == sorted([*trained, *trained])
    saved = ocp.PyTreeCheckpointer().metadata(folder / str(STEPS) / "model_params")
    paths = flatten_dict(saved.item_metadata.tree)
    assert {"/".join(path[:-1]) for path in paths} == trained.keys()


def test_restored_factors_have_the_same_bits(run, folder):
    before = factors(run.model)
    forget = jax.tree.map(jnp.zeros_like, nnx.state(run.model, nnx.LoRAParam))
    nnx.update(run.model, forget)
    config = run.trainer.config
    assert peft_trainer.PeftTrainer(run.model, optax.adamw(3e-2), config).train_steps == STEPS
    assert not changed(before, factors(run.model))


def test_resuming_is_exact(case, run, folder, tmp_path):
    """A run that ended before step 20 goes on at step 10, and ends with the same bits."""
    shutil.copytree(folder, tmp_path / "ended")
    shutil.rmtree(tmp_path / "ended" / str(STEPS))
    model = case.adapted(seed=9)
    assert changed(factors(model), factors(run.model))
    resumed = train(model, tmp_path / "ended")
    assert len(resumed.losses) == STEPS // 2
    np.testing.assert_array_equal(resumed.losses, run.losses[STEPS // 2 :])
    assert not changed(factors(run.model), factors(resumed.model))


def test_file_is_what_was_trained(case, run, tmp_path):
    """The file's update, by the formula in numpy, on a base that was not trained."""
    interop.save_peft(tmp_path, run.model)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    model, want = case.base(), logits(run.model)
    base = logits(model)
    for path in (path for path in factors(run.model) if path.endswith("_lora_hada_w1_a")):
        *parts, attribute = path.split("/")
        kernel = getattr(module_at(model, parts), attribute.removesuffix("_lora_hada_w1_a"))
        name = "base_model.model." + case.name(".".join(parts))
        w = [tensors.pop(f"{name}.hada_{n}") for n in ("w1_a", "w1_b", "w2_a", "w2_b")]
        update = (w[0] @ w[1]) * (w[2] @ w[3]) * (ALPHA / RANK)
        kernel.set_value(kernel.get_value() + update.T.reshape(kernel.get_value().shape))
    assert not tensors
    assert np.abs(want - base).max() > 0.1
    np.testing.assert_allclose(logits(model), want, atol=1e-5)


def module_at(model, parts):
    for part in parts:
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model


@pytest.mark.parametrize("case", CASES[:2], ids=" ".join, indirect=True)
def test_peft_and_transformers_open_the_files(run, checkpoint, tmp_path):
    """PEFT on transformers' model, and the merged checkpoint, compute what tunix trained."""
    interop.save_peft(tmp_path / "adapter", run.model)
    tokens, want = model_inputs()[0], logits(run.model)
    before = torch_process.logits_of(checkpoint, tokens, tmp_path)
    assert np.abs(want - before).max() > 0.1
    names = qwen3_twin.names(checkpoint)
    interop.save_merged(tmp_path / "merged", run.model, names=names, base=checkpoint)
    merged = torch_process.logits_of(tmp_path / "merged", tokens, tmp_path)
    np.testing.assert_allclose(merged, want, atol=1e-5)
    opened = torch_process.logits_of(checkpoint, tokens, tmp_path, tmp_path / "adapter")
    np.testing.assert_allclose(opened, want, atol=1e-5)
