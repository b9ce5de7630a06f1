"""The scripts of examples/trainers run as docs/trainers.md says, with few steps."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

FOLDER = Path(__file__).parents[2] / "examples" / "trainers"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run a script here, and return what it prints and the tensors of its adapter."""

    def run(name, steps):
        out = tmp_path / name
        arguments = [f"{name}.py", "--steps", str(steps), "--out", str(out)]
        monkeypatch.setattr(sys, "argv", arguments)
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out, tensors_of(out)

    return run


def tensors_of(out):
    """The tensors of an adapter in PEFT's format."""
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LOHA"
    return load_file(out / "adapter" / "adapter_model.safetensors")


def losses_in(text):
    return tuple(map(float, re.search(r"loss: (\S+) -> (\S+)", text).groups()))


def test_sft(run):
    """The loss falls; a second run goes on where the first one ended. The names are torch's."""
    text, first = run("tunix_sft", 3)
    assert "starts at step 0" in text
    start, end = losses_in(text)
    assert end < start
    assert len(first) == 2 * 3 * 4  # layers, modules, factors
    attention, mlp = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.gate_proj"
    assert {f"base_model.model.{name}.hada_w1_a" for name in (attention, mlp)} <= first.keys()
    text, second = run("tunix_sft", 5)
    assert "starts at step 3" in text
    assert losses_in(text)[1] < end
    assert first.keys() == second.keys()


def test_qloha(run):
    text, tensors = run("qloha_nf4", 3)
    start, end = losses_in(text)
    assert end < start
    assert len(tensors) == 2 * 2 * 4
    assert "merged: float32" in text


def test_grpo_on_one_mesh(run):
    text, tensors = run("tunix_grpo", 2)
    check_grpo(text, tensors)


def test_grpo_on_two_meshes(tmp_path):
    """In a process of its own, which makes its two devices."""
    command = [sys.executable, "-W", "ignore", FOLDER / "tunix_grpo.py", "--steps", "2"]
    command += ["--meshes", "2", "--out", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    check_grpo(result.stdout, tensors_of(tmp_path))


def check_grpo(text, tensors):
    """Rewards are printed, and the factors that begin at zero have changed."""
    assert re.search(r"mean reward: [\d.]+ -> [\d.]+", text)
    first = [tensor for name, tensor in tensors.items() if name.endswith("hada_w2_a")]
    assert len(first) == 4
    assert all(tensor.any() for tensor in first)
