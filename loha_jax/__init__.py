"""LoHa (low-rank Hadamard product) fine-tuning for any JAX model.

    config = loha_jax.LoHaConfig(r=8, alpha=16, target_modules=["query", "value"])
    params = loha_jax.inject(params, config, key=key)
    apply = loha_jax.adapt(model.apply)            # the same function; keeps no ΔW
    trainable, frozen = loha_jax.partition(params)  # for jax.grad and optax

Adapters go to and come from PyTorch PEFT through `loha_jax.interop`.
"""

import importlib
from typing import Any

from loha_jax.lowrank.hadamard import (
    hada_weight,
    hada_weight_cp,
    khatri_rao_columns,
    khatri_rao_rows,
)
from loha_jax.lowrank.layout import Layout
from loha_jax.targets.config import LoHaConfig
from loha_jax.targets.lycoris_config import LycorisConfig
from loha_jax.transform.adapt import adapt
from loha_jax.transform.explain import explain
from loha_jax.transform.infer_layouts import infer_layouts
from loha_jax.tree import export as _export  # noqa: F401  tells jax.export of the leaves
from loha_jax.tree.adapters import adapter_names, delete_adapter, scale, set_adapter
from loha_jax.tree.dropout import dropout
from loha_jax.tree.factors import Factors
from loha_jax.tree.flax_state import register as _register_with_flax
from loha_jax.tree.inject import inject
from loha_jax.tree.leaves import LoHaWeight, SavedWeight
from loha_jax.tree.max_norm import apply_max_norm
from loha_jax.tree.merge import merge, unload
from loha_jax.tree.partition import combine, partition, trainable_mask
from loha_jax.tree.quantised_types import register_quantised
from loha_jax.tree.requantise import dequantise, requantising_losses
from loha_jax.tree.scaled_array import ScaledArray
from loha_jax.tree.summary import summary
from loha_jax.tree.weighted_sum import add_weighted_adapter

__version__ = "0.1.0"

_register_with_flax()

_SUBMODULES = (
    "checkpoint",
    "interop",
    "keras",
    "linen",
    "nnx",
    "qwix",
    "train",
)  # imported when first used: Flax takes a while

__all__ = [
    "Factors",
    "Layout",
    "LoHaConfig",
    "LoHaWeight",
    "LycorisConfig",
    "SavedWeight",
    "ScaledArray",
    "adapt",
    "adapter_names",
    "add_weighted_adapter",
    "apply_max_norm",
    "combine",
    "delete_adapter",
    "dequantise",
    "dropout",
    "explain",
    "hada_weight",
    "hada_weight_cp",
    "infer_layouts",
    "inject",
    "khatri_rao_columns",
    "khatri_rao_rows",
    "merge",
    "partition",
    "register_quantised",
    "requantising_losses",
    "scale",
    "set_adapter",
    "summary",
    "trainable_mask",
    "unload",
]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"loha_jax.{name}")
    raise AttributeError(f"module 'loha_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBMODULES])
