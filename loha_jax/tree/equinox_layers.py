"""The layouts that the Equinox layers in a tree of parameters give their weights."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, Literal

import jax
from jaxtyping import PyTree

from loha_jax.lowrank.layout import Layout
from loha_jax.targets.model_layouts import Layouts, ModelLayouts
from loha_jax.targets.module_names import module_name, path_parts


def equinox_layers(tree: PyTree, given: Layouts | None = None) -> ModelLayouts:
    """Return the given layouts, completed with what the Equinox layers of a tree say.

    Linear layers, recurrent cells, convolutions and embeddings have layouts, with stack axes in
    front (`filter_vmap`). Equinox keeps transposed convolutions as [out, in, *spatial], torch as
    [in, out, *spatial]. Equinox is not imported: whoever has such a tree has imported it.

    Example:
        >>> import equinox as eqx
        >>> equinox_layers({"q": eqx.nn.Linear(3, 5, key=jax.random.key(0))}).own["q"].word
        'oi'
    """
    equinox = sys.modules.get("equinox")
    if equinox is None:
        return ModelLayouts(given)
    nn = equinox.nn
    layouts: dict[str, Layout] = {}
    lookups: set[str] = set()
    transposed: set[str] = set()
    kinds = (nn.Linear, nn.Conv, nn.ConvTranspose, nn.Embedding, nn.GRUCell, nn.LSTMCell)
    for path, layer in _layers(tree, kinds):
        for field, word, core in _weights(layer, nn):
            shape = getattr(getattr(layer, field), "shape", None)
            name = module_name((*path, field))
            missing = len(shape) - len(core) if shape is not None else -1
            if shape is None or missing < 0 or (missing and tuple(shape[missing:]) != core):
                continue
            layouts[name] = Layout("s" * missing + word)
            if isinstance(layer, nn.Embedding):
                lookups.add(name)
            elif isinstance(layer, nn.ConvTranspose):
                transposed.add(name)
    norms = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm)
    vectors = {module_name((*path, "weight")) for path, _ in _layers(tree, norms)}
    return ModelLayouts(given, layouts, transposed, lookups=lookups, vectors=vectors)


def _layers(tree: PyTree, types: tuple[type, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the nodes of these types in a tree, with their paths."""
    for path, node in jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: isinstance(node, types)
    )[0]:
        if isinstance(node, types):
            yield path_parts(path), node


def _weights(layer: Any, nn: Any) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield field, layout and shape of a layer's weights, as the layer was made."""

    def size(features: int | Literal["scalar"]) -> int:
        return 1 if features == "scalar" else features

    if isinstance(layer, nn.Linear):
        yield "weight", "oi", (size(layer.out_features), size(layer.in_features))
    elif isinstance(layer, nn.Embedding):
        yield "weight", "oi", (layer.num_embeddings, layer.embedding_size)
    elif isinstance(layer, nn.Conv | nn.ConvTranspose):
        core = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
        yield "weight", "oi" + "k" * layer.num_spatial_dims, core
    else:
        gates = (3 if isinstance(layer, nn.GRUCell) else 4) * layer.hidden_size
        yield "weight_ih", "oi", (gates, layer.input_size)
        yield "weight_hh", "oi", (gates, layer.hidden_size)
