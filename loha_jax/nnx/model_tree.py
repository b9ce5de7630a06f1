"""An NNX model as a tree of parameters, and back.

An adapted `nnx.Param` stays in its module, and the factors stand beside it (`siblings.py`). The
modules that hold adapted kernels get a subclass (`adapted_classes.py`) whose methods run through
`loha_jax.adapt` (`calls.py`). No array is closed over, so NNX's own functions (split, merge, clone,
jit, grad, scan, remat, vmap, …) see an ordinary model, in graph mode and in tree mode.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping

import jax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from loha_jax.lowrank.layout import Layout, einsum_layout
from loha_jax.nnx.adapted_classes import dress, end_interception
from loha_jax.nnx.calls import call, nodes_among
from loha_jax.nnx.graph import (
    Key,
    Path,
    held_variables,
    is_node,
    is_owner,
    is_packed,
    is_variable,
    replace,
)
from loha_jax.nnx.siblings import (
    AdaptedVariable,
    Siblings,
    adapted_in,
)
from loha_jax.nnx.variables import scanned_axis, set_values, values_of, variables_of
from loha_jax.targets.model_layouts import Layouts, ModelLayouts
from loha_jax.targets.module_names import module_name, stack_names
from loha_jax.tree.leaves import LoHaWeight, SavedWeight, base_of, is_adapted
from loha_jax.tree.quantised import is_quantised, unwrapped, wrapped
from loha_jax.tree.requantise import dequantise

# With `call`, `is_node` and `nodes_among`, this module is a `loha_jax.tree.containers.Container`.
__all__ = [
    "call",
    "is_node",
    "layer_layout",
    "layouts_of",
    "nodes_among",
    "provided_among",
    "tree_of",
    "write_back",
]


@dataclasses.dataclass
class _Weight:
    """A variable that can hold weights; for a quantised kernel, the tree of its variables.

    Attributes:
        base: the variable.
        holders: the modules that hold it, and the way from each to it.
        adapted: one entry per holder if it is adapted.
    """

    base: PyTree[nnx.Variable]
    holders: list[tuple[nnx.Pytree, Path]] = dataclasses.field(default_factory=list)
    adapted: list[AdaptedVariable] = dataclasses.field(default_factory=list)


def _weights(model: nnx.Module) -> dict[Path, _Weight]:
    """Return the variables that can hold weights, by path."""
    graph = list(nnx.iter_graph(model))
    adapted = [of for _, node in graph for of in adapted_in(node)]
    bases = {id(of.base) for of in adapted}
    siblings = {id(variable) for of in adapted for variable in of.arrays}
    packed = {
        path
        for path, node in graph
        if is_packed(node) or (id(node) in bases and not is_variable(node))
    }
    found: dict[Path, _Weight] = {}
    by_id: dict[int, _Weight] = {}
    for path, node in graph:
        inside = packed and any(path[:n] in packed for n in range(len(path)))
        if id(node) in bases or (
            not inside and id(node) not in siblings and (path in packed or _can_hold_weights(node))
        ):
            found[path] = by_id[id(node)] = _Weight(node)
    for of in adapted:
        by_id[id(of.base)].adapted.append(of)
    for _, node in graph:
        for path, variable in held_variables(node) if is_owner(node) else ():
            if id(variable) in by_id:
                by_id[id(variable)].holders.append((node, path))
    for weight in found.values():
        if not weight.holders:  # a tree of variables of a type that is not known
            weight.holders += [(of.owner, of.settings.path) for of in weight.adapted]
    return found


def _can_hold_weights(node: object) -> bool:
    if not is_variable(node) or isinstance(node, nnx.RngState | nnx.Intermediate | nnx.Cache):
        return False
    value = node.get_value()
    return isinstance(value, jax.Array | jax.ShapeDtypeStruct) or is_quantised(value)


def tree_of(model: nnx.Module) -> dict[Key, PyTree]:
    """Return the model's parameters and statistics as nested dicts, with adapted leaves."""
    return unflatten_dict(
        {
            path: _named(weight.adapted[0].leaf(), path)
            if weight.adapted
            else values_of(weight.base)
            for path, weight in _weights(model).items()
        }
    )


