"""Operations with an adapted kernel: what products and convolutions share.

Each has three forms. Dense materialises W + ΔW. Factored computes x·W + (x·KB)·KA, without an array
of the kernel's shape. Fused materialises W + ΔW in the forward pass and again in the backward pass.
It does not keep W + ΔW between the two.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from loha_jax.lowrank.hadamard import float32_or_wider
from loha_jax.runtime.device_types import split_as
from loha_jax.runtime.promotion import standard_promotion
from loha_jax.runtime.xla_hints import isolated, materialized, wait_for
from loha_jax.transform.decomposed_base import BaseScaling, has_gain, scaled_base
from loha_jax.transform.input_recomputation import KeptInput
from loha_jax.transform.kernel_view import KernelView, ViewFactors
from loha_jax.transform.materialised import dense_kernel
from loha_jax.transform.strategy import Costs, GradientCosts, Strategy, cheapest

_BLOCK_ELEMENTS = 1 << 20
"""Elements of ΔW that the forward pass materialises at a time on one CPU: they fit its caches."""


@dataclasses.dataclass(frozen=True)
class NoRule:
    """The reason why an operation has no form but the dense weight."""

    reason: str


class Operation(abc.ABC):
    """An operation, linear in x and in the kernel, of a plain array x with a `KernelView`.

    Attributes:
        primitive: its name in a jaxpr.
        branches: whether XLA:CPU computes it as fast inside a branch as outside.
        rows: the number of rows of x: tokens, or positions of an image.
    """

    primitive: ClassVar[str]
    branches: ClassVar[bool] = True
    rows: int

    @abc.abstractmethod
    def apply(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Return the plain operation with a kernel of the view's shape."""

    @abc.abstractmethod
    def update(self, x: jax.Array, view: KernelView) -> tuple[jax.Array, Any]:
        """Return what the adapters add to the result, without materialising ΔW.

        Returns:
            The update in float32 or wider, and the intermediate values that `pull_back` takes as h.
        """

    @abc.abstractmethod
    def pull_back(
        self, x: jax.Array, view: KernelView, h: Any, g: jax.Array
    ) -> tuple[jax.Array, tuple[ViewFactors, ...]]:
        """Return the cotangents of x and of the factors for the cotangent `g` of the update."""

    @abc.abstractmethod
    def elements(self, view: KernelView) -> int:
        """Return the number of elements of ΔW."""

    @abc.abstractmethod
    def factored_flops(self, view: KernelView) -> float:
        """Return the FLOPs of the factored update's forward pass."""

    @abc.abstractmethod
    def temporary_bytes(self, view: KernelView, strategy: Strategy) -> int:
        """Return the size of the largest array that the strategy adds to the frozen operation."""

    @abc.abstractmethod
    def place_gain(self, x: Any, gain: jax.Array) -> BaseScaling | None:
        """Return a gain as a multiple of the result or of x; None where it is neither.

        Args:
            x: the plain operand.
            gain: a multiple of the weight that broadcasts against the view.
        """

    def free_axis(self, x: jax.Array, view: KernelView) -> tuple[int, int] | None:
        """Return an axis of the kernel and the result's axis of the same positions, or None."""
        return None

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

    def choose(self, view: KernelView, training: bool) -> Strategy:
        """Return the strategy that "auto" stands for.

        In training on several devices fused is never chosen: they would have to gather W + ΔW
        twice, or to add up gradients of its shape.
        """
        if training and jax.device_count() > 1:
            return "factored"
        return cheapest(self.costs(view, training), training)

    def factored(
        self, x: jax.Array, view: KernelView, forward_mode: bool, kept: KeptInput
    ) -> jax.Array:
        """Return x·W + (x·KB)·KA, added in float32 or wider.

        Args:
            x: the plain operand.
            view: the adapted one.
            forward_mode: plain operations that `jax.jvp` can differentiate, instead of a
                `custom_vjp`.
            kept: what to hold until the backward pass, to have x there.
        """
        dtype = x.dtype
        base, view = scaled_base(self, x, view, forward_mode), view.without_gain()
        shapes, restore, recomputed = view.shapes, kept.restore, kept.recomputed

        @standard_promotion()
        def forward(
            x: jax.Array, kept_arrays: tuple[Any, ...], factors: tuple[ViewFactors, ...]
        ) -> tuple[Any, ...]:
            update, h = self.update(x, dataclasses.replace(shapes, factors=factors))
            return update, (kept_arrays, factors, h)

        @standard_promotion()
        def backward(residuals: tuple[Any, ...], g: jax.Array) -> tuple[Any, ...]:
            def pull_back(
                factors: tuple[ViewFactors, ...], kept_arrays: tuple[Any, ...], h: Any, g: jax.Array
            ) -> tuple[Any, ...]:
                return self.pull_back(
                    restore(kept_arrays), dataclasses.replace(shapes, factors=factors), h, g
                )

            kept_arrays, factors, h = residuals
            if recomputed:
                dx, dfactors = self._isolated(pull_back, (factors, kept_arrays, h, g), 2, g)
            else:
                dx, dfactors = pull_back(factors, kept_arrays, h, g)
            return dx.astype(dtype), None, dfactors

        update = jax.custom_vjp(lambda *arguments: forward(*arguments)[0])
        update.defvjp(forward, backward)
        arguments = (x, kept.arrays, view.factors)
        delta = forward(*arguments)[0] if forward_mode else update(*arguments)
        total = base.astype(float32_or_wider(base.dtype, delta.dtype)) + split_as(delta, base)
        return materialized(total, view.factors[0].w1_a).astype(base.dtype)

    def fused(self, x: jax.Array, view: KernelView, kept: KeptInput) -> jax.Array:
        """Return x·(W + ΔW), where W + ΔW lives only within the forward and the backward pass.

        The factors' gradients come through the gradient of ΔW, or from the Khatri-Rao factors where
        that costs less.
        """
        costs, dtype = self.gradient_costs(view), x.dtype
        through_weight = costs.through_weight < costs.through_factors or has_gain(view)
        shapes, restore, recomputed = view.shapes, kept.restore, 2 if kept.recomputed else 1

        def product(x: jax.Array, factors: tuple[ViewFactors, ...], kernel: jax.Array) -> jax.Array:
            return self.dense(
                x, dataclasses.replace(shapes, kernel=kernel, factors=factors), forward_mode=True
            )

        @standard_promotion()
        def forward(
            x: jax.Array,
            kept_arrays: tuple[Any, ...],
            factors: tuple[ViewFactors, ...],
            kernel: jax.Array,
        ) -> jax.Array:
            def run(factors: tuple[ViewFactors, ...], x: jax.Array, kernel: jax.Array) -> jax.Array:
                return self._in_blocks(
                    x, dataclasses.replace(shapes, kernel=kernel, factors=factors)
                )

            return self._isolated(run, (factors, x, kernel), 1, x)

        @standard_promotion()
        def backward(residuals: tuple[Any, ...], g: jax.Array) -> tuple[Any, ...]:
            def pull_back(
                factors: tuple[ViewFactors, ...],
                kept_arrays: tuple[Any, ...],
                kernel: jax.Array,
                g: jax.Array,
            ) -> tuple[Any, ...]:
                x = restore(kept_arrays)
                if through_weight:
                    return jax.vjp(lambda x, factors: product(x, factors, kernel), x, factors)[1](g)
                (dx,) = jax.vjp(lambda x: product(x, factors, kernel), x)[1](g)
                whole = dataclasses.replace(shapes, factors=factors)
                _, h = self.update(x, whole)
                return dx, self.pull_back(x, whole, h, g)[1]

            kept_arrays, factors, kernel = residuals
            dx, dfactors = self._isolated(
                pull_back, (factors, kept_arrays, kernel, g), recomputed, g
            )
            return dx.astype(dtype), None, dfactors, None

        fused = jax.custom_vjp(forward)
        fused.defvjp(lambda *args: (forward(*args), args[1:]), backward)
        return fused(x, kept.arrays, view.factors, view.kernel)

    def dense(self, x: jax.Array, view: KernelView, *, forward_mode: bool) -> jax.Array:
        """Return the operation with W + ΔW as one array."""
        return self.apply(x, dense_kernel(view, forward_mode=forward_mode))

    def _isolated(
        self, fn: Callable[..., Any], args: tuple[Any, ...], recomputed: int, pending: jax.Array
    ) -> Any:
        """Return `fn(*args)`, computed after `pending` and not merged with the forward pass.

        Args:
            fn: computes with the factors.
            args: the factors first.
            recomputed: `fn` recomputes from this many of the first arguments what must not be kept.
            pending: the argument that is computed last.
        """
        if self.branches:
            return isolated(fn, args, args[0][0].w1_a)

        def tied(*args: Any) -> Any:
            return fn(*wait_for(pending, args[:recomputed]), *args[recomputed:])

        def barrier(*args: Any) -> Any:
            return fn(*lax.optimization_barrier(args))

        # On several devices an element of a sharded array would be sent around.
        return lax.platform_dependent(
            *args, cpu=tied if jax.device_count() == 1 else barrier, default=barrier
        )

    def _in_blocks(self, x: jax.Array, view: KernelView) -> jax.Array:
        """Return `dense`, on one CPU with one block of W + ΔW after the other where that is faster.

        On several devices a block would be gathered from all of them.
        """
        axes = self.free_axis(x, view)
        size = 1 if axes is None else view.shape[axes[0]]
        fewest = -(-view.kernel.size // _BLOCK_ELEMENTS)
        blocks = next((n for n in range(fewest, 4 * fewest) if n and size % n == 0), 1)
        if axes is None or blocks == 1 or jax.device_count() > 1:
            return self.dense(x, view, forward_mode=True)
        axis, result_axis = axes
        sizes = [n // blocks if a == axis else n for a, n in enumerate(view.shape)]

        def whole(x: jax.Array, view: KernelView) -> jax.Array:
            return self.dense(x, view, forward_mode=True)

        def in_blocks(x: jax.Array, view: KernelView) -> jax.Array:
            def add_block(n: Any, result: jax.Array) -> jax.Array:
                at = n * sizes[axis]
                block = view.dynamic_slice(
                    [at if a == axis else 0 for a in range(len(sizes))], sizes
                )
                assert block is not None
                return lax.dynamic_update_slice_in_dim(result, whole(x, block), at, result_axis)

            shape = jax.eval_shape(whole, x, view)
            return lax.fori_loop(0, blocks, add_block, jnp.zeros(shape.shape, shape.dtype))

        return lax.platform_dependent(x, view, cpu=in_blocks, default=whole)
