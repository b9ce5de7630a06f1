"""Serialisation of adapted leaves for `jax.export`.

An exported function describes its arguments, including the static parts of each adapted leaf:
layouts, names, transforms of rows, ranks, configs. They are written as JSON, so that reading a file
runs no code.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax.export
import jax.numpy as jnp

from loha_jax.lowrank.layout import Layout
from loha_jax.lowrank.row_transform import RowTransform
from loha_jax.targets.config import LoHaConfig
from loha_jax.targets.lycoris_config import LycorisConfig
from loha_jax.tree.factors import Factors
from loha_jax.tree.leaves import LoHaWeight, SavedWeight
from loha_jax.tree.provenance import Counters, Origin
from loha_jax.tree.quantised import QuantisedArray
from loha_jax.tree.scaled_array import ScaledArray

_WAYS: dict[type, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    tuple: (list, tuple),
    frozenset: (sorted, frozenset),
    dict: (lambda value: list(value.items()), dict),
    Layout: (lambda layout: layout.word, Layout),
    Origin: (
        lambda origin: [origin.config, origin.alphas],
        lambda parts: Origin(parts[0], alphas=parts[1]),
    ),
    Counters: (list, Counters),
    RowTransform: (
        lambda rows: [rows.permutation, rows.scale],
        lambda parts: RowTransform(*parts),
    ),
    LoHaConfig: (LoHaConfig.__getstate__, lambda fields: LoHaConfig(**fields)),
    LycorisConfig: (LycorisConfig.__getstate__, lambda fields: LycorisConfig(**fields)),
}
"""For each type of static value, what it is made of, and the way back."""
_TYPES = {kind.__name__: kind for kind in _WAYS}


def _encode(value: object) -> object:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if type(value) not in _WAYS:
        raise TypeError(f"jax.export cannot write {value!r}, a static part of an adapted leaf")
    parts = _WAYS[type(value)][0](value)
    if isinstance(parts, dict):
        return {type(value).__name__: {name: _encode(part) for name, part in parts.items()}}
    return {
        type(value).__name__: [_encode(part) for part in parts]
        if isinstance(parts, list)
        else parts
    }


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(part) for part in value]
    if not isinstance(value, dict):
        return value
    ((name, parts),) = value.items()
    if isinstance(parts, dict):
        return _WAYS[_TYPES[name]][1]({name: _decode(part) for name, part in parts.items()})
    return _WAYS[_TYPES[name]][1](_decode(parts))


for _leaf in (LoHaWeight, SavedWeight, Factors, QuantisedArray):
    jax.export.register_pytree_node_serialization(
        _leaf,
        serialized_name=f"loha_jax.{_leaf.__name__}",
        serialize_auxdata=lambda static: json.dumps(_encode(tuple(static))).encode(),
        deserialize_auxdata=lambda text: _decode(json.loads(text)),
    )


jax.export.register_pytree_node_serialization(
    ScaledArray,
    serialized_name="loha_jax.ScaledArray",
    serialize_auxdata=lambda static: jnp.dtype(static[0]).name.encode(),
    deserialize_auxdata=lambda name: (jnp.dtype(name.decode()),),
)
