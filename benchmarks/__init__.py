"""Measurements of loha-jax beside PEFT and LyCORIS: `python -m benchmarks`. See README.md."""

import os

# Read when jax and transformers are imported.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX and PyTorch share a GPU
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no model comes from a hub
os.environ.setdefault(
    "TRANSFORMERS_VERBOSITY", "error"
)  # it would say that transformers 5 drops Flax
