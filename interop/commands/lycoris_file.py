"""The content of a file of LyCORIS or kohya that a conversion writes."""

from __future__ import annotations

import dataclasses

import numpy as np

from ..formats.adapter_file import AdapterModule
from ..formats.lycoris_files import KOHYA_PREFIX, NATIVE_PREFIX, file_bytes, lycoris_state
from ..formats.lycoris_keys import PARAMETER_OF
from .conversion_source import ConversionSource, Converted


def lycoris_file(source: ConversionSource, to: str, prefix: str | None) -> Converted:
    """Return a file of LyCORIS or kohya.

    Args:
        source: the adapter.
        to: "lycoris" or "kohya".
        prefix: of keys; by default the format's.

    Raises:
        ValueError: the file has no place for something.
    """
    lohas, adapter = source.lohas(), source.adapter
    given = {m.prefix for m in lohas.values()}
    are_kohya = all(p.startswith(KOHYA_PREFIX) for p in given)
    if kept := to == "kohya" and are_kohya and prefix is None:
        chosen = None
    elif len(given) > 1:
        raise ValueError(
            f"The source holds several models' modules ({', '.join(sorted(given))}); choose with "
            "`only=`"
        )
    else:
        default = NATIVE_PREFIX if to == "lycoris" else f"{KOHYA_PREFIX}unet_"
        chosen = default if prefix is None else prefix
    modules = [
        dataclasses.replace(m, in_shape=_in_shape(source, own, m)) for own, m in lohas.items()
    ]
    state, convolutions = lycoris_state(modules, _differences(source, renamed=not kept), chosen)
    metadata = {} if adapter.config else adapter.metadata
    return Converted(modules, file_bytes(state, metadata, convolutions))


def _in_shape(source: ConversionSource, own: str, module: AdapterModule) -> tuple[int, ...] | None:
    """Return `(in, *spatial)` of a convolution, as the base's checkpoint or the source says."""
    core, shape = module.tensors.get("hada_t1"), source.shapes.get(module.name)
    if shape is None and module.in_shape is not None:
        return module.in_shape
    if shape is None and core is not None and core.ndim == 4 and core.shape[3] == 1:
        raise ValueError(
            f"The core of {own} is that of a Conv1d or of a Conv2d of width 1; the base model's "
            "checkpoint says which: `base=`"
        )
    return None if shape is None or len(shape) < 3 else shape[1:]


def _differences(source: ConversionSource, *, renamed: bool) -> dict[str, np.ndarray]:
    """Return LyCORIS' differences, by torch's names where they are `renamed`."""
    state: dict[str, np.ndarray] = {}
    refused: list[str] = []
    for key, value in source.adapter.others.items():
        module, _, part = key.rpartition(".")
        if not source.adapter.config and part in PARAMETER_OF:
            state[f"{source.lookup.find_own(module)}.{part}" if renamed else key] = value
        elif not _is_base_weight(source, module, part, value):
            refused.append(key)
    if refused:
        raise ValueError(
            "LyCORIS' files have no place for whole parameters (modules_to_save): "
            f"{', '.join(refused)}. Leave them out with `only=`, or merge the adapter"
        )
    return state


def _is_base_weight(source: ConversionSource, module: str, part: str, value: np.ndarray) -> bool:
    """Return whether a `base_layer` in a PEFT file equals the base, so that it can be left out."""
    base, key = source.checkpoint, f"{module.removesuffix('.base_layer')}.{part}"
    if base is None or not module.endswith(".base_layer") or key not in base.shapes:
        return False
    return np.array_equal(base.read_values(key), value)
