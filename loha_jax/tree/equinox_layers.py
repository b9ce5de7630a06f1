"""Layouts and kinds of weights that Equinox' layers in a tree of parameters give by themselves."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import jax

from loha_jax.lowrank.layout import Layout
from loha_jax.targets.module_names import module_name, path_parts


@dataclasses.dataclass(frozen=True)
class EquinoxLayers:
    """The weights of the Equinox layers of a tree, by default module name.

    Attributes:
        layouts: of linear layers, recurrent cells, convolutions and embeddings; stack axes in front (`filter_vmap`).
        lookups: modules whose rows are looked up.
        transposed: transposed convolutions. Equinox keeps them as [out, in, *spatial], torch as [in, out, *spatial].
        vectors: normalisation layers, whose scale may have several axes.
    """

    layouts: dict[str, Layout] = dataclasses.field(default_factory=dict)
    lookups: set[str] = dataclasses.field(default_factory=set)
    transposed: set[str] = dataclasses.field(default_factory=set)
    vectors: set[str] = dataclasses.field(default_factory=set)


def equinox_layers(tree: Any) -> EquinoxLayers:
    """Reads the Equinox layers of a tree. It does not import Equinox: whoever has such a tree has imported it.

    Example:
        >>> import equinox as eqx
        >>> equinox_layers({"q": eqx.nn.Linear(3, 5, key=jax.random.key(0))}).layouts["q"].word
        'oi'
    """
    found = EquinoxLayers()
    equinox = sys.modules.get("equinox")
    if equinox is None:
        return found
    nn = equinox.nn
    kinds = (nn.Linear, nn.Conv, nn.ConvTranspose, nn.Embedding, nn.GRUCell, nn.LSTMCell)
    for path, layer in _layers(tree, kinds):
        for field, word, core in _weights(layer, nn):
            shape = getattr(getattr(layer, field), "shape", None)
            name = module_name((*path, field))
            missing = len(shape) - len(core) if shape is not None else -1
            if shape is None or missing < 0 or (missing and tuple(shape[missing:]) != core):
                continue
            found.layouts[name] = Layout("s" * missing + word)
            if isinstance(layer, nn.Embedding):
                found.lookups.add(name)
            elif isinstance(layer, nn.ConvTranspose):
                found.transposed.add(name)
    norms = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm)
    found.vectors.update(module_name((*path, "weight")) for path, _ in _layers(tree, norms))
    return found


def _layers(tree: Any, types: tuple[type, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The nodes of these types in a tree, with their paths."""
    for path, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, types))[0]:
        if isinstance(node, types):
            yield path_parts(path), node


def _weights(layer: Any, nn: Any) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Field, layout and shape of a layer's weights, as the layer was made."""

    def size(features: Any) -> int:
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
