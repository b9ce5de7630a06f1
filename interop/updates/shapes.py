"""Shapes of the updates that an adapter file holds, which settle layouts that nothing else says."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..formats.adapter_file import AdapterModule


def update_shapes(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the updates in a state dict, by module.

    They are `[out, in, *spatial]`, or `[out, in * prod(spatial)]`.

    Args:
        arrays: by keys like "layer.conv.hada_w1_a", without a prefix. What is no factor is passed
            over.

    Example:
        >>> import numpy as np
        >>> a, b = np.ones((2, 4, 3, 3)), np.ones((6, 2, 1, 1))
        >>> update_shapes({"conv.lora_A": a, "conv.lora_B": b})
        {'conv': (6, 4, 3, 3)}
    """
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, array in arrays.items():
        name, _, part = key.rpartition(".")
        modules.setdefault(name, {})[part] = tuple(array.shape)
    return {name: shape for name, shapes in modules.items() if (shape := _update_shape(shapes))}


def module_shapes(modules: Mapping[str, AdapterModule]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the updates of modules of a file; see `update_shapes`."""
    shapes = update_shapes(
        {f"{name}.{part}": t for name, m in modules.items() for part, t in m.tensors.items()}
    )
    known = {
        name: m.in_shape for name, m in modules.items() if m.in_shape is not None and name in shapes
    }
    return shapes | {name: (shapes[name][0], *in_shape) for name, in_shape in known.items()}


def _update_shape(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """Return the shape of the factors' product; None where one is missing or misshapen."""
    if "lora_B" in shapes and "lora_A" in shapes:
        left, right = shapes["lora_B"], shapes["lora_A"]
        return (left[0], *right[1:]) if left and right else None
    left, right, core = (shapes.get(part) for part in ("hada_w1_a", "hada_w1_b", "hada_t1"))
    if left is None or right is None or len(left) != 2 or len(right) != 2:
        return None
    return (left[0], right[1]) if core is None else (left[1], right[1], *core[2:])
