"""Ranks and alphas of an adapter file, and the patterns of a config that say them."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np

from loha_jax.lowrank.initial_values import FACTOR_NAMES
from loha_jax.runtime.untrusted import FileError

from .adapter_file import AdapterModule

T = TypeVar("T")


def exact_pattern(name: str) -> str:
    """Return the key of `rank_pattern` or `alpha_pattern` that matches only this full name."""
    return f"^{re.escape(name)}"


def most_common(values: Iterable[T]) -> T:
    """Return the value that occurs most often; the first of several."""
    return collections.Counter(values).most_common(1)[0][0]


def plain_number(alpha: float) -> float:
    """Return an alpha as people write it: 8, not 8.0."""
    return int(alpha) if alpha == int(alpha) else alpha


def ranks_and_alphas(modules: Mapping[str, AdapterModule]) -> dict[str, Any]:
    """Return the fields of a config that give each module its rank and alpha."""
    r, alpha = (
        most_common(m.r for m in modules.values()),
        most_common(m.alpha for m in modules.values()),
    )
    return {
        "r": r,
        "alpha": plain_number(alpha),
        "rank_pattern": {exact_pattern(n): m.r for n, m in modules.items() if m.r != r},
        "alpha_pattern": {
            exact_pattern(n): plain_number(m.alpha) for n, m in modules.items() if m.alpha != alpha
        },
    }


def rank_of(name: str, tensors: Mapping[str, np.ndarray]) -> int:
    """Return the rank of one module's factors in PEFT's shapes, whose kernel is not known.

    Args:
        name: for messages.
        tensors: `hada_*`; any order.

    Raises:
        FileError: some are missing, do not fit each other, or do not hold floating-point numbers.
    """
    cores = [part for part in FACTOR_NAMES if part.startswith("hada_t")]
    wanted = [
        part for part in FACTOR_NAMES if part not in cores or any(core in tensors for core in cores)
    ]
    if missing := [part for part in wanted if part not in tensors]:
        raise FileError(
            f"{name} lacks {', '.join(missing)}; it has {', '.join(tensors) or 'no factor'}"
        )
    shapes = {part: tensors[part].shape for part in wanted}
    r = shapes["hada_w1_b"][0] if shapes["hada_w1_b"] else 0
    rank_axis = 0 if cores[0] in wanted else 1
    fits = (
        r > 0
        and all(0 not in shape for shape in shapes.values())
        and all(shapes[f"hada_w1_{part}"] == shapes[f"hada_w2_{part}"] for part in "ab")
        and all(len(shapes[part]) == 2 for part in wanted if part not in cores)
        and shapes["hada_w1_a"][rank_axis] == r
        and all(
            len(shapes[core]) >= 4 and shapes[core][:2] == (r, r)
            for core in cores
            if core in wanted
        )
        and (cores[0] not in wanted or shapes[cores[0]] == shapes[cores[1]])
    )
    if not fits:
        found = ", ".join(f"{part} {list(shape)}" for part, shape in shapes.items())
        raise FileError(f"the factors of {name} do not fit each other: {found}")
    if odd := [part for part in wanted if not jnp.issubdtype(tensors[part].dtype, jnp.floating)]:
        raise FileError(
            f"{name}.{odd[0]} is {tensors[odd[0]].dtype}; factors hold floating-point numbers"
        )
    return r
