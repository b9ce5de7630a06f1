"""`LoHaConfig` and the default targets against the real PEFT's."""

import dataclasses

import jax
import numpy as np
import peft
import pytest
import torch

import loha_jax
from loha_jax import LoHaConfig, interop
from loha_jax.targets.matching import DEFAULT_TARGET_MODULES


def peft_json(folder, **kwargs):
    """The text that the real PEFT writes for a config."""
    config = peft.LoHaConfig(**kwargs)
    config.save_pretrained(folder)
    return (folder / "adapter_config.json").read_text()


def test_fields_and_defaults_are_pefts():
    theirs = {f.name: f for f in dataclasses.fields(peft.LoHaConfig)}
    ours = {f.name: f for f in dataclasses.fields(LoHaConfig)}
    assert list(ours) == list(theirs)
    default, reference = LoHaConfig(), peft.LoHaConfig()
    for name in ours:
        want = getattr(reference, name)
        assert getattr(default, name) == (want.value if name == "peft_type" else want), name


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"r": 4, "alpha": 1.5, "target_modules": ["q"], "modules_to_save": ["head", "norm"]},
        {"target_modules": r".*\.(q|v)", "exclude_modules": "x.*", "task_type": "CAUSAL_LM"},
        {"target_modules": ["q"], "layers_to_transform": [0, 2], "layers_pattern": ["h", "layers"]},
        {
            "target_modules": ["q"],
            "layers_to_transform": 1,
            "layers_pattern": "h",
            "use_effective_conv2d": True,
        },
        {
            "rank_pattern": {"z": 3, "a": 2},
            "alpha_pattern": {"^q": 7},
            "init_weights": False,
            "rank_dropout": 0.1,
        },
        {
            "module_dropout": 0.25,
            "inference_mode": True,
            "revision": "main",
            "base_model_name_or_path": "org/base",
        },
    ],
)
def test_json_is_pefts_letter_for_letter(tmp_path, kwargs):
    assert LoHaConfig(**kwargs).to_json() == peft_json(tmp_path, **kwargs)


def test_default_targets_are_pefts():
    theirs = peft.utils.constants.TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING
    ours = {k: v if isinstance(v, str) else list(v) for k, v in DEFAULT_TARGET_MODULES.items()}
    assert {k: v if isinstance(v, str) else sorted(v) for k, v in ours.items()} == {
        k: v if isinstance(v, str) else sorted(v) for k, v in theirs.items()
    }


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("init_weights", ["lycoris", "calibrated", "abba"])
def test_peft_opens_an_adapter_whose_initial_values_it_does_not_know(
    tmp_path, init_weights, low_cpu_mem_usage
):
    config = LoHaConfig(r=2, target_modules=["q"], init_weights=init_weights)
    weight = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)
    params = loha_jax.inject({"q": {"kernel": weight.T}}, config, key=jax.random.key(0))
    factors, rest = loha_jax.partition(params)
    params = loha_jax.combine(jax.tree.map(lambda x: x + 0.1, factors), rest)  # as if trained
    interop.save_peft(tmp_path, params)
    model = torch.nn.ModuleDict({"q": torch.nn.Linear(6, 5, bias=False)})
    model["q"].weight.data = torch.tensor(weight)
    model = peft.PeftModel.from_pretrained(model, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    merged = model.merge_and_unload()["q"].weight.detach().numpy()
    want = np.asarray(loha_jax.merge(params)["q"]["kernel"]).T
    np.testing.assert_allclose(merged, want, rtol=1e-6)
    assert LoHaConfig.from_pretrained(tmp_path).init_weights == init_weights
