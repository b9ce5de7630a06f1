"""A Keras model as a tree of parameters, and back.

The tree is a flat dictionary by path: `{"encoder/query/kernel": …}`. The paths are Keras' own
without the model's name in front. Embeddings and normalisations have their variables by the names
of other libraries (`embedding`, `scale`, `mean`, …), which become torch's in files.
"""

# Keras has no type information.
# pyright: reportMissingImports=false, reportUnknownVariableType=false
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.core
import keras
from jaxtyping import PyTree

from loha_jax.keras._keras_internals import (
    Layer,
    Variable,
    end_compilation,
    forget_functions,
    layers_of,
    models_with,
    own_value,
    variables_of,
)
from loha_jax.keras.adapted_layers import dress
from loha_jax.keras.layer_kinds import (
    DEPTHWISE,
    KINDS,
    TRANSPOSED,
    common_name,
    kernel_layout,
    kernel_of,
    why_not,
)
from loha_jax.keras.quantised import MODES, set_kernel
from loha_jax.keras.siblings import (
    AdaptedVariable,
    adapted_among,
    adapted_in,
    base_value,
    put,
    siblings_in,
    take_off,
)
from loha_jax.lowrank.layout import Layout
from loha_jax.targets.model_layouts import Layouts, ModelLayouts
from loha_jax.targets.module_names import is_kernel_leaf, module_name, path_parts
from loha_jax.transform.options import OBSERVER
from loha_jax.tree.leaves import LoHaWeight, SavedWeight, base_of, is_adapted
from loha_jax.tree.quantised import is_quantised, unwrapped

_FROZEN_BY_US = "_loha_was_trainable"


@dataclasses.dataclass(frozen=True)
class _Weight:
    """A variable of the model's own, with the layers that hold it; the first one counts."""

    holders: list[Layer]
    variable: Variable

    @property
    def layer(self) -> Layer:
        """The first layer that holds it."""
        return self.holders[0]

    @property
    def adapted(self) -> AdaptedVariable | None:
        """What is beside it, if it is adapted."""
        return adapted_in(self.layer).get(self.variable.name)

    @property
    def is_quantised(self) -> bool:
        """True for the kernel of a quantised layer."""
        return self.variable is kernel_of(self.layer) and self.layer.quantization_mode in MODES


def _weights(model: Layer) -> dict[str, _Weight]:
    """Return the model's own variables by path, without those of quantised kernels' scales."""
    _require_built(model)
    found: dict[str, _Weight] = {}
    by_id: dict[int, _Weight] = {}
    for layer in layers_of(model):
        siblings = {id(variable) for variable in siblings_in(layer).values()}
        for variable in variables_of(layer):
            if id(variable) in by_id:
                by_id[id(variable)].holders.append(layer)
            if id(variable) in by_id or id(variable) in siblings or _is_scale(layer, variable):
                continue
            path = _path(model, layer, variable)
            if path in found:
                raise ValueError(
                    f"Two variables have the path {path}: one of {found[path].layer} and one of "
                    f"{layer}. Give their layers names that tell them apart, name=..., when the "
                    "model is made."
                )
            found[path] = by_id[id(variable)] = _Weight([layer], variable)
    return found


def _is_scale(layer: Layer, variable: Variable) -> bool:
    """Return whether a variable is a part of a quantised kernel besides its integers."""
    parts = ("kernel_scale", "kernel_zero", "embeddings_scale", "embeddings_zero", "g_idx")
    quantised = kernel_of(layer) is not None and layer.quantization_mode in MODES
    return quantised and variable.name in parts


def _path(model: Layer, layer: Layer, variable: Variable) -> str:
    parts = variable.path.split("/")[:-1]
    if parts[:1] == [model.name] and (len(parts) > 1 or layer is model):
        parts = parts[1:]
    return "/".join((*parts, common_name(layer, variable)))


