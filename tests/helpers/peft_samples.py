"""Adapters that PEFT 0.21.2 wrote, with its own numbers, as JAX trees.

tests/data/peft/README.md says how they were made.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file

import loha_jax
from loha_jax import LoHaConfig, interop
from loha_jax.interop.disk.tensor_files import read_safetensors, read_torch_pickle

ROOT = Path(__file__).parents[1] / "data" / "peft"
NAMES = sorted(path.name for path in ROOT.iterdir() if path.is_dir())
LINEAR = [name for name in NAMES if not name.startswith("conv")]
TRAINED = [name for name in NAMES if "bf16" not in name]


@dataclass(frozen=True)
class Sample:
    """One folder of samples."""

    name: str

    @property
    def folder(self):
        return ROOT / self.name

    @cached_property
    def meta(self):
        return json.loads((self.folder / "meta.json").read_text())

    @property
    def adapter(self):
        path = self.folder / self.meta["adapter_dir"]
        if not (path / "adapter_model.safetensors").exists():
            pytest.importorskip(
                "torch", reason="a .bin file is a torch pickle; the main test run has torch"
            )
        return path

    @cached_property
    def io(self):
        return dict(np.load(self.folder / "io.npz"))

    @cached_property
    def base(self):
        return load_file(self.folder / "base.safetensors")

    @cached_property
    def state(self):
        path = self.adapter / "adapter_model.safetensors"
        return (
            read_safetensors(path)
            if path.exists()
            else read_torch_pickle(self.adapter / "adapter_model.bin")
        )

    @property
    def inputs(self):
        return {
            key.removeprefix("in::"): value
            for key, value in self.io.items()
            if key.startswith("in::")
        }

    def params(self):
        """The base weights as a JAX tree in Flax's names and orientation."""
        flat = {}
        for key, value in self.base.items():
            *path, leaf = key.split(".")
            flat[(*path, flax_leaf(path, leaf, value))] = flax_value(path, leaf, value)
        return unflatten_dict(flat)

    @property
    def layouts(self):
        return {
            name: "kio" for name, layer in self.meta["layers"].items() if layer["type"] == "Conv1d"
        }


def flax_leaf(path, leaf, value):
    """Flax's name of a torch parameter."""
    if leaf == "weight":
        if "embed" in path[-1]:
            return "embedding"
        return "kernel" if value.ndim > 1 else "scale"
    return {"running_mean": "mean", "running_var": "var"}.get(leaf, leaf)


def flax_value(path, leaf, value):
    """A torch parameter with Flax's axes: linear transposed, convolutions spatial first."""
    if leaf != "weight" or value.ndim < 2 or "embed" in path[-1]:
        return value
    return np.ascontiguousarray(np.moveaxis(value, (0, 1), (-1, -2)))


def torch_value(kernel):
    """A Flax kernel with torch's axes."""
    return np.moveaxis(np.asarray(kernel), (-1, -2), (0, 1))


def two_kernels(tmp_path, **kwargs):
    base = {
        "lin0": {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)},
        "lin1": {"kernel": jnp.ones((4, 2))},
    }
    config = LoHaConfig(r=2, target_modules=["lin0", "lin1"], init_weights=False, **kwargs)
    params = loha_jax.inject(base, config, key=jax.random.key(0))
    interop.save_peft(tmp_path, params)
    return base, params
