"""An NNX model as a tree of parameters, and back.

An adapted `nnx.Param` is replaced in its module by an `AdaptedKernel` (`variables.py`): a small
module with the Param itself, untouched, and a `LoHaParam` for every factor. Read as an array it is
`W + ΔW`, so code that reads the kernel is right, if slow. Calls are fast: the modules that hold
adapted kernels get a subclass (`adapted_classes.py`) whose methods run through `loha_jax.adapt`
(`calls.py`). Nothing is shared and no array is closed over, so NNX's own functions (split, merge,
clone, jit, grad, scan, remat, vmap, …) see an ordinary model, in graph mode and in tree mode.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from loha_jax.lowrank.layout import Layout, einsum_layout
from loha_jax.nnx.adapted_classes import dress
from loha_jax.nnx.calls import call, nodes_among
from loha_jax.nnx.variables import (
    AdaptedCopy,
    AdaptedKernel,
    AdaptedVariable,
    Path,
    adapted_nodes,
    below,
    is_node,
    replace_nodes,
    slots,
)
from loha_jax.targets.model_layouts import Layouts, ModelLayouts
from loha_jax.targets.module_names import module_name, stack_names
from loha_jax.tree.leaves import LoHaWeight, SavedWeight

# With `call`, `is_node` and `nodes_among`, this module is a `loha_jax.tree.containers.Container`.
__all__ = ["call", "is_node", "layer_layout", "layouts_of", "nodes_among", "tree_of", "write_back"]


def tree_of(model: nnx.Module) -> dict[Any, Any]:
    """Return the model's parameters and statistics as nested dicts, with adapted leaves."""
    return unflatten_dict(
        {
            path: _named(node.leaf(), path)
            if isinstance(node, AdaptedVariable)
            else node.get_value()
            for path, node in _weights(model).items()
        }
    )


def _named(leaf: LoHaWeight | SavedWeight, path: Path) -> LoHaWeight | SavedWeight:
    """Return the leaf with its module's name, which a layer that was created by itself lacks."""
    if isinstance(leaf, SavedWeight) or leaf.names[0]:
        return leaf
    name = module_name(tuple(map(str, path)))
    return dataclasses.replace(
        leaf, names=stack_names(name, leaf.layout.sizes("s", leaf.kernel.shape), None)
    )


def write_back(model: nnx.Module, tree: Any) -> nnx.Module:
    """Write a changed `tree_of(model)` into the model, and return the model."""
    old = _weights(model)
    new = _flat_leaves(tree)
    if old.keys() != new.keys():
        raise ValueError(
            f"The tree holds other variables than the model: {sorted(map(str, old.keys() ^ new.keys()))}"
        )
    replacements: dict[int, Any] = {}
    values: list[tuple[nnx.Variable, jax.Array]] = []
    for path, node in old.items():
        leaf = new[path]
        base = node.base if isinstance(node, AdaptedVariable) else node
        if isinstance(leaf, LoHaWeight):
            values.append((base, leaf.kernel))
            replacements[id(node)] = AdaptedKernel(
                base, leaf, node if isinstance(node, AdaptedKernel) else None
            )
        elif isinstance(leaf, SavedWeight):
            values.append((base, leaf.original))
            replacements[id(node)] = AdaptedCopy(base, leaf)
        else:
            values.append((base, leaf))
            if base is not node:
                replacements[id(node)] = base
    replace_nodes(nnx.iter_graph(model), replacements)
    for variable, value in values:
        if variable.get_value() is not value:
            variable.set_value(value)
    dress(model)
    return model


def _weights(model: nnx.Module) -> dict[Path, nnx.Variable | AdaptedVariable]:
    """Return the variables that can hold weights, and the adapted ones, by path."""
    found: dict[Path, Any] = {}
    adapted = adapted_nodes(model)
    for path, node in nnx.iter_graph(model):
        if isinstance(node, AdaptedVariable) or (
            isinstance(node, nnx.Variable)
            and not isinstance(node, nnx.RngState | nnx.Intermediate | nnx.Cache)
            and isinstance(node.get_value(), jax.Array | jax.ShapeDtypeStruct)
            and not below(path, adapted)
        ):
            found[path] = node
    return found


def _flat_leaves(tree: Any) -> dict[Path, Any]:
    return dict(flatten_dict(tree, is_leaf=lambda _, x: not isinstance(x, dict)))


def layouts_of(model: nnx.Module, given: Layouts | None) -> ModelLayouts:
    """Return the given layouts, and those of the model's own layers, by module name."""
    found: dict[str, Layout] = {}
    transposed: set[str] = set()
    owners = {
        id(value): (node, key) for _, node in nnx.iter_graph(model) for key, value in slots(node)
    }
    for path, variable in _weights(model).items():
        if not isinstance(variable, nnx.Variable) or id(variable) not in owners:
            continue
        owner, key = owners[id(variable)]
        if word := layer_layout(owner, key, variable.get_value().shape):
            name = module_name(tuple(map(str, path)))
            found[name] = Layout(word)
            if isinstance(owner, nnx.ConvTranspose):
                transposed.add(name)
    return ModelLayouts(given or {}, found, transposed)


def layer_layout(layer: Any, key: str, shape: tuple[int, ...]) -> str | None:
    """Return the layout of a layer's kernel by the layer's fields, or None.

    Axes in front, added by `nnx.vmap`, are stack axes.
    """
    word, core = "", ()
    if isinstance(layer, nnx.Linear) and key == "kernel":
        word, core = "io", (layer.in_features, layer.out_features)
    elif isinstance(layer, nnx.LinearGeneral) and key == "kernel":
        core = (*layer.in_features, *layer.out_features)
        word = "i" * len(layer.in_features) + "o" * len(layer.out_features)
    elif isinstance(layer, nnx.Conv) and key == "kernel":
        core = tuple(layer.kernel_shape)
        word = "k" * (len(core) - 2) + "io"
    elif isinstance(layer, nnx.ConvTranspose) and key == "kernel":
        core = tuple(layer.kernel_shape)
        word = "k" * (len(core) - 2) + ("oi" if layer.transpose_kernel else "io")
    elif (
        isinstance(layer, nnx.Embed) and key == "embedding" and len(shape) > 2
    ):  # 2-D: the default for this name
        word, core = "oi", (layer.num_embeddings, layer.features)
    elif isinstance(
        equation := getattr(layer, "einsum_str", None), str
    ):  # nnx.Einsum, tunix's Einsum
        word = einsum_layout(equation) or ""
        core = shape if len(word) == len(shape) else tuple(getattr(layer, "kernel_shape", ()))
    missing = len(shape) - len(word)
    if not word or missing < 0 or tuple(shape[missing:]) != tuple(core):
        return None
    return "s" * missing + word
