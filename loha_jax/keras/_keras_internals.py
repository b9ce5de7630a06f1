"""All that is used of Keras besides its public names (tested with 3.15.1)."""

# Keras has no type information.
# pyright: reportMissingImports=false, reportUnknownVariableType=false
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import contextlib
import gc
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import keras
from keras.src.backend import AutocastScope
from keras.src.backend.common.stateless_scope import get_stateless_scope
from keras.src.backend.config import is_nnx_enabled

Layer = Any
"""A `keras.layers.Layer`."""

Variable = Any
"""A `keras.Variable`."""

_LISTS = ("_trainable_variables", "_non_trainable_variables")

if keras.backend.backend() != "jax":
    raise ImportError(
        f"loha_jax.keras needs Keras' JAX backend, and this process uses "
        f"{keras.backend.backend()!r}. Set the environment variable KERAS_BACKEND=jax before Keras "
        "is first imported."
    )
if is_nnx_enabled():
    raise ImportError(
        "loha_jax.keras adapts Keras' own layers, and KERAS_NNX_ENABLED makes them NNX modules. "
        "Unset that environment variable."
    )


def layers_of(model: Layer) -> list[Layer]:
    """Return a layer and all layers in it, each once."""
    return model._flatten_layers()


def variables_of(layer: Layer) -> list[Variable]:
    """Return the variables of a layer itself, without those of its layers and its seeds."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def own_value(variable: Variable) -> jax.Array:
    """Return the current value of a variable in its own dtype, whatever the layer computes in."""
    with AutocastScope(None):
        return variable.value


def add_variable(layer: Layer, name: str, value: jax.Array, *, trainable: bool) -> Variable:
    """Give a built layer one more variable."""
    with unlocked(layer):
        variable = layer.add_weight(
            name=name,
            shape=value.shape,
            dtype=value.dtype.name,
            initializer="zeros",
            trainable=True,
            autocast=False,
        )
    variable._path = f"{layer.path}/{name}"
    variable.trainable = trainable  # also in a layer that is frozen
    variable.assign(value)
    return variable


def remove_variable(layer: Layer, variable: Variable) -> None:
    """Take a variable off a layer."""
    layer._untrack_variable(variable)


@contextlib.contextmanager
def without(layer: Layer, variables: Mapping[str, Variable]) -> Iterator[None]:
    """Let a layer save and load its variables as if some were not there."""
    hidden = {id(variable) for variable in variables.values()}
    lists = {name: vars(layer)[name] for name in _LISTS}
    for name, held in lists.items():
        vars(layer)[name] = [variable for variable in held if id(variable) not in hidden]
    try:
        yield
    finally:
        vars(layer).update(lists)


@contextlib.contextmanager
def unlocked(layer: Layer) -> Iterator[None]:
    """Let a built layer get new state."""
    locked = layer._tracker.locked
    layer._tracker.unlock()
    try:
        yield
    finally:
        if locked:
            layer._tracker.lock()


def add_seed(layer: Layer, name: str) -> None:
    """Give a built layer a random stream, seeded as those of Keras' own layers are."""
    with unlocked(layer):
        setattr(layer, name, keras.random.SeedGenerator())


def remove_seed(layer: Layer, name: str) -> None:
    """Take a random stream off a layer."""
    layer._seed_generators.remove(vars(layer).pop(name))


def ask_for_training(layer: Layer) -> None:
    """Let Keras pass `training` to a layer whose `call` does not take it."""
    signature = layer._call_signature
    more = inspect.Parameter("training", inspect.Parameter.KEYWORD_ONLY, default=None)
    _set_signature(layer, signature.replace(parameters=[*signature.parameters.values(), more]))


def restore_signature(layer: Layer) -> None:
    """Undo `ask_for_training`."""
    _set_signature(layer, own_signature(layer))


def own_signature(layer: Layer) -> inspect.Signature:
    """Return the signature of the `call` of a layer's class before it was adapted."""
    cls = getattr(type(layer), "_loha_base", type(layer))
    return inspect.signature(cls.call.__get__(layer))


def _set_signature(layer: Layer, signature: inspect.Signature) -> None:
    takes = "training" in signature.parameters
    vars(layer)["_call_signature"] = signature
    vars(layer)["call_signature_parameters"] = list(signature.parameters)
    vars(layer)["_call_has_training_arg"] = takes
    vars(layer)["_call_has_context_arg"] = {**layer._call_has_context_arg, "training": takes}


def models_with(layers: list[Layer]) -> list[Layer]:
    """Return all models that are alive and contain one of the layers.

    A model knows its layers, but no layer knows the models around it.
    """
    wanted = {id(layer) for layer in layers}
    found = []
    for thing in gc.get_objects():
        if issubclass(type(thing), keras.Model):
            with contextlib.suppress(AttributeError):  # one that is being made
                if any(id(layer) in wanted for layer in layers_of(thing)):
                    found.append(thing)
    return found


def forget_functions(models: list[Layer]) -> None:
    """Delete what models have compiled for `fit`, `evaluate` and `predict`."""
    for model in models:
        model.train_function = model.test_function = model.predict_function = None


def end_compilation(models: list[Layer]) -> None:
    """Let `fit` and `evaluate` ask for `compile`: the optimizer is for other variables."""
    for model in models:
        model.compiled = False


class Substitution(keras.StatelessScope):
    """A scope in which variables have other values, and the others those of the scope around it.

    Args:
        values: pairs of a variable and its value.

    Attributes:
        changed: the variables that were assigned to.
    """

    def __init__(self, values: list[tuple[Variable, jax.Array]]):
        super().__init__(collect_losses=True, initialize_variables=False)
        self.state_mapping.update({id(variable): value for variable, value in values})
        self.changed: dict[int, Variable] = {}
        self.around = get_stateless_scope()

    def add_update(self, update: tuple[Variable, jax.Array]) -> None:
        """Note the new value of a variable."""
        super().add_update(update)
        self.changed[id(update[0])] = update[0]

    def get_current_value(self, variable: Variable) -> jax.Array | None:
        """Return the value of a variable, None for the one that it holds itself."""
        value = super().get_current_value(variable)
        if value is None and self.around is not None:
            return self.around.get_current_value(variable)
        return value

    def pass_on(self, layer: Layer) -> None:
        """Add the losses of calls inside to the scope around, or to the layer itself."""
        if self.around is None:
            layer._losses.extend(self.losses)
        elif self.around.collect_losses:
            for loss in self.losses:
                self.around.add_loss(loss)
