"""What the layers of haliax and penzai say of their weights, whose axes have names."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from jax.tree_util import GetAttrKey
from jaxtyping import PyTree

from loha_jax.lowrank.layout import Layout
from loha_jax.targets.module_names import module_name, stack_place
from loha_jax.tree.layer_weights import LayerWeight, Role, nodes_of, weight_of
from loha_jax.tree.own_paths import is_named_array, is_penzai_value


def named_axes_weights(tree: PyTree) -> Iterator[LayerWeight]:
    """Yield what the layers of haliax and penzai in a tree say of their weights.

    A layer names its input and output features, and a convolution its spatial axes. Other axes of a
    weight are those of a stack (haliax' `Stacked` and experts; penzai's `LayerStack` and parallel
    axes). A named array that belongs to no known layer is unclear.
    """
    known: set[tuple[str, ...]] = set()
    for weight in (*_haliax_weights(tree), *_penzai_weights(tree)):
        known.add(weight.path)
        yield weight
    for path, array in nodes_of(tree, _array_kinds()):
        weight = weight_of(tree, path, role="unclear", axes=tuple(map(str, _axes(array))))
        if weight.path not in known and len(weight.axes) > 1:
            yield weight


def _haliax_weights(tree: PyTree) -> Iterator[LayerWeight]:
    nn = sys.modules.get("haliax.nn")
    if nn is None:
        return
    kernels = _kinds(nn, "Linear", "MoELinear", "Conv", "ConvTranspose")
    for path, layer in nodes_of(tree, (*kernels, *_kinds(nn, "Embedding"))):
        if isinstance(layer, _kinds(nn, "Embedding")):
            outputs, inputs, role = _names(layer.Vocab), _names(layer.Embed), "lookup"
        else:
            outputs, inputs = _names(layer.Out), _names(layer.In)
            role = "transposed" if isinstance(layer, _kinds(nn, "ConvTranspose")) else "kernel"
        spatial = _names(getattr(layer, "Spatial", ()))
        scale = float(getattr(getattr(layer, "reparam", None), "active_scale", 1.0))
        where = (*path, GetAttrKey("weight"))
        if is_named_array(layer.weight):
            letters = {"o": outputs, "i": inputs, "k": spatial}
            yield _weight(tree, where, layer.weight, letters, role, scale)
    for path, layer in nodes_of(tree, _kinds(nn, "LayerNorm", "RmsNorm", "LayerNormBase")):
        if is_named_array(layer.weight):
            yield weight_of(tree, (*path, GetAttrKey("weight")), role="vector")


def _penzai_weights(tree: PyTree) -> Iterator[LayerWeight]:
    nn = sys.modules.get("penzai.nn.linear_and_affine")
    if nn is None:
        return
    embeddings = sys.modules["penzai.nn.embeddings"]
    for path, layer in nodes_of(tree, (nn.Linear, nn.AddBias, embeddings.EmbeddingTable)):
        if isinstance(layer, nn.AddBias):
            field, letters, role = "bias", {}, "vector"
        elif isinstance(layer, nn.Linear):
            field, role = "weights", "kernel"
            letters = {"o": layer.out_axis_names, "i": layer.in_axis_names}
        else:
            field, role, rows = "embeddings", "lookup", layer.vocabulary_axis
            inputs = [axis for axis in _axes_of_value(layer.embeddings) if axis != rows]
            letters = {"o": [rows], "i": inputs}
        held = getattr(layer, field)
        if is_penzai_value(held) and is_named_array(held.value):
            where = (*path, GetAttrKey(field))
            # One key inside the parameter, from which on its label counts.
            yield _weight(tree, (*where, GetAttrKey("value")), held.value, letters, role)


def _weight(
    tree: PyTree,
    path: tuple[Any, ...],
    array: Any,
    letters: Mapping[str, Collection[Any]],
    role: Role,
    scale: float = 1.0,
) -> LayerWeight:
    """Return what a layer says of a named array, by the names of axes for each letter."""
    axes = _axes(array)
    kinds = {name: letter for letter, names in letters.items() for name in names}
    names = tuple(map(str, axes))
    is_kernel = {"i", "o"} <= {kinds.get(axis) for axis in axes}  # else a scale, as in norms
    layout, role = (_layout(axes, letters), role) if is_kernel else (None, "vector")
    weight = weight_of(tree, path, layout=layout, role=role, axes=names, scale=scale)
    # penzai says over which axis a stack goes, and not which part of a label it repeats.
    stacks = [key for key in path if getattr(key, "stack_axis", None) in axes]
    if stacks and not weight.stacks:
        places = (stack_place(module_name(weight.path)),) * len(stacks)
        weight = dataclasses.replace(weight, stacks=places)
    return weight


def _layout(axes: Collection[Any], letters: Mapping[str, Collection[Any]]) -> Layout:
    """Return the layout of a kernel whose axes flatten in the order in which its layer names them.

    The array's own order is that of its memory, which a `rearrange` changes.
    """
    tokens = dict.fromkeys(axes, "s")
    for letter, declared in letters.items():
        present = [axis for axis in declared if axis in tokens]
        in_order = present == [axis for axis in axes if axis in present]
        for n, axis in enumerate(present):
            tokens[axis] = letter if in_order else f"{letter}{n}"
    return Layout(" ".join(tokens.values()))


def _axes(array: Any) -> list[Any]:
    """Return the names of a named array's axes, in the order of its data; numbers for others."""
    if hasattr(array, "axes"):  # haliax
        return [axis.name for axis in array.axes]
    if hasattr(array, "data_axis_for_name"):  # penzai's NamedArrayView
        places = {place: name for name, place in array.data_axis_for_name.items()}
        return [places.get(n, n) for n in range(len(array.data_shape))]
    named = list(array.named_axes)
    return [*range(array.data_array.ndim - len(named)), *named]


def _axes_of_value(parameter: Any) -> list[Any]:
    value = getattr(parameter, "value", None) if is_penzai_value(parameter) else None
    return _axes(value) if is_named_array(value) else []


def _names(axes: Any) -> tuple[str, ...]:
    """Return the names of one axis or several of haliax: `Axis`, a name, or sizes by name."""
    several = axes if isinstance(axes, tuple | list | Mapping) else (axes,)
    return tuple(axis if isinstance(axis, str) else axis.name for axis in several)


def _kinds(module: Any, *names: str) -> tuple[type, ...]:
    return tuple(kind for name in names if (kind := getattr(module, name, None)) is not None)


def _array_kinds() -> tuple[type, ...]:
    modules = (("haliax", "NamedArray"), ("penzai.core.named_axes", "NamedArrayBase"))
    return tuple(k for m, name in modules for k in _kinds(sys.modules.get(m), name))