def _require_built(model: Layer) -> None:
    unbuilt = [
        layer
        for layer in layers_of(model)
        if not layer.built and (layer is model or isinstance(layer, (*KINDS, keras.Model)))
    ]
    if unbuilt:
        raise ValueError(
            f"{unbuilt[0]} is not built yet and has no variables. Call the model on a batch, or "
            "model.build(input_shape), and then inject."
        )


def tree_of(model: Layer) -> dict[str, PyTree]:
    """Return the model's parameters and statistics by path, with adapted leaves."""
    return {
        path: base_value(weight.layer, weight.variable)
        if weight.adapted is None
        else weight.adapted.leaf()
        for path, weight in _weights(model).items()
    }


def write_back(model: Layer, tree: dict[str, PyTree]) -> Layer:
    """Write a changed `tree_of(model)` into the model, and return the model.

    Raises:
        ValueError: the tree holds other variables than the model, or traced values, a layer cannot
            be adapted, or a quantised kernel has become a floating one; nothing is changed then.
    """
    weights = _weights(model)
    if weights.keys() != tree.keys():
        different = sorted(weights.keys() ^ tree.keys())
        raise ValueError(f"The tree holds other variables than the model: {different}")
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree)):
        raise ValueError(
            "A Keras model cannot hold traced values: call the function outside of jax.jit, with "
            "numbers and arrays."
        )
    cells = _cells_for_cudnn(model)
    for path, leaf in tree.items():
        _check(path, weights[path], leaf)
        if isinstance(leaf, SavedWeight) and id(weights[path].layer) in cells:
            raise ValueError(
                f"modules_to_save names the cell of {path}. On a GPU Keras reads its variables "
                "without calling it, and would miss the copies: make the layer with "
                "use_cudnn=False, or leave it out."
            )
    trained = model.trainable_variables
    for path, leaf in tree.items():
        weight = weights[path]
        _set_base(weight, unwrapped(base_of(leaf)))
        if is_adapted(leaf):
            put(weight.layer, weight.variable.name, leaf)
        else:
            take_off(weight.layer, weight.variable.name)
    _freeze(model, any(map(is_adapted, tree.values())))
    dress(model)
    around = models_with(layers_of(model))  # they call the adapted layers too
    forget_functions(around)
    if list(map(id, trained)) != list(map(id, model.trainable_variables)):
        end_compilation(around)
    return model


def _cells_for_cudnn(model: Layer) -> set[int]:
    """Return the ids of the cells whose layer may hand their variables to cuDNN."""
    recurrent = (keras.layers.LSTM, keras.layers.GRU)
    found = [layer for layer in layers_of(model) if isinstance(layer, recurrent)]
    return {id(layer.cell) for layer in found if getattr(layer, "use_cudnn", False)}


def _check(path: str, weight: _Weight, leaf: object) -> None:
    """Raise ValueError for a leaf that its layer cannot hold."""
    if isinstance(leaf, LoHaWeight) and (reason := why_not(weight.layer, weight.variable, leaf)):
        raise ValueError(
            f"The weight {path} cannot be adapted: {reason}. Narrow `target_modules` or use "
            "`exclude_modules`."
        )
    if is_adapted(leaf) and len(weight.holders) > 1:
        raise ValueError(
            f"The variable {path} belongs to several layers, {weight.holders}, and an adapter to "
            "one. Use one layer in both places, or leave it out."
        )
    if weight.is_quantised and isinstance(leaf, SavedWeight):
        raise ValueError(
            f"modules_to_save names the layer of {path}, which is quantised and cannot be trained "
            "whole. Leave it out, or quantise the other layers alone: model.quantize(filters=...)."
        )
    if weight.is_quantised and not is_quantised(base_of(leaf)):
        raise ValueError(
            f"The layer of {path} is quantised to {weight.layer.quantization_mode} and cannot hold "
            "a float kernel. Merge with loha_jax.merge(model, requantise=True)."
        )


