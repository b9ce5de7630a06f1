"""Small base checkpoints and the trees that they fit."""

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file


def write(folder, tensors, name="model.safetensors"):
    folder.mkdir(exist_ok=True)
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / name)
    return folder


def small(folder):
    rng = np.random.default_rng(0)
    tensors = {
        "a.weight": rng.standard_normal((4, 3), np.float32),
        "a.bias": rng.standard_normal(4, np.float32),
        "b.weight": rng.standard_normal((2, 4), np.float32),
    }
    tree = {
        "a": {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)},
        "b": {"kernel": jnp.zeros((4, 2))},
    }
    return write(folder, tensors), tree, tensors
