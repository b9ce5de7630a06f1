"""A torch module that trains through torchax, and opens in the real PEFT."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_torch_module_trains_through_torchax_and_opens_in_peft(tmp_path):
    program = [sys.executable, Path(__file__).with_name("torchax_process.py"), tmp_path]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "helpers")))
    done = subprocess.run(
        program, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
