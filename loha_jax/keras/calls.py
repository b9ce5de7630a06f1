"""Calls of adapted layers: the layer's own computation, through `adapt`.

A float layer's `call` runs with its kernel as an argument of a function that `loha_jax.adapt`
evaluates. A quantised layer computes x·W as Keras does it; then come x·ΔW, bias and activation.
"""

# Keras has no type information.
# pyright: reportMissingImports=false, reportUnknownVariableType=false
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from keras import ops

from loha_jax.keras._keras_internals import (
    Layer,
    Substitution,
    Variable,
    own_signature,
    own_value,
)
from loha_jax.keras.layer_kinds import base_class, update_of
from loha_jax.keras.siblings import SEED, AdaptedVariable, adapted_in
from loha_jax.transform.adapt import run
from loha_jax.transform.options import OBSERVER, Options
from loha_jax.tree.dropout import dropout
from loha_jax.tree.forgotten_dropout import is_differentiated
from loha_jax.tree.leaves import LoHaWeight

Call = Callable[..., Any]


def call_layer(layer: Layer, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a layer with its adapters.

    Args:
        layer: an adapted layer.
        call: its own `call` or `quantized_call`, which reads the layer's variables.
        args, kwargs: of the call. `training` may be among them although `call` does not take it.
    """
    training = kwargs.get("training")
    if "training" in kwargs and not takes_training(layer):
        kwargs = {name: value for name, value in kwargs.items() if name != "training"}
    in_use = [adapted for adapted in adapted_in(layer).values() if adapted.counts]
    kernels = [adapted for adapted in in_use if isinstance(adapted.template, LoHaWeight)]
    copies = [adapted for adapted in in_use if adapted not in kernels]
    options = Options(training=training is not False, observer=OBSERVER.get())
    if kernels:
        (kernel,) = kernels  # a layer of a known kind has one
        leaf = _leaf_for_call(kernel, training)
        call = _through_adapt(layer, kernel.base, leaf, call, options)
    with Substitution(
        [(adapted.base, own_value(adapted.current())) for adapted in copies]
    ) as scope:
        result = call(*args, **kwargs)
    scope.pass_on(layer)
    holders = {id(adapted.base): adapted.current() for adapted in copies}
    for name, variable in scope.changed.items():
        holders.get(name, variable).assign(scope.get_current_value(variable))
    return result


def takes_training(layer: Layer) -> bool:
    """Return whether the `call` of a layer's own class takes `training`."""
    return "training" in own_signature(layer).parameters


def _leaf_for_call(adapted: AdaptedVariable, training: bool | None) -> LoHaWeight:
    """Return the adapted kernel, with dropout's masks in training.

    Raises:
        ValueError: the adapter drops out, the layer is trained, and Keras does not say so.
    """
    leaf = adapted.leaf()
    assert isinstance(leaf, LoHaWeight)
    if not adapted.drops:
        return leaf
    if training is None and any(
        is_differentiated(factors.hada_w1_a) for factors in leaf.active_adapters
    ):
        raise ValueError(
            f"The adapter of {leaf.label} drops out in training, and the layer is not told whether "
            "this is training. Let the `call` of the model, and of the layers around it, take "
            "`training` and pass it on: self.layer(x, training=training)."
        )
    if not training:
        return leaf
    seed = vars(adapted.layer)[SEED].next()
    return dropout(leaf, jax.random.wrap_key_data(seed, impl="threefry2x32"))


def _through_adapt(
    layer: Layer, kernel: Variable, leaf: LoHaWeight, call: Call, options: Options
) -> Call:
    if layer.quantization_mode is not None:
        return lambda inputs, **kwargs: _with_update(layer, leaf, options, inputs, kwargs)

    def adapted(*args: Any, **kwargs: Any) -> Any:
        changed: dict[int, Variable] = {}

        def fn(
            kernel_value: jax.Array, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[Any, list[jax.Array | None]]:
            with Substitution([(kernel, kernel_value)]) as scope:
                result = call(*args, **kwargs)
            if scope.losses:
                raise NotImplementedError(
                    f"The call of the adapted layer {layer.path} adds losses (add_loss), which "
                    "would be lost. Add them in the layer or model around it."
                )
            changed.update(scope.changed)
            return result, [scope.get_current_value(variable) for variable in changed.values()]

        result, values = run(fn, (leaf, args, kwargs), {}, options)
        for variable, value in zip(changed.values(), values, strict=True):
            variable.assign(value)
        return result

    return adapted


def _with_update(
    layer: Layer,
    leaf: LoHaWeight,
    options: Options,
    inputs: jax.Array,
    kwargs: dict[str, Any],
) -> Any:
    """Return activation(x·W + x·ΔW + bias) of a quantised layer."""
    bias, activation = vars(layer).get("bias"), vars(layer).get("activation")
    bare = object.__new__(base_class(layer))
    vars(bare).update({**vars(layer), "bias": None, "activation": None})
    delta = update_of(layer, inputs, leaf, options)
    outputs = ops.add(bare.quantized_call(inputs, **kwargs), delta)
    if bias is not None:
        outputs = ops.add(outputs, bias)
    return outputs if activation is None else activation(outputs)
