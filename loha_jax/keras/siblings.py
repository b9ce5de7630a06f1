"""How a Keras layer holds an adapter: variables beside the one that it adapts.

The base variable stays in its place. For a variable `kernel`, the layer gets

- `kernel_lora_hada_w1_a`, …: a variable for each array of the adapter "default". Those of an
  adapter NAME are called `kernel_lora_NAME_hada_w1_a`, …. Only those of active adapters are
  trainable;
- an entry of `_loha_adapted`, an `AdaptedVariable` with everything else;
- `_loha_seed`, a random stream, if an adapter has a dropout.

A variable of a module in `modules_to_save` gets `gamma_lora_copy` (or `gamma_lora_NAME_copy`).
"""

# Keras has no type information.
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import jax

from loha_jax.keras._keras_internals import (
    Layer,
    Variable,
    add_variable,
    own_value,
    remove_variable,
)
from loha_jax.keras.layer_kinds import kernel_of
from loha_jax.keras.quantised import MODES, quantised_kernel
from loha_jax.tree.factors import UNTRAINED_NAMES
from loha_jax.tree.leaves import LoHaWeight, SavedWeight
from loha_jax.tree.quantised import wrapped

ADAPTED = "_loha_adapted"
SEED = "_loha_seed"


@dataclasses.dataclass(frozen=True, eq=False)  # variables compare elementwise
class AdaptedVariable:
    """An adapted variable of a layer.

    Attributes:
        layer: the layer that holds it.
        name: of the variable.
        template: the leaf without its base, and with the variables' names for arrays.
        variables: beside the base, by name.
    """

    layer: Layer
    name: str
    template: LoHaWeight | SavedWeight
    variables: dict[str, Variable]

    @property
    def base(self) -> Variable:
        """The layer's own variable."""
        return base_variable(self.layer, self.name)

    @property
    def drops(self) -> bool:
        """True if an active adapter has a dropout."""
        if isinstance(self.template, SavedWeight):
            return False
        configs = (factors.config for factors in self.template.active_adapters)
        return any(config.rank_dropout or config.module_dropout for config in configs)

    @property
    def counts(self) -> bool:
        """True if an active adapter changes the layer's result."""
        if isinstance(self.template, SavedWeight):
            return self.template.copy_of(self.template.active) is not None
        return bool(self.template.active_adapters)

    def leaf(self) -> LoHaWeight | SavedWeight:
        """Return the variable as a leaf of a tree."""
        names, structure = jax.tree.flatten(self.template)
        leaf = structure.unflatten([own_value(self.variables[name]) for name in names])
        base = base_value(self.layer, self.base)
        if isinstance(leaf, SavedWeight):
            return dataclasses.replace(leaf, original=base)
        return dataclasses.replace(leaf, kernel=wrapped(base))

    def current(self) -> Variable:
        """Return the variable that is in use: the active copy of a saved module, or the base."""
        template = self.template
        if isinstance(template, LoHaWeight):
            return self.base
        name = template.copy_of(template.active)
        return self.base if name is None else self.variables[template.copies[name]]

    @property
    def settings(self) -> str:
        """All that is not in the arrays and changes the result, as text."""
        template = self.template
        layout = None if template.layout is None else template.layout.word
        said: dict[str, Any] = {"layout": layout, "active": template.active}
        if isinstance(template, LoHaWeight):
            for name, f in template.adapters.items():
                said[name] = {"ranks": f.ranks, "alphas": f.alphas, "multiplier": f.multiplier}
        return json.dumps(said)


def base_variable(layer: Layer, name: str) -> Variable:
    """Return a layer's own variable of a name."""
    kernel = kernel_of(layer)
    if kernel is not None and kernel.name == name:
        return kernel
    variables = (*layer._trainable_variables, *layer._non_trainable_variables)
    return next(variable for variable in variables if variable.name == name)


def base_value(layer: Layer, variable: Variable) -> Any:
    """Return the value of a layer's own variable; a quantised kernel with its scale."""
    if variable is kernel_of(layer) and layer.quantization_mode in MODES:
        return quantised_kernel(layer)
    return own_value(variable)


