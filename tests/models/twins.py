"""A PyTorch model and its JAX twin with the same weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

VOCABULARY = 100


@dataclasses.dataclass(frozen=True)
class Size:
    """How large a tiny model is, and the seed of its weights and inputs."""

    seed: int = 0
    width: int = 32
    layers: int = 2
    heads: int = 4

    def __post_init__(self) -> None:
        if self.width % (8 * self.heads):  # rotary halves, and group norms of 8 channels
            raise ValueError(f"width {self.width} is no multiple of 8 x {self.heads} heads")

    @functools.cached_property
    def random(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    def ids(self, length: int = 7) -> np.ndarray:
        """Token numbers; the lowest are left to padding and the ends of sentences."""
        return self.random.integers(3, VOCABULARY, (2, length)).astype(np.int32)

    def normal(self, *shape: int) -> np.ndarray:
        return self.random.standard_normal(shape).astype(np.float32)


@dataclasses.dataclass
class Twins:
    """Two models with the same weights.

    Args:
        module: the PyTorch model.
        output: `output(module, inputs)`, the tensor that is compared; the adapted module may be a
            `PeftModel`.
        fn: `fn(params, inputs)`, the JAX model, unmodified.
        params: its parameters.
        inputs: arrays by name, of both.
        names, layouts: as for `loha_jax.inject`.
    """

    module: torch.nn.Module
    output: Callable[[torch.nn.Module, Mapping[str, torch.Tensor]], torch.Tensor]
    fn: Callable[[Any, Mapping[str, Any]], Any]
    params: Any
    inputs: dict[str, np.ndarray]
    names: Any = None
    layouts: Any = None

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The inputs for PyTorch."""
        return {
            k: torch.tensor(v, dtype=torch.int64 if v.dtype.kind == "i" else None)
            for k, v in self.inputs.items()
        }


def seeded(make: Callable[[], torch.nn.Module], size: Size) -> torch.nn.Module:
    """A model in evaluation mode whose every weight matters.

    No bias of 0, no scale of 1, no variance of 1.

    A weight or an adapter that gets lost on its way to the twin then shows in the output. (With the
    small weights that transformers starts from, attention and feed-forward hardly touch what comes
    from the embeddings.)
    """
    with torch.random.fork_rng():
        torch.manual_seed(size.seed)
        module = make().eval()
        for parameter in module.parameters():
            if parameter.ndim < 2:
                parameter.data.add_(0.05 * torch.randn_like(parameter))
            else:
                parameter.data.normal_(0, parameter[0].numel() ** -0.5)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return module
