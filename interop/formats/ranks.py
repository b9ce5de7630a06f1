"""Ranks and alphas of an adapter file, and the patterns of a config that say them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from loha_jax.lowrank.initial_values import FACTOR_NAMES
from loha_jax.runtime.untrusted import FileError
from loha_jax.targets.matching import exact_patterns, most_common

from .adapter_file import AdapterModule


def plain_number(alpha: float) -> float:
    """Return an alpha as people write it: 8, not 8.0."""
    return int(alpha) if alpha == int(alpha) else alpha


def ranks_and_alphas(modules: Mapping[str, AdapterModule]) -> dict[str, Any]:
    """Return the fields of a config that give each module its rank and alpha."""
    ranks = {name: m.r for name, m in modules.items()}
    alphas = {name: plain_number(m.alpha) for name, m in modules.items()}
    r, alpha = most_common(ranks.values()), most_common(alphas.values())
    return {
        "r": r,
        "alpha": alpha,
        "rank_pattern": exact_patterns(ranks, r),
        "alpha_pattern": exact_patterns(alphas, alpha),
    }


def rank_of(name: str, tensors: Mapping[str, np.ndarray]) -> int:
    """Return the rank of one module's factors in PEFT's shapes, whose kernel is not known.

    Args:
        name: for messages.
        tensors: `hada_*`; any order.

    Raises:
        FileError: some are missing, do not fit each other, or do not hold floating-point numbers.
    """
    has_cores = any(part.startswith("hada_t") for part in tensors)
    wanted = [part for part in FACTOR_NAMES if has_cores or not part.startswith("hada_t")]
    check_present(name, tensors, wanted)
    shapes = {part: tensors[part].shape for part in wanted}
    a, b, core = shapes["hada_w1_a"], shapes["hada_w1_b"], shapes.get("hada_t1")
    if (
        len(a) != 2
        or len(b) != 2
        or any(0 in shape for shape in shapes.values())
        or any(shapes[part] != shapes[part.replace("1", "2")] for part in wanted if "1" in part)
        or b[0] != a[1 if core is None else 0]
        or (core is not None and (len(core) < 4 or core[:2] != (b[0], b[0])))
    ):
        raise misfit(name, {part: tensors[part] for part in wanted})
    check_floating(name, {part: tensors[part] for part in wanted})
    return b[0]


def check_present(name: str, tensors: Mapping[str, np.ndarray], wanted: Iterable[str]) -> None:
    """Raise FileError if a module lacks some tensors."""
    if missing := [part for part in wanted if part not in tensors]:
        have = ", ".join(tensors) or "no factor"
        raise FileError(f"{name} lacks {', '.join(missing)}; it has {have}")


def check_floating(name: str, tensors: Mapping[str, np.ndarray]) -> None:
    """Raise FileError for a factor of a module that does not hold floating-point numbers."""
    for part, tensor in tensors.items():
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise FileError(f"{name}.{part} is {tensor.dtype}; factors hold floating-point numbers")


def misfit(name: str, tensors: Mapping[str, np.ndarray]) -> FileError:
    """Return the error of factors of a module that do not fit each other."""
    return FileError(f"the factors of {name} do not fit each other: {shown_shapes(tensors)}")


def shown_shapes(tensors: Mapping[str, np.ndarray]) -> str:
    """Return names and shapes for a message: "lora_A [2, 4], lora_B [3, 2]"."""
    return ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in tensors.items())
