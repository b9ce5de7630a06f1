"""Base checkpoints of scaled float8, and adapters for them."""

import json
import math

import ml_dtypes
import numpy as np

from loha_jax import LoHaConfig
from loha_jax.interop.disk.tensor_files import safetensors_bytes

E4M3, E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)
RANDOM = np.random.default_rng(5)


def normal(*shape, scale=1.0):
    return (scale * RANDOM.standard_normal(shape)).astype(np.float32)


def spread(scale, shape, block):
    """A scale in a weight's shape, by index arithmetic: scale[..., i // block]."""
    if scale.size == 1:
        return np.full(shape, scale.reshape(()).astype(np.float32))
    rows = np.arange(shape[0])[:, None] // block[0]
    if scale.ndim == 1:
        scale = scale[:, None]
    return scale.astype(np.float32)[rows, np.arange(shape[1])[None] // block[1] % scale.shape[1]]


FORMS = {
    "tensor": ("weight_scale", (), None, {}),
    "one": ("weight_scale", (1,), None, {"quant_method": "modelopt"}),
    "comfy": ("scale_weight", (1,), None, None),
    "row": (
        "weight_scale",
        (20, 1),
        None,
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
    ),
    "rows": ("weight_scale", (20,), None, {"quant_method": "fbgemm_fp8"}),
    "blocks": (
        "weight_scale_inv",
        (3, 2),
        (8, 16),
        {"quant_method": "fp8", "weight_block_size": [8, 16]},
    ),
    "powers": (
        *("weight_scale_inv", (3, 2), (8, 16)),
        {"quant_method": "fp8", "weight_block_size": [8, 16], "scale_fmt": "ue8m0"},
    ),
}
SHAPE = (20, 28)


def quantised(form, dtype=E4M3, scale_dtype=np.float32):
    name, shape, block, config = FORMS[form]
    size = block or (1 if math.prod(shape) > 1 else 64, 64)
    weight = normal(*SHAPE, scale=0.05) * np.exp(normal(SHAPE[0], 1))
    limit = float(ml_dtypes.finfo(dtype).max)
    tiles = (-(-SHAPE[0] // size[0]), -(-SHAPE[1] // size[1]))
    scale = np.zeros(tiles, np.float32)
    for i, j in np.ndindex(tiles):
        tile = weight[i * size[0] : (i + 1) * size[0], j * size[1] : (j + 1) * size[1]]
        scale[i, j] = np.abs(tile).max() / limit
    if form == "powers":
        scale = np.exp2(np.ceil(np.log2(scale)))
    scale = scale.reshape(shape).astype(scale_dtype)
    full = spread(scale, SHAPE, size)
    values = np.clip(weight / full, -limit, limit).astype(dtype)
    return {"q.weight": values, f"q.{name}": scale}, values.astype(np.float32) * full, size, config


def write(folder, tensors, quantization=None, **config):
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors, {"format": "pt"}))
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def adapter(folder, names=("q",), shape=SHAPE, scale=1.0):
    folder.mkdir()
    state = {}
    for name in names:
        for n in "12":
            state[f"base_model.model.{name}.hada_w{n}_a"] = normal(shape[0], 2) * np.sqrt(scale)
            state[f"base_model.model.{name}.hada_w{n}_b"] = normal(2, shape[1])
    text = LoHaConfig(r=2, alpha=2, target_modules=list(names)).to_json()
    (folder / "adapter_config.json").write_text(text)
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(state, {"format": "pt"}))
    first = f"base_model.model.{names[0]}.hada_w"
    a = state[f"{first}1_a"].astype(np.float64) @ state[f"{first}1_b"]
    return folder, a * (state[f"{first}2_a"].astype(np.float64) @ state[f"{first}2_b"])
