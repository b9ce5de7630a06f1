"""PyTorch, PEFT and transformers in a process of another environment.

Where the trainers run, PyTorch would be gigabytes of CUDA. `PYTHON_WITH_PEFT` names the Python of
an environment that has it, as `python run.py test-newest` does.
"""

import atexit
import functools
import json
import os
import subprocess
from pathlib import Path

import numpy as np

SCRIPT = Path(__file__).with_name("in_torch.py")


def save_checkpoint(folder):
    """Write transformers' folder of a tiny Qwen3 with random weights."""
    _run("checkpoint", folder)


def logits_of(checkpoint, tokens, folder, adapter=None):
    """Return the logits of transformers' model, with an adapter that PEFT opens if one is given.

    Files are written into `folder`.
    """
    np.save(folder / "tokens.npy", np.array(tokens))
    given = () if adapter is None else (adapter,)
    _run("logits", checkpoint, folder / "tokens.npy", folder / "logits.npy", *given)
    return np.load(folder / "logits.npy")


def update_of(adapter, module, folder):
    """Return PEFT's ΔW of a module of an adapter, [out, in]."""
    _run("update", adapter, module, folder / "update.npy")
    return np.load(folder / "update.npy")


def _run(*arguments):
    process = _process()
    print(json.dumps([str(argument) for argument in arguments]), file=process.stdin, flush=True)
    if not any(line == "done\n" for line in process.stdout):
        raise RuntimeError(f"{SCRIPT} has failed, see its traceback: {arguments}")


@functools.cache
def _process():
    """Start the process, once: its imports take longer than all that it is asked for."""
    command = [os.environ["PYTHON_WITH_PEFT"], SCRIPT]
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    atexit.register(process.communicate)  # which closes its input, and so ends it
    return process
