"""Operations with an adapted kernel: what products and convolutions share.

`forms` computes one, by the strategy that costs least.
"""

# JAX's own functions are only partly typed.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any, ClassVar, cast

import jax

from loha_jax.transform.decomposed_base import BaseScaling
from loha_jax.transform.kernel_view import KernelView
from loha_jax.transform.strategy import Costs, GradientCosts, Measured, Strategy, cheapest
from loha_jax.transform.view_factors import ViewFactors

Params = tuple[tuple[str, Any], ...]
"""Parameters of an equation, as the items of a dict: hashable."""

Intermediates = tuple[jax.Array, ...]
"""The arrays that the backward pass of an update needs besides its inputs."""


@dataclasses.dataclass(frozen=True)
class NoRule:
    """The reason why an operation has no form but the dense weight."""

    reason: str


class CostModel(abc.ABC):
    """What an adapted operation costs by each strategy, and the choice between them.

    Attributes:
        primitive: its name in a jaxpr.
        rows: the number of rows of x for each module: tokens, or positions of an image.
    """

    primitive: ClassVar[str]
    rows: int

    @abc.abstractmethod
    def sizes(self, view: KernelView) -> tuple[int, int, int]:
        """Return three numbers, the product of which is the number of elements of ΔW."""

    def factored_flops(self, view: KernelView) -> float:
        """Return the FLOPs of the factored update's forward pass."""
        into, out, modules = self.sizes(view)
        return sum(f.r**2 for f in view.factors) * (into + out) * modules * (2.0 * self.rows + 2)

    def factored_elements(self, view: KernelView) -> int:
        """Return the number of elements of the largest array that the factored update adds."""
        into, out, modules = self.sizes(view)
        return sum(f.r**2 for f in view.factors) * max(into, out, self.rows) * modules

    def elements(self, view: KernelView) -> int:
        """Return the number of elements of ΔW."""
        return math.prod(self.sizes(view))

    def temporary_bytes(self, view: KernelView, strategy: Strategy) -> int:
        """Return the size of the largest array that the strategy adds to the frozen operation."""
        factored = strategy in ("factored", "pallas")
        return 4 * (self.factored_elements(view) if factored else math.prod(view.shape))

    def costs(self, view: KernelView, training: bool) -> Costs:
        """Return the FLOPs of the frozen operation, and what each strategy adds to them."""
        elements, gradients = self.elements(view), self.gradient_costs(view)
        base, factored, materialising = (
            2.0 * self.rows * elements,
            self.factored_flops(view),
            self._materialising(view),
        )
        count = float(len(view.factors))
        if not training:
            return Costs(base, factored, materialising, count * elements)
        # Each pass materialises ΔW, and each gradient through ΔW is two more arrays of its shape.
        times = 4 if gradients.through_weight < gradients.through_factors else 2
        return Costs(
            2 * base, 3 * factored, 2 * materialising + min(gradients), times * count * elements
        )

    def gradient_costs(self, view: KernelView) -> GradientCosts:
        """Return the FLOPs of the factors' gradients."""
        base = 2.0 * self.rows * self.elements(view)
        return GradientCosts(base + 2 * self._materialising(view), 2 * self.factored_flops(view))

    def _materialising(self, view: KernelView) -> float:
        """Return the FLOPs of ΔW: two products with r columns, their product, scaled and added."""
        return sum(4.0 * f.r + 4 for f in view.factors) * self.elements(view)

    def choose(
        self,
        view: KernelView,
        training: bool,
        *,
        update_alone: bool = False,
        bfloat16: bool = False,
    ) -> Strategy:
        """Return the strategy that "auto" stands for.

        In training on several devices fused is never chosen: they would have to gather W + ΔW
        twice, or to add up gradients of its shape.

        Args:
            view: the adapted operand.
            training: whether the backward pass counts.
            update_alone: the frozen operation is computed elsewhere, and only x·ΔW here.
            bfloat16: whether all of a product is, so that the rules for small kernels count.
        """
        if training and jax.device_count() > 1:
            return "factored"
        costs = self.costs(view, training)
        if update_alone:  # a product with ΔW comes on top of the frozen one
            costs = costs._replace(fused=costs.fused + costs.base)
        measured = Measured()
        if bfloat16 and self.primitive == "dot_general":
            measured = Measured(len(view.factors) * self.elements(view), self.rows)
        return cheapest(costs, training, cast(Any, jax.devices()[0]).device_kind, measured)


class Operation(CostModel):
    """An operation, linear in x and in the kernel, of a plain array x with a `KernelView`.

    Hashable, so that equal layers share compiled programs.

    Attributes:
        branches: whether XLA:CPU computes it as fast inside a branch as outside.
        includes_base: whether its `update` has the plain operation with W too.
    """

    branches: ClassVar[bool] = True
    includes_base: ClassVar[bool] = False

    @abc.abstractmethod
    def apply(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Return the plain operation with a kernel of the view's shape."""

    @abc.abstractmethod
    def update(self, x: jax.Array, view: KernelView) -> tuple[jax.Array, Intermediates]:
        """Return what the adapters add to the result, without materialising ΔW.

        Returns:
            The update in the dtype that it is computed in, and the intermediate values that
            `pull_back` takes as h.
        """

    @abc.abstractmethod
    def pull_back(
        self, x: jax.Array, view: KernelView, h: Intermediates, g: jax.Array
    ) -> tuple[jax.Array, tuple[ViewFactors, ...]]:
        """Return the cotangents of x and of the factors for the cotangent `g` of the update."""

    @abc.abstractmethod
    def place_gain(self, x: jax.Array, gain: jax.Array) -> BaseScaling | None:
        """Return a gain as a multiple of the result or of x; None where it is neither.

        Args:
            x: the plain operand.
            gain: a multiple of the weight that broadcasts against the view.
        """

    def free_axis(self, x: jax.Array, view: KernelView) -> tuple[int, int] | None:
        """Return an axis of the kernel and the result's axis of the same positions, or None."""
        return None
