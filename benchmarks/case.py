"""A case to measure: one frozen model with one adapter, in JAX and in PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.jax_methods import JaxModel
    from benchmarks.torch_peers import TorchModel

FORWARD = "forward"
TRAINING = "training step"
KINDS = (FORWARD, TRAINING)

# The methods' names, as the tables show them.
JAX_FROZEN = "JAX frozen"
AUTO = "loha-jax auto"
FACTORED = "loha-jax factored"
FUSED = "loha-jax fused"
PALLAS = "loha-jax pallas"
DENSE = "loha-jax dense"
MERGED = "loha-jax merged"
TORCH_FROZEN = "PyTorch frozen"
PEFT_LOHA = "PEFT LoHa"
PEFT_LORA = "PEFT LoRA"
LYCORIS_REBUILD = "LyCORIS rebuild"
LYCORIS_BYPASS = "LyCORIS bypass"
JAX_METHODS = (JAX_FROZEN, AUTO, FACTORED, FUSED, PALLAS, DENSE, MERGED)
TORCH_METHODS = (TORCH_FROZEN, PEFT_LOHA, PEFT_LORA, LYCORIS_REBUILD, LYCORIS_BYPASS)
CHOICES = (FACTORED, FUSED, DENSE)
"""What "auto" is compared with."""


def frozen_of(method: str) -> str:
    """The frozen base that a method is compared with: the one of its own framework."""
    return JAX_FROZEN if method in JAX_METHODS else TORCH_FROZEN


class NotInstalled(Exception):
    """Something that a case needs is missing; the message says what."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options of the command line.

    Attributes:
        quick: tiny shapes, to see that the suite works.
        dtype: of the base's weights and the inputs; the factors are float32.
        repeats: at most so many turns over the methods of a case.
        budget: seconds for the turns of a case.
    """

    quick: bool = False
    dtype: str = "float32"
    repeats: int = 30
    budget: float = 12.0


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A LoHa adapter, and what stands for it where the method is another one.

    Attributes:
        rank: LoHa's r; alpha is twice that.
        targets: names or name endings of the adapted modules, the same in JAX and in PyTorch.
        cp: whether convolutions larger than 1 have cores (`use_effective_conv2d`, LyCORIS'
            `use_tucker`).
    """

    rank: int
    targets: tuple[str, ...]
    cp: bool = False

    @property
    def alpha(self) -> int:
        return 2 * self.rank


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and its adapter. The models are built when they are asked for.

    Attributes:
        subject: the module that it comes from.
        name: unique; `python -m benchmarks.peak_memory` takes it.
        shape: the sizes that tell it from the subject's other cases.
        process_memory: whether the process' peak memory is measured too, with a fresh process for
            each method.
    """

    subject: str
    name: str
    shape: dict[str, Any]
    adapter: Adapter
    jax_model: Callable[[], JaxModel]
    torch_model: Callable[[], TorchModel]
    process_memory: bool = False
