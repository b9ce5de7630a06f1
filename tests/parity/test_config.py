"""`LoHaConfig` and the default targets against the real PEFT's."""

import dataclasses

import peft
import pytest

from loha_jax import LoHaConfig
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
