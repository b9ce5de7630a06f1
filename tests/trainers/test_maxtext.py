"""MaxText's own models in its own trainer (`train_sft`), with its own synthetic data.

The script that users start from trains them: examples/trainers/maxtext_scanned.py. The reference is
MaxText's base model with W + ΔW by PEFT's formula, in numpy, from the adapter's file.
"""

import dataclasses
import functools
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx
from flax.core.spmd import logical_axis_rules
from maxtext.common import checkpointing
from maxtext.trainers.post_train.sft import train_sft
from maxtext.utils import lora_utils, model_creation_utils
from safetensors.numpy import load_file

import loha_jax
from loha_jax import LoHaConfig, interop
from loha_jax.nnx.variables import values_of
from tests.trainers import torch_process

# MaxText 0.2.5 was written for earlier versions of Flax.
THEIRS = "(maxtext|flax|jax|optax|orbax|tunix)"
pytestmark = pytest.mark.filterwarnings(rf"ignore::DeprecationWarning:{THEIRS}\..*")

EXAMPLE = Path(__file__).parents[2] / "examples/trainers/maxtext_scanned.py"
RANK, ALPHA, LAYERS, STEPS = 4, 8.0, 2, 20
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 8)))
KERNELS = (
    "mlp.wi_0",
    "mlp.wo",
    "self_attention.query",
    "self_attention.value",
    "self_attention.out",
)
PATH = "lora.lora_module_path='.*(query|value|out|wi_0|wo)'"
CASES = {
    "scanned": ["scan_layers=true"],
    "unscanned": ["scan_layers=false"],
    "int8": ["scan_layers=true", "lora.lora_weight_qtype=int8"],
    "inject": ["scan_layers=true"],
}


def with_inject(model, mesh, config):
    """An adapter by `loha_jax.nnx.inject`, in the place of MaxText's function for LoRA."""
    targets = [name.rpartition(".")[2] for name in KERNELS]
    loha = LoHaConfig(r=RANK, alpha=ALPHA, target_modules=targets)
    return loha_jax.nnx.inject(model, loha, rngs=nnx.Rngs(5))


@dataclasses.dataclass(eq=False)
class Run:
    """A trained model.

    Attributes:
        case: a key of CASES.
        example: the globals of the example.
        folder: of its checkpoints.
        settings: for MaxText.
        before: the arrays that are not to be trained, before the training.
        losses: before and after it.
    """

    case: str
    example: dict
    folder: Path
    settings: list
    trainer: train_sft.MaxTextPeftTrainer
    mesh: jax.sharding.Mesh
    before: dict
    losses: tuple

    @property
    def model(self):
        return self.trainer.model

    @property
    def config(self):
        return self.trainer.training_hooks.config

    def layer(self, n):
        """The attribute of the decoder that has a layer."""
        return "layers" if self.config.scan_layers else f"layers_{n}"

    def names(self, n):
        """The beginning of the names of a layer's modules in files."""
        return f"decoder.layers.{n}" if self.config.scan_layers else f"decoder.layers_{n}"

    def logits(self, model):
        with jax.set_mesh(self.mesh), logical_axis_rules(self.config.logical_axis_rules):
            positions = jnp.broadcast_to(jnp.arange(IDS.shape[1]), IDS.shape)
            out = model(IDS, positions, decoder_segment_ids=jnp.ones_like(IDS))
        nnx.pop(model, nnx.Intermediate)
        return np.asarray(out)


def frozen(model):
    """All arrays but the factors and what belongs to the run itself, by path."""
    others = (nnx.LoRAParam, nnx.RngState, nnx.Intermediate)
    return {
        path: np.asarray(node.get_value())
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Variable) and not isinstance(node, others)
    }


def run(case, folder):
    """Train by the example."""
    example = runpy.run_path(str(EXAMPLE))
    seen = {}

    class Trainer(train_sft.MaxTextPeftTrainer):
        """MaxText's trainer, which notes what it starts from."""

        def train(self, *args, **kwargs):
            seen["before"] = frozen(self.model)
            seen["batch"] = self.data_hooks.train_data_loader.load_next_batch()
            seen["loss"] = self.loss_fn(self.model, **seen["batch"])[0]
            nnx.pop(self.model, nnx.Intermediate)
            return super().train(*args, **kwargs)

    settings = [f"steps={STEPS}", PATH, *CASES[case]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_sft, "MaxTextPeftTrainer", Trainer)
        if case == "inject":
            patch.setattr(lora_utils, "apply_lora_to_model", with_inject)
        trainer, mesh = example["train"](folder, settings)
    rules = trainer.training_hooks.config.logical_axis_rules
    with jax.set_mesh(mesh), logical_axis_rules(rules):
        last = trainer.loss_fn(trainer.model, **seen["batch"])[0]
    nnx.pop(trainer.model, nnx.Intermediate)
    losses = float(seen["loss"]), float(last)
    return Run(case, example, folder, settings, trainer, mesh, seen["before"], losses)


@pytest.fixture(scope="module", params=CASES)
def trained(request, tmp_path_factory):
    return run(request.param, tmp_path_factory.mktemp(request.param))


def update(tensors, module):
    """ΔW `[out, in]` of a module in an adapter's file, by PEFT's formula."""
    a1, b1, a2, b2 = (
        tensors[f"base_model.model.{module}.hada_{part}"].astype(np.float64)
        for part in ("w1_a", "w1_b", "w2_a", "w2_b")
    )
    return (a1 @ b1) * (a2 @ b2) * (ALPHA / RANK)


