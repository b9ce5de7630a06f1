"""Shared by the tests in tests/interop/merge: models, trees and references."""

import json

import ml_dtypes
import numpy as np
import pytest

from loha_jax import LoHaConfig
from loha_jax.interop.disk.base_checkpoint import Checkpoint
from loha_jax.interop.disk.checkpoint_writer import CheckpointWriter
from loha_jax.interop.disk.tensor_files import safetensors_bytes
from loha_jax.interop.merge.files import merge_checkpoint

BF16 = np.dtype(ml_dtypes.bfloat16)


RANDOM = np.random.default_rng(7)


def normal(*shape, dtype=np.float32, scale=1.0):
    return (scale * RANDOM.standard_normal(shape)).astype(dtype)


def loha(out, in_, r=3, dtype=np.float32):
    a, b = (
        [normal(out, r, dtype=dtype) for _ in range(2)],
        [normal(r, in_, dtype=dtype) for _ in range(2)],
    )
    return {"hada_w1_a": a[0], "hada_w1_b": b[0], "hada_w2_a": a[1], "hada_w2_b": b[1]}


def delta(tensors, scale):
    """ΔW in float64."""
    t = {key: value.astype(np.float64) for key, value in tensors.items()}
    if "lora_A.weight" in t:
        return scale * (t["lora_B.weight"] @ t["lora_A.weight"])
    return scale * (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])


def write_adapter(folder, modules, alpha=6, others=None, **config):
    """A PEFT folder of modules with one rank."""
    folder.mkdir()
    state = {
        f"base_model.model.{name}.{part}": t
        for name, parts in modules.items()
        for part, t in parts.items()
    }
    state |= {f"base_model.model.{key}": value for key, value in (others or {}).items()}
    parts = next(iter(modules.values()))
    if "lora_A.weight" in parts:
        r = len(parts["lora_A.weight"])
        text = json.dumps(
            {
                "peft_type": "LORA",
                "r": r,
                "lora_alpha": alpha,
                "target_modules": list(modules),
                **config,
            }
        )
    else:
        text = LoHaConfig(
            r=len(parts["hada_w1_b"]), alpha=alpha, target_modules=list(modules), **config
        ).to_json()
    (folder / "adapter_config.json").write_text(text)
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(state, {"format": "pt"}))
    return folder


def write_base(folder, tensors, shard_size=1 << 30, config=None):
    folder.mkdir()
    described = [(key, value.dtype, value.shape) for key, value in tensors.items()]
    with CheckpointWriter(
        folder, described, shard_size, metadata={"format": "pt", "note": "kept"}
    ) as writer:
        for key, value in tensors.items():
            writer.write(key, value)
        writer.commit()
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def read_all(path):
    checkpoint = Checkpoint(path)
    return {key: checkpoint.read(key) for key in checkpoint.shapes}


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


def sharded_base(tmp_path, dtype=BF16):
    base = {f"model.layers.{n}.q.weight": normal(64, 48, dtype=dtype) for n in range(4)}
    base |= {"model.norm.weight": normal(48, dtype=dtype), "model.ids": np.arange(5)}
    path = write_base(
        tmp_path / "base",
        base,
        64 * 48 * 2 + 200,
        config={"torch_dtype": "bfloat16", "vocab_size": 7},
    )
    (path / "tokenizer.json").write_text("{}")
    (path / "weights.bin").write_bytes(b"not a side file")
    return base, path


def stop_at_the_end(done, total):
    """A `progress` that interrupts a merge after its last module."""
    if done == total:
        raise KeyboardInterrupt


def merge_some_modules(tmp_path):
    """Merge one module of three, and check that the others are left out."""
    base = {"a.weight": normal(6, 4), "b.weight": normal(6, 4)}
    path = write_base(tmp_path / "base", base)
    adapter = write_adapter(
        tmp_path / "adapter", {"a": loha(6, 4), "b": loha(6, 4), "not.there": loha(6, 4)}
    )
    assert merge_checkpoint(path, [(adapter, 1.0)], tmp_path / "out", only="a").merged == 1
    np.testing.assert_array_equal(read_all(tmp_path / "out")["b.weight"], base["b.weight"])
    with pytest.raises(
        ValueError, match=r"has no module whose whole name .*; it has a, b, not\.there"
    ):
        merge_checkpoint(path, [(adapter, 1.0)], tmp_path / "other", only="c")
