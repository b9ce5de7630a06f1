"""The forms an adapted product can take, what each costs, and the choice between them."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple, get_args

Strategy = Literal["auto", "factored", "fused", "dense", "pallas"]

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

Strategies = Strategy | tuple[tuple[re.Pattern[str], Strategy], ...]
"""One strategy for all modules, or pairs of a pattern of module names and a strategy."""

_ELEMENT_FLOPS = 40
"""FLOPs in the time of which one element of ΔW is written and read. It is the largest number that
keeps the choice within 10 % of the fewest FLOPs for every width, rank and row count in
benchmarks/README.md."""

_WORTH_MATERIALISING = {True: 0.06, False: 0.015}
"""The share of the frozen operation's FLOPs that fused has to save to be chosen, by `training`. In
training it materialises ΔW twice and multiplies with KB twice: a Transformer's step takes as long
with 3 to 6 % fewer FLOPs (benchmarks/README.md)."""


class _Tpu(NamedTuple):
    """When fused is chosen in training on a kind of TPU.

    Attributes:
        worth: as `_WORTH_MATERIALISING`. Products are quicker there beside memory, v6e's most.
        small: elements of a bfloat16 matrix up to which W + ΔW stays in the chip's memory: fused
            is chosen.
        rows: as long as there are so many rows.
    """

    worth: float
    small: int = 0
    rows: int = 0


_TPUS = {
    "TPU v5 lite": _Tpu(0.2, small=3 << 20, rows=256),
    "TPU v5": _Tpu(0.2, small=1 << 20, rows=512),
    "TPU": _Tpu(0.5),
}
"""By the beginning of their names. By their compilers' estimates the choice is at most 10 % above
the better one (benchmarks/README.md)."""


class Costs(NamedTuple):
    """The cost of an adapted operation.

    Attributes:
        base: FLOPs of the frozen operation.
        factored: FLOPs that "factored" adds to it.
        fused: FLOPs that "fused" adds to it.
        elements: elements of ΔW that "fused" materialises.
    """

    base: float
    factored: float
    fused: float
    elements: float


class GradientCosts(NamedTuple):
    """FLOPs of the factors' gradients.

    Attributes:
        through_weight: through the gradient of ΔW.
        through_factors: from the Khatri-Rao factors, without ΔW.
    """

    through_weight: float
    through_factors: float


def strategy_of(strategies: Strategies, name: str) -> Strategy:
    """Return the strategy for the module of this name; "auto" where no pattern matches."""
    if not isinstance(strategies, tuple):
        return strategies
    for pattern, chosen in strategies:
        if pattern.fullmatch(name):
            return chosen
    return "auto"


def cheapest(costs: Costs, training: bool, device_kind: str, rows: int) -> Strategy:
    """Return "factored", unless "fused" costs clearly less.

    An element of ΔW counts for more than its FLOPs, because materialising is bound by memory.

    Args:
        costs: what each costs.
        training: whether they include the backward pass.
        device_kind: JAX' name of the device that computes.
        rows: of a matrix product for which small kernels count; 0 for other operations.
    """
    saved = costs.factored - costs.fused - _ELEMENT_FLOPS * costs.elements
    other = _Tpu(_WORTH_MATERIALISING[training])
    of_kind = (tpu for kind, tpu in _TPUS.items() if training and device_kind.startswith(kind))
    device = next(of_kind, other)
    small = 0 < costs.elements <= 2 * device.small and rows >= device.rows  # ΔW is built twice
    return "fused" if small or saved > device.worth * costs.base else "factored"