def provided_among(args: PyTree) -> Iterator[tuple[str, LoHaWeight]]:
    """Yield the adapted kernels that a provider adds to, with their modules' names."""
    for model in jax.tree.leaves(args, is_leaf=is_node):
        for path, weight in _weights(model).items() if isinstance(model, nnx.Module) else ():
            if weight.adapted and weight.adapted[0].settings.intercepted:
                leaf = _named(weight.adapted[0].leaf(), path)
                assert isinstance(leaf, LoHaWeight)
                yield module_name(tuple(map(str, path))), leaf


def _named(leaf: LoHaWeight | SavedWeight, path: Path) -> LoHaWeight | SavedWeight:
    """Return the leaf with its modules' names, which one that was created inside a layer may lack.

    One created inside a scan over layers has a single name, given for the whole stack, or none.
    """
    if isinstance(leaf, SavedWeight) or (leaf.names[0] and len({*leaf.names}) == len(leaf.names)):
        return leaf
    name, given = module_name(tuple(map(str, path))), leaf.names[0]
    sizes = leaf.layout.sizes("s", leaf.kernel.shape)
    names = stack_names(name, sizes, (lambda _: given) if given else None)
    return dataclasses.replace(leaf, names=names)


def write_back(model: nnx.Module, tree: Mapping[Key, PyTree]) -> nnx.Module:
    """Write a changed `tree_of(model)` into the model, and return the model.

    A quantised kernel that has become a floating one makes the whole model a floating one: qwix,
    which would quantise that kernel again, no longer runs it.

    Raises:
        ValueError: the tree holds other variables than the model, or there is no place beside an
            adapted one; nothing is changed then.
    """
    weights = _weights(model)
    leaves: dict[Path, PyTree] = flatten_dict(tree, is_leaf=lambda _, x: not isinstance(x, dict))
    if weights.keys() != leaves.keys():
        different = sorted(map(str, weights.keys() ^ leaves.keys()))
        raise ValueError(f"The tree holds other variables than the model: {different}")
    packed = {path for path, weight in weights.items() if is_packed(weight.base)}
    floating = any(not is_quantised(base_of(leaves[path])) for path in packed)
    if floating:
        leaves = {path: dequantise(leaf) for path, leaf in leaves.items()}
    siblings = {
        path: _siblings(path, weights[path], leaf, floating)
        for path, leaf in leaves.items()
        if is_adapted(leaf)
    }
    for path, weight in weights.items():
        for adapted in weight.adapted:
            adapted.remove()
        base, new = weight.base, unwrapped(base_of(leaves[path]))
        if floating and path in packed:
            base = variables_of(base)[0].replace(new)
            for owner, way in weight.holders:
                replace(owner, way, base)
        if path in siblings:
            for owner, way in weight.holders:
                siblings[path].put(owner, way)
        set_values(base, new)
    if floating:
        end_interception(model)
    dress(model)
    return model


def _siblings(
    path: Path, weight: _Weight, leaf: LoHaWeight | SavedWeight, floating: bool
) -> Siblings:
    """Return the new variables beside an adapted one, for which there is a place.

    With `floating`, the model's calls compute with them, and no provider does.
    """
    name = ".".join(map(str, path))
    if not weight.holders:
        raise ValueError(
            f"The variable {name} sits in a list that no module holds: there is no place beside it."
            " Keep it in an attribute of a module."
        )
    if weight.adapted:
        siblings = Siblings.of(leaf, weight.base, old=weight.adapted[0])
        return dataclasses.replace(siblings, intercepted=False) if floating else siblings
    if is_packed(weight.base):
        raise ValueError(
            f"The kernel {name} is quantised and has no adapter: qwix computes its product, and "
            "only a loha_jax.qwix.LoHaProvider adds to it. Apply one with a rule for this kernel "
            "to the float model, or make the model float with loha_jax.dequantise(model)."
        )
    siblings = Siblings.of(leaf, weight.base)
    for owner, way in weight.holders:
        if taken := [n for n in siblings.attributes(way) if n in vars(owner)]:
            raise ValueError(
                f"The module of {name} already has an attribute {taken[0]}, a name that the "
                "adapter needs. Rename it."
            )
    return siblings


