"""The forms an adapted product can take, what each costs, and the choice between them."""

from __future__ import annotations

import math
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


class _Share(NamedTuple):
    """What fused has to save in training on a kind of TPU, as a share of the frozen FLOPs.

    Attributes:
        share: products are quicker there beside memory than on a CPU, v6e's most.
        elements: of ΔW, all adapters together, up to which it counts: W + ΔW stays in the chip's
            memory then. It was found for matrix products in bfloat16, and counts for no others.
        rows: as long as there are so many rows.
    """

    share: float
    elements: float = math.inf
    rows: int = 0


_V5E = (
    _Share(-math.inf, elements=1024**2, rows=64),
    _Share(0.033, elements=1792**2),
    _Share(0.2),
)
_TPUS = {
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": (_Share(-math.inf, elements=1024**2, rows=512), _Share(0.2)),
    "TPU": (_Share(0.33),),
}
"""By the beginning of their names; the first share that fits is the one. By their compilers'
estimates the choice is at most 10 % above the better one at each point of benchmarks/README.md."""


class Measured(NamedTuple):
    """The sizes of a matrix product in bfloat16; by default of others, which count as large.

    Attributes:
        elements: of ΔW, all adapters together.
        rows: of x.
    """

    elements: float = math.inf
    rows: int = 0


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


def cheapest(costs: Costs, training: bool, device_kind: str, measured: Measured) -> Strategy:
    """Return "factored", unless "fused" costs clearly less.

    An element of ΔW counts for more than its FLOPs, because materialising is bound by memory.

    Args:
        costs: what each costs.
        training: whether they include the backward pass.
        device_kind: JAX' name of the device that computes.
        measured: the sizes that a share of the device goes by.
    """
    saved = costs.factored - costs.fused - _ELEMENT_FLOPS * costs.elements
    of_kind = (shares for kind, shares in _TPUS.items() if device_kind.startswith(kind))
    shares = next(of_kind, ()) if training else ()
    share = next(
        share
        for share, elements, rows in (*shares, _Share(_WORTH_MATERIALISING[training]))
        if measured.elements <= elements and measured.rows >= rows
    )
    return "fused" if saved > share * costs.base else "factored"
