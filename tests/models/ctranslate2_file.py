"""Reads CTranslate2's model files, and Whisper's weights out of them with transformers' names."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
_VERSION = 6


class _Reader:
    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def number(self, kind: str) -> int:
        (value,) = struct.unpack_from(f"<{kind}", self.data, self.at)
        self.at += struct.calcsize(f"<{kind}")
        return value

    def string(self) -> str:
        length = self.number("H")
        self.at += length
        return self.data[self.at - length : self.at].rstrip(b"\0").decode()

    def array(self) -> np.ndarray:
        shape = [self.number("I") for _ in range(self.number("B"))]
        dtype = np.dtype(_DTYPES[self.number("B")])
        size = self.number("I")
        self.at += size
        return np.frombuffer(self.data, dtype, size // dtype.itemsize, self.at - size).reshape(
            shape
        )


def read_variables(path: Path) -> dict[str, np.ndarray]:
    """The variables of a `model.bin`.

    Its version, the model's kind and revision, their number, then each in turn.

    Raises:
        ValueError: the file is of another version of the format.
    """
    reader = _Reader(path.read_bytes())
    if (version := reader.number("I")) != _VERSION:
        raise ValueError(f"{path} is of version {version}; this reads version {_VERSION}")
    reader.string()
    reader.number("I")
    return {reader.string(): reader.array() for _ in range(reader.number("I"))}


def whisper_weights(variables: dict[str, np.ndarray], layers: int) -> dict[str, np.ndarray]:
    """transformers' state dict.

    CTranslate2 fuses q, k and v (k and v where another sequence is attended to).
    """
    weights: dict[str, np.ndarray] = {}

    def put(name: str, values: np.ndarray) -> None:
        weights[name] = values.astype(np.float32)

    def norm(ours: str, theirs: str) -> None:
        put(f"{ours}.weight", variables[f"{theirs}/gamma"])
        put(f"{ours}.bias", variables[f"{theirs}/beta"])

    def linear(theirs: str, *ours: str) -> None:
        for part in ("weight", "bias"):
            pieces = np.split(variables[f"{theirs}/{part}"], len(ours))
            for name, piece in zip(ours, pieces, strict=True):
                if not (
                    part == "bias" and name.endswith("k_proj")
                ):  # Whisper's keys have no bias: zeros there
                    put(f"{name}.{part}", piece)

    for side in ("encoder", "decoder"):
        put(
            f"model.{side}.embed_positions.weight",
            variables[f"{side}/position_encodings/encodings"],
        )
        norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        for n in range(layers):
            theirs, ours = f"{side}/layer_{n}", f"model.{side}.layers.{n}"
            norm(f"{ours}.self_attn_layer_norm", f"{theirs}/self_attention/layer_norm")
            linear(
                f"{theirs}/self_attention/linear_0", *(f"{ours}.self_attn.{p}_proj" for p in "qkv")
            )
            linear(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
            norm(f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm")
            linear(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            linear(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
            if side == "decoder":
                norm(f"{ours}.encoder_attn_layer_norm", f"{theirs}/attention/layer_norm")
                linear(f"{theirs}/attention/linear_0", f"{ours}.encoder_attn.q_proj")
                linear(
                    f"{theirs}/attention/linear_1", *(f"{ours}.encoder_attn.{p}_proj" for p in "kv")
                )
                linear(f"{theirs}/attention/linear_2", f"{ours}.encoder_attn.out_proj")
    for conv in ("conv1", "conv2"):
        for part in ("weight", "bias"):
            put(f"model.encoder.{conv}.{part}", variables[f"encoder/{conv}/{part}"])
    put("model.decoder.embed_tokens.weight", variables["decoder/embeddings/weight"])
    weights["proj_out.weight"] = weights["model.decoder.embed_tokens.weight"]
    return weights
