"""Subclasses of Keras' layers that compute, save and load with their adapters."""

# Keras has no type information.
# pyright: reportMissingImports=false, reportUnknownVariableType=false
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import functools
from typing import Any, NoReturn

import numpy as np

from loha_jax.keras._keras_internals import (
    Layer,
    add_seed,
    ask_for_training,
    layers_of,
    own_value,
    remove_seed,
    restore_signature,
    without,
)
from loha_jax.keras.calls import call_layer, takes_training
from loha_jax.keras.layer_kinds import base_class
from loha_jax.keras.siblings import SEED, adapted_in, siblings_in

_STORED = "loha:"
_SETTINGS = "loha:settings"
_KEPT = "_loha_kept"

_NO_KERAS_FILE = (
    "A .keras file, a config and a copy hold Keras' own layers, and would lose the adapters of "
    "{name}. Save the adapter with loha_jax.interop.save_peft(folder, model), or all weights with "
    "model.save_weights(path), which a model with the same adapters loads again; or save the "
    "merged model: loha_jax.merge(model).save(path)."
)


class Adapted:
    """The methods of an adapted layer that differ from those of its own class."""

    _loha_base: type

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Compute with the adapters."""
        return call_layer(self, super().call, args, kwargs)

    def quantized_call(self, *args: Any, **kwargs: Any) -> Any:
        """Compute with the quantised kernel and the adapters."""
        return call_layer(self, super().quantized_call, args, kwargs)

    def enable_lora(self, *args: object, **kwargs: object) -> NoReturn:
        """Refuse Keras' own LoRA beside a LoHa."""
        raise ValueError(
            f"The layer {_path(self)} has a LoHa adapter: Keras' enable_lora would train a LoRA "
            "beside it that no file of the adapter holds. Merge or unload the adapter first "
            "(loha_jax.merge, loha_jax.unload)."
        )

    def save_own_variables(self, store: Any) -> None:
        """Save the variables of the layer as its own class does, and those of the adapters."""
        with without(self, siblings_in(self)):
            super().save_own_variables(store)
        for name, variable in siblings_in(self).items():
            store[_STORED + name] = own_value(variable)
        store[_SETTINGS] = _settings(self)

    def load_own_variables(self, store: Any) -> None:
        """Load what `save_own_variables` of a layer with equal adapters has saved."""
        held = {name: store[name] for name in list(store.keys())}
        settings = held.pop(_SETTINGS, None)
        adapters = {
            name.removeprefix(_STORED): held.pop(name)
            for name in list(held)
            if name.startswith(_STORED)
        }
        own = siblings_in(self)
        given = {name: tuple(value.shape) for name, value in adapters.items()}
        wanted = {name: tuple(variable.shape) for name, variable in own.items()}
        if given != wanted or not np.array_equal(np.asarray(settings), _settings(self)):
            raise ValueError(
                f"The weights of the layer {_path(self)} were saved with other adapters: the file "
                f"has {_shown(given, settings)}, the layer {_shown(wanted, _settings(self))}. Load "
                "them into a model with the same inject(...); an adapter's file is loaded with "
                "loha_jax.interop.load_peft(folder, model)."
            )
        with without(self, siblings_in(self)):
            super().load_own_variables(held)
        for name, variable in own.items():
            variable.assign(adapters[name])


def _path(layer: Layer) -> str:
    return layer.path or layer.name


def _settings(layer: Layer) -> np.ndarray:
    """Return ranks, alphas and layouts as bytes, which a file of weights can hold."""
    text = ";".join(f"{name}={x.settings}" for name, x in sorted(adapted_in(layer).items()))
    return np.frombuffer(text.encode(), np.uint8)


def _shown(shapes: dict[str, tuple[int, ...]], settings: Any) -> str:
    said = "" if settings is None else f" with {np.asarray(settings).tobytes().decode()}"
    return f"{', '.join(f'{n} {list(s)}' for n, s in sorted(shapes.items())) or 'none'}{said}"


@functools.cache
def adapted_class(cls: type) -> type:
    """Return the subclass of a layer's class that computes with adapters."""
    members = {"__module__": cls.__module__, "__doc__": cls.__doc__, "_loha_base": cls}
    return type(f"LoHa{cls.__name__}", (Adapted, cls), members)


def dress(model: Layer) -> None:
    """Set the class of each layer: the adapted one if it holds adapted variables, else its own."""
    for layer in layers_of(model):
        held = adapted_in(layer)
        drops = any(adapted.drops for adapted in held.values())
        if drops and SEED not in vars(layer):
            add_seed(layer, SEED)
            if not takes_training(layer):
                ask_for_training(layer)
        elif not drops and SEED in vars(layer):
            remove_seed(layer, SEED)
            restore_signature(layer)
        cls = adapted_class(base_class(layer)) if held else base_class(layer)
        if type(layer) is not cls:
            layer.__class__ = cls
    for layer in layers_of(model):
        _guard(layer)


def _quantise(layer: Layer, *args: object, **kwargs: object) -> NoReturn:
    raise ValueError(
        f"The layer {_path(layer)} has an adapter. Quantise the model before inject, or merge the "
        "adapter first (loha_jax.merge)."
    )


def _get_config(layer: Layer, *args: object, **kwargs: object) -> NoReturn:
    raise ValueError(_NO_KERAS_FILE.format(name=_path(layer)))


_GUARDED = {"quantize": _quantise, "get_config": _get_config, "save": _get_config}
"""What adapted layers, and the layers around them, refuse."""


def _guard(layer: Layer) -> None:
    """Let a layer refuse what is wrong for the adapters in it, as long as there are some.

    Keras gives each object its own `quantize`, so a method of a class would not be found.
    """
    adapted = next((inner for inner in layers_of(layer) if adapted_in(inner)), None)
    kept = vars(layer).get(_KEPT)
    if adapted is not None and kept is None:
        vars(layer)[_KEPT] = {n: vars(layer)[n] for n in _GUARDED if n in vars(layer)}
        guards = {n: functools.partial(fn, adapted) for n, fn in _GUARDED.items()}
        vars(layer).update({n: fn for n, fn in guards.items() if hasattr(layer, n)})
    elif adapted is None and kept is not None:
        for name in _GUARDED:
            vars(layer).pop(name, None)
        vars(layer).update(vars(layer).pop(_KEPT))
