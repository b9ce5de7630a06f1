"""What the Equinox layers in a tree of parameters say of their weights."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, Literal

from jax.tree_util import GetAttrKey
from jaxtyping import PyTree

from loha_jax.lowrank.layout import Layout
from loha_jax.tree.layer_weights import LayerWeight, Role, nodes_of, weight_of


def equinox_weights(tree: PyTree) -> Iterator[LayerWeight]:
    """Yield what the Equinox layers of a tree say of their weights.

    Linear layers, recurrent cells, convolutions and embeddings have layouts, with stack axes in
    front (`filter_vmap`). Equinox keeps transposed convolutions as [out, in, *spatial], torch as
    [in, out, *spatial]. Equinox is not imported: whoever has such a tree has imported it.

    Example:
        >>> import equinox as eqx, jax
        >>> next(equinox_weights({"q": eqx.nn.Linear(3, 5, key=jax.random.key(0))})).layout.word
        'oi'
    """
    equinox = sys.modules.get("equinox")
    if equinox is None:
        return
    nn = equinox.nn
    kinds = (nn.Linear, nn.Conv, nn.ConvTranspose, nn.Embedding, nn.GRUCell, nn.LSTMCell)
    for path, layer in nodes_of(tree, kinds):
        for field, word, core in _weights(layer, nn):
            shape = getattr(getattr(layer, field), "shape", None)
            missing = len(shape) - len(core) if shape is not None else -1
            if shape is None or missing < 0 or (missing and tuple(shape[missing:]) != core):
                continue
            layout = Layout("s" * missing + word)
            where = (*path, GetAttrKey(field))
            yield weight_of(tree, where, layout=layout, role=_role(layer, nn))
    norms = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm)
    for path, _ in nodes_of(tree, norms):
        yield weight_of(tree, (*path, GetAttrKey("weight")), role="vector")


def _role(layer: Any, nn: Any) -> Role:
    if isinstance(layer, nn.Embedding):
        return "lookup"
    return "transposed" if isinstance(layer, nn.ConvTranspose) else "kernel"


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
