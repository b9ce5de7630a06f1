"""Runs of the command line in this process, and small files for it."""

import json

import lycoris_samples
import numpy as np
import pytest
from peft_samples import Sample
from typer.testing import CliRunner

from loha_jax import LoHaConfig
from loha_jax.interop.commands.main import app
from loha_jax.interop.disk.tensor_files import safetensors_bytes

LINEAR = Sample("linear")
BASE = LINEAR.folder / "base.safetensors"
NATIVE = lycoris_samples.DATA / "native_plain.safetensors"
NATIVE_BASE = lycoris_samples.DATA / "base_tiny.safetensors"
ONE = np.ones((3, 3), np.float32)


def run(*arguments, code=0):
    """Standard output and standard error of a run in this process."""
    result = CliRunner().invoke(
        app, [str(a) for a in arguments], env={"COLUMNS": "100", "NO_COLOR": "1"}
    )
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result.stdout, result.stderr


def run_json(*arguments, code=0):
    """The document, which is all there is on standard output."""
    out, _ = run(*arguments, "--json", code=code)
    return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def peft_folder(folder, tensors, **config):
    folder.mkdir()
    state = {f"base_model.model.{key}": value for key, value in tensors.items()}
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(state, {}))
    config = {"r": 3, "target_modules": ["q"], **config}
    (folder / "adapter_config.json").write_text(LoHaConfig(**config).to_json())
    return folder


def factors(name="q", **changed):
    return {
        f"{name}.{part}": changed.get(part, ONE)
        for part in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    }