def _set_base(weight: _Weight, value: Any) -> None:
    """Set the model's own variable where it has changed."""
    if weight.is_quantised:
        if weight.layer.quantization_mode == "int8":
            set_kernel(weight.layer, value)
    elif own_value(weight.variable) is not value:
        weight.variable.assign(value)


def _freeze(model: Layer, adapted: bool) -> None:
    """Freeze the model's own variables, or let them be as they were before the first adapter."""
    for layer in layers_of(model):
        siblings = {id(variable) for variable in siblings_in(layer).values()}
        for variable in variables_of(layer):
            if id(variable) in siblings:
                continue
            if adapted:
                vars(variable).setdefault(_FROZEN_BY_US, variable.trainable)
                variable.trainable = False
            elif _FROZEN_BY_US in vars(variable):
                variable.trainable = vars(variable).pop(_FROZEN_BY_US)


def layouts_of(model: Layer, given: Layouts | None) -> ModelLayouts:
    """Return the given layouts, and those of the model's own layers, by module name.

    To "all-linear", only the kernels of Dense and EinsumDense are linear.
    """
    found: dict[str, Layout] = {}
    lookups: set[str] = set()
    others: set[str] = set()
    turned: set[str] = set()
    for path, weight in _weights(model).items():
        parts = path_parts((jax.tree_util.DictKey(path),))
        if not is_kernel_leaf(parts):  # a bias of several axes has the name of its kernel's module
            continue
        name = module_name(parts)
        is_kernel = weight.variable is kernel_of(weight.layer)
        word = kernel_layout(weight.layer) if is_kernel else None
        ndim = len(weight.variable.shape)
        if word is not None:
            found[name] = Layout(word)
        elif ndim > 2 and isinstance(weight.layer, TRANSPOSED):
            found[name] = Layout("k" * (ndim - 2) + "oi")
            turned.add(name)
        elif ndim > 2 and not is_kernel:  # `write_back` says why it cannot be adapted
            found[name] = Layout("i" * (ndim - 1) + "o")
            if isinstance(weight.layer, DEPTHWISE):
                turned.add(name)
        linear = isinstance(weight.layer, (keras.layers.Dense, keras.layers.EinsumDense))
        if isinstance(weight.layer, keras.layers.Embedding):
            lookups.add(name)
        elif ndim > 1 and not (is_kernel and linear):
            others.add(name)
    return ModelLayouts(given or {}, found, turned, lookups=lookups, left_out=others)


def is_node(x: object) -> bool:
    """Return whether x is a part of a Keras model."""
    return isinstance(x, keras.layers.Layer | keras.Variable)


def nodes_among(args: PyTree) -> Iterator[AdaptedVariable]:
    """Yield the adapted variables of all models among the leaves of `args`."""
    for leaf in jax.tree.leaves(args):
        if isinstance(leaf, keras.layers.Layer):
            yield from adapted_among(layers_of(leaf))


def provided_among(args: PyTree) -> Iterator[tuple[str, LoHaWeight]]:
    """Yield nothing: the layers of a Keras model compute with their adapters themselves."""
    yield from ()


def call(
    run: Callable[[Callable[..., PyTree], tuple[Any, ...], dict[str, Any]], PyTree],
    fn: Callable[..., PyTree],
    args: tuple[Any, ...],
    kwargs: dict[str, PyTree],
    *,
    changes: bool = True,
) -> PyTree:
    """Call `fn`; the layers of the models among its arguments compute with their adapters.

    Raises:
        TypeError: each row was to run through an adapter of its own (`changes` is False).
    """
    if not changes:
        raise TypeError(
            "A Keras model runs all rows through its active adapters: adapt(..., adapter_index=...)"
            " takes a tree of parameters. Call the model for each adapter, after "
            "loha_jax.set_adapter(model, name)."
        )
    observed = OBSERVER.get() is not None  # nothing is computed: updates would hold traced values
    with keras.StatelessScope() if observed else contextlib.nullcontext():
        return run(fn, args, kwargs)