@functools.cache
def base(trained):
    """MaxText's base model, as the trainer has made it."""
    return model_creation_utils.from_pretrained(trained.config, mesh=trained.mesh)


def base_with_updates(trained, tensors):
    """The base model with ΔW of a file added to its kernels."""
    model = nnx.clone(base(trained))
    for name in KERNELS:
        for n in range(LAYERS):
            own, ours = (at(m, trained.layer(n), name) for m in (model, trained.model))
            if not isinstance(ours, nnx.Variable) and n == 0:  # quantised: what its numbers mean
                own.set_value(qwix.dequantize(values_of(ours).array))
            weight = np.array(own.get_value())
            layer = weight[:, n] if trained.config.scan_layers else weight
            layer += update(tensors, f"{trained.names(n)}.{name}").T.reshape(layer.shape)
            own.set_value(jnp.asarray(weight))
    return model


def at(model, layer, name):
    """The kernel of a module of a layer."""
    node = getattr(model.decoder, layer)
    for part in name.split("."):
        node = getattr(node, part)
    return node.kernel


def test_only_the_factors_are_trained(trained):
    """The loss falls by a tenth; no array of the base changes, and the optimizer has none."""
    first, last = trained.losses
    print(f"\n{trained.case}: loss {first:.3f} -> {last:.3f} in {STEPS} steps")
    assert last < 0.9 * first
    assert trained.trainer.train_steps == STEPS
    after = frozen(trained.model)
    assert after.keys() == trained.before.keys()
    for path, array in trained.before.items():
        np.testing.assert_array_equal(after[path], array, err_msg=str(path))
    quantised = [array for array in after.values() if array.dtype == np.int8]
    assert len(quantised) == (len(KERNELS) if trained.case == "int8" else 0)
    factors = jax.tree.leaves(nnx.state(trained.model, nnx.LoRAParam))
    assert len(factors) == 4 * len(KERNELS) * (1 if trained.config.scan_layers else LAYERS)
    state = jax.tree.leaves(nnx.state(trained.trainer.optimizer, nnx.optimizer.OptState))
    counts = [x.size for x in state if x.ndim > 1]
    assert sum(counts) == 2 * sum(x.size for x in factors)  # the two moments of AdamW


def test_export(trained, tmp_path):
    """PEFT's file, added to MaxText's base by hand: the logits of the trained model."""
    interop.save_peft(tmp_path, trained.model)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 4 * len(KERNELS) * LAYERS
    ours = trained.logits(trained.model)
    assert abs(ours - trained.logits(base(trained))).max() > 0.1
    np.testing.assert_allclose(
        ours, trained.logits(base_with_updates(trained, tensors)), rtol=0, atol=1e-5
    )
    if trained.case != "int8":
        module = next(iter(tensors)).removeprefix("base_model.model.").rpartition(".")[0]
        theirs = torch_process.update_of(tmp_path, module, tmp_path)
        np.testing.assert_allclose(update(tensors, module), theirs, rtol=0, atol=1e-5)


def test_functions_of_the_library(trained, tmp_path):
    """A file as a second adapter, files of LoRA, a merged model, `summary` and `explain`."""
    model, ours = nnx.clone(trained.model), trained.logits(trained.model)
    text = str(loha_jax.summary(model))
    for name in KERNELS:
        assert f"{trained.names(0)}.{name}" in text
    if trained.case == "inject":
        positions = jnp.broadcast_to(jnp.arange(IDS.shape[1]), IDS.shape)
        with jax.set_mesh(trained.mesh), logical_axis_rules(trained.config.logical_axis_rules):
            explained = loha_jax.explain(lambda m, x: m(x, positions), model, IDS)
        assert (explained.dense, explained.unused) == ((), ())
    interop.save_peft(tmp_path, model)
    interop.load_peft(tmp_path, model, adapter_name="other")
    np.testing.assert_allclose(trained.logits(model), ours, rtol=0, atol=1e-5)
    loha_jax.set_adapter(model, "default")
    loha_jax.delete_adapter(model, "other")
    lora = tmp_path / "lora"
    interop.save_lora(lora, model)
    tensors = load_file(lora / "adapter_model.safetensors")
    module = f"{trained.names(1)}.mlp.wo"
    product = (
        tensors[f"base_model.model.{module}.lora_B.weight"].astype(np.float64)
        @ tensors[f"base_model.model.{module}.lora_A.weight"]
    )
    loha = load_file(tmp_path / "adapter_model.safetensors")
    np.testing.assert_allclose(product, update(loha, module), rtol=0, atol=1e-5)
    merged = loha_jax.merge(model)
    assert not nnx.to_flat_state(nnx.state(merged, nnx.LoRAParam))
    np.testing.assert_allclose(trained.logits(merged), ours, rtol=0, atol=1e-5)


def test_checkpoints(trained):
    """MaxText's filter takes the factors alone, and a second run resumes from them."""
    kept = checkpointing._filter_lora_trainable_state(nnx.state(trained.model))
    factors = nnx.to_flat_state(nnx.state(trained.model, nnx.LoRAParam))
    assert [path for path, _ in nnx.to_flat_state(kept)] == [path for path, _ in factors]
    if trained.case != "int8":
        return
    again, _ = trained.example["train"](trained.folder, trained.settings)
    assert again.train_steps == STEPS
    resumed = dict(nnx.to_flat_state(nnx.state(again.model, nnx.LoRAParam)))
    for path, factor in factors:
        np.testing.assert_array_equal(resumed[path].get_value(), factor.get_value())
