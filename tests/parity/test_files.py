"""Files that the real PEFT writes in ways the samples do not show, and what it makes of ours."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from huggingface_hub import ModelCard

import loha_jax
from loha_jax import LoHaConfig, interop
from tests.parity.models import jax_params, torch_output

WIDTH = 6


class Net(torch.nn.Module):
    """A Linear to adapt, two modules whose names end alike, a nested head with statistics."""

    def __init__(self):
        super().__init__()
        self.q = torch.nn.Linear(WIDTH, WIDTH)
        self.overhead = torch.nn.Linear(WIDTH, WIDTH)
        self.head = torch.nn.Sequential(
            torch.nn.Linear(WIDTH, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)
        )

    def forward(self, x):
        return self.head(torch.tanh(self.overhead(torch.tanh(self.q(x)))))


def forward(params, x):
    def dense(p, x):
        return x @ jnp.asarray(p["kernel"]) + p["bias"]

    norm = params["head"]["1"]
    x = dense(
        params["head"]["0"], jnp.tanh(dense(params["overhead"], jnp.tanh(dense(params["q"], x))))
    )
    x = (x - norm["mean"]) / jnp.sqrt(jnp.asarray(norm["var"]) + 1e-5) * norm["scale"] + norm[
        "bias"
    ]
    return dense(params["head"]["2"], x)


def wrapped(dtype=torch.float32, **kwargs):
    """PEFT's model after a step in training mode, and the base parameters in JAX.

    The step moves the statistics.
    """
    torch.manual_seed(0)
    module = Net().to(dtype)
    base = jax_params(module) if dtype != torch.bfloat16 else None
    config = peft.LoHaConfig(r=2, target_modules=["q"], init_weights=False, **kwargs)
    model = peft.get_peft_model(module, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hada_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape))
        model.train()
        model(torch.randn(8, WIDTH, dtype=dtype))
    return model.eval(), base


X = np.random.default_rng(0).standard_normal((5, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("safe_serialization", [True, False], ids=["safetensors", "bin"])
def test_nested_saved_modules_of_peft(safe_serialization, tmp_path):
    """Nested saved modules of PEFT load with those found by their ending."""
    model, base = wrapped(modules_to_save=["head"])
    model.save_pretrained(tmp_path, safe_serialization=safe_serialization)
    loaded = interop.load_peft(tmp_path, base)
    assert isinstance(loaded["overhead"]["kernel"], loha_jax.SavedWeight)
    want = torch_output(model, X)
    for params in (loaded, loha_jax.merge(loaded)):
        np.testing.assert_allclose(forward(params, X), want, rtol=0, atol=1e-5 * np.abs(want).max())
    interop.save_peft(tmp_path / "again", loaded)
    opened = peft.PeftModel.from_pretrained(Net(), tmp_path / "again")
    theirs, ours = (peft.get_peft_model_state_dict(m) for m in (model, opened))
    assert theirs.keys() == ours.keys()
    for key in theirs:
        assert torch.equal(theirs[key], ours[key]), key
    assert ours["base_model.model.head.1.num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_heads_of_a_task(task_type, tmp_path):
    """The heads of a task are written as PEFT writes them and never twice."""
    head = "qa_outputs" if task_type == "QUESTION_ANS" else "classifier"

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q = torch.nn.Linear(WIDTH, WIDTH)
            self.add_module(head, torch.nn.Linear(WIDTH, 2))

        def prepare_inputs_for_generation(self):
            raise NotImplementedError

    base = jax_params(Model())
    model = peft.get_peft_model(Model(), peft.LoHaConfig(target_modules=["q"], task_type=task_type))
    model.save_pretrained(tmp_path / "peft")
    ours = loha_jax.inject(
        base, LoHaConfig(target_modules=["q"], task_type=task_type), key=jax.random.key(0)
    )
    interop.save_peft(tmp_path / "ours", ours)
    configs = [
        json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("peft", "ours")
    ]
    assert configs[0] == configs[1]
    again = interop.load_peft(tmp_path / "ours", base)  # PEFT's list grows with every load and save
    interop.save_peft(tmp_path / "again", again)
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text()) == configs[1]
    grown = configs[1] | {"modules_to_save": configs[1]["modules_to_save"] * 2}
    assert LoHaConfig.from_dict(grown).modules_to_save == tuple(configs[1]["modules_to_save"])


def test_the_hubs_reader_opens_our_model_card(tmp_path):
    """The hub's own reader opens our model card and PEFT adds to it."""
    base = {"q": {"kernel": jnp.ones((WIDTH, WIDTH)), "bias": jnp.zeros(WIDTH)}}
    config = LoHaConfig(
        r=2, target_modules=["q"], base_model_name_or_path="org/base: a name", task_type="CAUSAL_LM"
    )
    interop.save_peft(tmp_path, loha_jax.inject(base, config, key=jax.random.key(0)))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model == "org/base: a name"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["base_model:adapter:org/base: a name"]
    model, _ = wrapped()
    model.save_pretrained(tmp_path)
    assert "loha-jax" in ModelCard.load(tmp_path / "README.md").text


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
)
def test_factor_dtypes_are_pefts(dtype):
    module = torch.nn.ModuleDict({"q": torch.nn.Linear(WIDTH, WIDTH, bias=False)}).to(dtype)
    model = peft.get_peft_model(module, peft.LoHaConfig(target_modules=["q"]))
    theirs = {
        str(p.dtype).removeprefix("torch.") for n, p in model.named_parameters() if "hada_" in n
    }
    with jax.enable_x64(True):
        kernel = jnp.ones((WIDTH, WIDTH), str(dtype).removeprefix("torch."))
        leaf = loha_jax.inject(
            {"q": {"kernel": kernel}}, LoHaConfig(target_modules=["q"]), key=jax.random.key(0)
        )
        ours = {str(t.dtype) for t in leaf["q"]["kernel"].adapters["default"].tensors.values()}
    assert ours == theirs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_merged_weights_in_low_precision_are_pefts_bit_for_bit(dtype, tmp_path):
    torch.manual_seed(0)
    module = torch.nn.ModuleDict({"q": torch.nn.Linear(WIDTH, WIDTH, bias=False)}).to(dtype)
    kernel = jnp.asarray(module["q"].weight.detach().float().numpy().T).astype(
        str(dtype).removeprefix("torch.")
    )
    model = peft.get_peft_model(
        module, peft.LoHaConfig(r=2, alpha=2, target_modules=["q"], init_weights=False)
    )
    model.save_pretrained(tmp_path)
    merged = loha_jax.merge(interop.load_peft(tmp_path, {"q": {"kernel": kernel}}))["q"]["kernel"]
    theirs = model.merge_and_unload()["q"].weight.detach().float().numpy().T
    np.testing.assert_array_equal(np.asarray(merged, np.float32), theirs)


def test_an_adapter_of_another_name_is_in_its_own_folder_as_pefts(tmp_path):
    model, base = wrapped()
    model.add_adapter(
        "style", peft.LoHaConfig(r=1, target_modules=["overhead"], init_weights=False)
    )
    model.save_pretrained(tmp_path / "peft")
    both = interop.load_peft(tmp_path / "peft", base)
    both = interop.load_peft(tmp_path / "peft" / "style", both, adapter_name="style")
    interop.save_peft(tmp_path / "ours", both)
    names = [
        sorted(str(p.relative_to(tmp_path / f)) for p in (tmp_path / f).rglob("*") if p.is_file())
        for f in ("peft", "ours")
    ]
    assert names[0] == names[1]
    for file in ("adapter_model.safetensors", "style/adapter_model.safetensors"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "peft" / file).read_bytes()
