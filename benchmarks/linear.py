"""One Linear layer: widths, ranks and numbers of tokens; how well "auto" chooses.

    python -m benchmarks linear

The loss is the sum of the outputs times given numbers: the gradient that comes back to the layer is
a full array.
"""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from benchmarks.case import Adapter, Case, Settings
from benchmarks.jax_methods import JaxModel

if TYPE_CHECKING:
    from benchmarks.torch_peers import TorchModel

WIDTHS = (768, 2048, 4096)
RANKS = (4, 8, 16, 32)
TOKENS = (1, 256, 2048)
WITH_PROCESS_MEMORY = (2048, 8, 2048)


def cases(settings: Settings) -> list[Case]:
    """All combinations."""
    grid = (
        itertools.product((64,), (4,), (1, 16))
        if settings.quick
        else itertools.product(WIDTHS, RANKS, TOKENS)
    )
    return [
        Case(
            subject="linear",
            name=f"linear-{width}-{rank}-{tokens}",
            shape={"d": width, "r": rank, "T": tokens},
            adapter=Adapter(rank, ("layer",)),
            jax_model=functools.partial(_jax_model, width, tokens, settings.dtype),
            torch_model=functools.partial(_torch_model, width, tokens, settings.dtype),
            process_memory=(width, rank, tokens) == WITH_PROCESS_MEMORY,
        )
        for width, rank, tokens in grid
    ]


def _arrays(width: int, tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    kernel = random.standard_normal((width, width), np.float32) / np.float32(np.sqrt(width))
    x, cotangent = (random.standard_normal((tokens, width), np.float32) for _ in range(2))
    return kernel, x, cotangent


def _jax_model(width: int, tokens: int, dtype: str) -> JaxModel:
    kernel, x, cotangent = (jnp.asarray(array, dtype) for array in _arrays(width, tokens))
    return JaxModel(
        apply=lambda params, x, batch: x @ params["layer"]["kernel"],
        params={"layer": {"kernel": kernel}},
        x=x,
        batch={"cotangent": cotangent},
        loss=lambda y, batch: (y * batch["cotangent"]).sum(),
    )


def _torch_model(width: int, tokens: int, dtype: str) -> TorchModel:
    from benchmarks import torch_models

    return torch_models.linear(*_arrays(width, tokens), dtype)
