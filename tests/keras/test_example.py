"""The script of examples/trainers runs as docs/trainers.md says."""

import runpy
import sys
from pathlib import Path

from safetensors.numpy import load_file

SCRIPT = Path(__file__).parents[2] / "examples" / "trainers" / "keras_fit.py"


def test_keras_fit(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--steps", "5", "--out", str(tmp_path)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    first, last = capsys.readouterr().out.split(",")[0].removeprefix("loss: ").split(" -> ")
    assert float(last) < float(first)
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == 8