def adapted_in(layer: Layer) -> dict[str, AdaptedVariable]:
    """Return the adapted variables of a layer itself, by name."""
    return vars(layer).get(ADAPTED, {})


def siblings_in(layer: Layer) -> dict[str, Variable]:
    """Return the variables that adapters have given a layer, by name."""
    return {n: v for adapted in adapted_in(layer).values() for n, v in adapted.variables.items()}


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A variable that a leaf needs: its value, and whether it is trained."""

    value: jax.Array
    trainable: bool


def taken_apart(
    leaf: LoHaWeight | SavedWeight, variable: str
) -> tuple[LoHaWeight | SavedWeight, dict[str, Wanted]]:
    """Return the template of a leaf, and the variables that it needs, by name."""
    wanted: dict[str, Wanted] = {}

    def named(adapter: str, array: str) -> str:
        return "_".join((variable, "lora", *([] if adapter == "default" else [adapter]), array))

    if isinstance(leaf, SavedWeight):
        names = {adapter: named(adapter, "copy") for adapter in leaf.copies}
        for adapter, copy in leaf.copies.items():
            trained = adapter in leaf.active and not leaf.is_buffer
            wanted[names[adapter]] = Wanted(copy, trained)
        return dataclasses.replace(leaf, original=None, copies=names), wanted
    adapters = {}
    for adapter, factors in leaf.adapters.items():
        names = {array: named(adapter, array) for array in factors.arrays}
        for array, value in factors.arrays.items():
            trained = adapter in leaf.active and array not in UNTRAINED_NAMES
            wanted[names[array]] = Wanted(value, trained)
        adapters[adapter] = dataclasses.replace(factors, **names)
    return dataclasses.replace(leaf, kernel=None, adapters=adapters), wanted


def put(layer: Layer, name: str, leaf: LoHaWeight | SavedWeight) -> None:
    """Put the variables of a leaf beside the layer's variable of a name.

    A variable that was there and has the shape and dtype stays, so that an optimizer finds it.
    A copy of a variable that the layer has made as one that is not trained is not trained either.
    """
    base = base_variable(layer, name)
    template, wanted = taken_apart(leaf, name)
    if isinstance(leaf, SavedWeight) and all(base is not v for v in layer._trainable_variables):
        wanted = {own: dataclasses.replace(new, trainable=False) for own, new in wanted.items()}
    old = dict(adapted_in(layer)[name].variables) if name in adapted_in(layer) else {}
    variables: dict[str, Variable] = {}
    for own, new in wanted.items():
        variable = old.get(own)
        if variable is not None and _fits(variable, new.value):
            del old[own]
            if own_value(variable) is not new.value:
                variable.assign(new.value)
            variable.trainable = new.trainable
        variables[own] = variable
    _remove(layer, old)
    for own, new in wanted.items():
        if variables[own] is None or own in old:
            variables[own] = add_variable(layer, own, new.value, trainable=new.trainable)
            vars(layer)[own] = variables[own]
            if isinstance(leaf, SavedWeight):
                variables[own].regularizer = base.regularizer
                variables[own].constraint = base.constraint
    adapted = AdaptedVariable(layer, name, template, variables)
    vars(layer)[ADAPTED] = {**adapted_in(layer), name: adapted}


def take_off(layer: Layer, name: str) -> None:
    """Remove all that is beside a layer's variable of a name."""
    adapted = dict(adapted_in(layer))
    if name in adapted:
        _remove(layer, adapted.pop(name).variables)
        vars(layer)[ADAPTED] = adapted
    if not adapted:
        vars(layer).pop(ADAPTED, None)


def _remove(layer: Layer, variables: dict[str, Variable]) -> None:
    for name, variable in variables.items():
        remove_variable(layer, variable)
        vars(layer).pop(name, None)


def _fits(variable: Variable, value: jax.Array) -> bool:
    own = own_value(variable)
    return own.shape == value.shape and own.dtype == value.dtype


def adapted_among(layers: list[Layer]) -> Iterator[AdaptedVariable]:
    """Yield the adapted variables of some layers."""
    for layer in layers:
        yield from adapted_in(layer).values()
