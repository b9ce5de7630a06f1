"""LyCORIS files of modules with random factors."""

import numpy as np
from safetensors.numpy import save_file


def factors(out=3, into=3, r=1):
    random = np.random.default_rng(out + into)
    shapes = {
        "hada_w1_a": (out, r),
        "hada_w1_b": (r, into),
        "hada_w2_a": (out, r),
        "hada_w2_b": (r, into),
    }
    return {
        part: random.standard_normal(shape).astype(np.float32) for part, shape in shapes.items()
    }


def written(tmp_path, modules, metadata=None):
    state = {
        f"{name}.{part}": tensor
        for name, tensors in modules.items()
        for part, tensor in tensors.items()
    }
    save_file(state, tmp_path / "adapter.safetensors", metadata)
    return tmp_path / "adapter.safetensors"