def layouts_of(model: nnx.Module, given: Layouts | None) -> ModelLayouts:
    """Return the given layouts, and those of the model's own layers, by module name."""
    found: dict[str, Layout] = {}
    transposed: set[str] = set()
    lookups: set[str] = set()
    for path, weight in _weights(model).items():
        name = module_name(tuple(map(str, path)))
        for owner, way in weight.holders:
            key, shape = str(way[0]), wrapped(values_of(weight.base)).shape
            if len(way) > 1:
                continue
            if isinstance(owner, nnx.ConvTranspose) and key == "kernel":
                transposed.add(name)
            if isinstance(owner, nnx.Embed) and key == "embedding":
                lookups.add(name)
            word = layer_layout(owner, key, shape, scanned_axis(weight.base))
            if word and not weight.adapted:
                found[name] = Layout(word)
    return ModelLayouts(given or {}, found, transposed, lookups=lookups)


def layer_layout(
    layer: object, key: str, shape: tuple[int, ...], scanned: int | None = None
) -> str | None:
    """Return the layout of a layer's kernel by the layer's fields, or None.

    Axes that `nnx.vmap` or a scan has added are stack axes. None if they could be several.

    Args:
        layer: the module that holds the kernel.
        key: the name of the kernel's attribute.
        shape: of the kernel.
        scanned: the axis of the kernel that was added, if the model says so.
    """
    word, core = _own_layout(layer, key, shape)
    added = len(shape) - len(word)
    if not word or added < 0:
        return None
    bias = getattr(getattr(layer, "bias", None), "shape", None)
    found = {
        Layout(word).with_stack(places).word
        for places in itertools.combinations(range(len(shape)), added)
        if _without(shape, places) == tuple(core)
        and (not added or scanned is None or scanned in places)
        and (bias is None or not added or _is_end(_without(bias, places), core))
    }
    return found.pop() if len(found) == 1 else None


def _own_layout(layer: object, key: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Return the layout and shape of a layer's kernel without stack axes; ("", ()) if unknown."""
    if isinstance(layer, nnx.Linear) and key == "kernel":
        return "io", (layer.in_features, layer.out_features)
    if isinstance(layer, nnx.LinearGeneral) and key == "kernel":
        return _general(layer.in_features, layer.out_features)
    if isinstance(layer, nnx.Conv) and key == "kernel":
        core = tuple(layer.kernel_shape)
        return "k" * (len(core) - 2) + "io", core
    if isinstance(layer, nnx.ConvTranspose) and key == "kernel":
        core = tuple(layer.kernel_shape)
        return "k" * (len(core) - 2) + ("oi" if layer.transpose_kernel else "io"), core
    if isinstance(layer, nnx.Embed) and key == "embedding":
        return "oi", (layer.num_embeddings, layer.features)
    inputs, outputs = (getattr(layer, f"{of}_features_shape", None) for of in ("in", "out"))
    if key == "kernel" and isinstance(inputs, tuple) and isinstance(outputs, tuple):
        return _general(inputs, outputs)  # MaxText's DenseGeneral
    equation = getattr(layer, "einsum_str", None)  # nnx.Einsum, tunix's Einsum
    if isinstance(equation, str):
        word = einsum_layout(equation) or ""
        core = shape if len(word) == len(shape) else tuple(getattr(layer, "kernel_shape", ()))
        return word, core
    return "", ()


def _general(inputs: tuple[int, ...], outputs: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    return "i" * len(inputs) + "o" * len(outputs), (*inputs, *outputs)


def _without(shape: tuple[int, ...], places: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for axis, size in enumerate(shape) if axis not in places)


def _is_end(shape: tuple[int, ...], of: tuple[int, ...]) -> bool:
    return shape == tuple(of[len(of) - len(shape) :])
