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

_WORTH_IT_ON_TPUS = {"TPU v5": 0.2, "TPU": 0.5}
"""The same for training on TPUs, by the beginning of their names: products are quicker there beside
memory, v6e's most. By their compilers' estimates the choice is at most 10 % above the better one
(benchmarks/README.md)."""


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


def cheapest(costs: Costs, training: bool, device_kind: str) -> Strategy:
    """Return "factored", unless "fused" costs clearly less.

    An element of ΔW counts for more than its FLOPs, because materialising is bound by memory.

    Args:
        costs: what each costs.
        training: whether they include the backward pass.
        device_kind: JAX' name of the device that computes.
    """
    saved = costs.factored - costs.fused - _ELEMENT_FLOPS * costs.elements
    worth = _WORTH_MATERIALISING[training]
    if training:
        on_tpus = (n for kind, n in _WORTH_IT_ON_TPUS.items() if device_kind.startswith(kind))
        worth = next(on_tpus, worth)
    return "fused" if saved > worth * costs.base else "factored"
