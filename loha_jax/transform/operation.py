"""What products and convolutions with an adapted kernel share: the choice by cost, and the fused form."""

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
from loha_jax.runtime.xla_hints import after, alone, materialized
from loha_jax.transform.input_recomputation import Kept
from loha_jax.transform.kernel_view import KernelView

STRATEGIES = ("auto", "factored", "fused", "dense")


_ELEMENT_FLOPS = 40
"""FLOPs in whose time an element of ΔW is written and read: the largest that keeps the choice within 10 % of the fewest
FLOPs for every width, rank and row count in benchmarks/README.md."""


_WORTH_FORMING = {"training": 0.06, "inference": 0.015}
"""What fused has to save, of the frozen operation's FLOPs, to be chosen. In training it forms ΔW twice and multiplies
with KB twice: a Transformer's step takes as long with 3 to 6 % fewer FLOPs (benchmarks/README.md)."""


_BLOCK_ELEMENTS = 1 << 20
"""Elements of ΔW that are formed at a time in the forward pass on one CPU: few enough to stay in its caches."""


class Operation(abc.ABC):
    """An operation, linear in x and in the kernel, of a plain array x with a `KernelView`.

    Attributes:
        primitive: its name in a jaxpr.
        rows: how many times the whole kernel is multiplied: tokens, or positions of an image.
        branches: whether XLA:CPU computes it in a branch as fast as outside one.
    """

    primitive: ClassVar[str]
    branches: ClassVar[bool] = True
    rows: int

    @abc.abstractmethod
    def apply(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """The plain operation with some kernel of the view's shape."""

    @abc.abstractmethod
    def update(self, x: jax.Array, view: KernelView) -> tuple[jax.Array, Any]:
        """What the adapters add to the result, in float32 or better, without forming ΔW; and what `pull_back` wants."""

    @abc.abstractmethod
    def pull_back(self, x: jax.Array, view: KernelView, h: Any, g: jax.Array) -> tuple[jax.Array, Any]:
        """Cotangents of x and of the view's factors, for the cotangent `g` of the update; `h` comes from `update`."""

    @abc.abstractmethod
    def costs(self, view: KernelView, training: bool) -> dict[str, float]:
        """FLOPs of the frozen operation ("base"), FLOPs that "factored" and "fused" add to it, and the "elements" of ΔW
        that fused forms.
        """

    @abc.abstractmethod
    def temporary_bytes(self, view: KernelView, strategy: str) -> int:
        """Bytes of the largest array that the strategy adds to the frozen operation."""

    @abc.abstractmethod
    def gradient_costs(self, view: KernelView) -> dict[str, float]:
        """FLOPs of the factors' gradients: through the gradient of ΔW ("weight"), or without it ("factors")."""

    def free_axis(self, x: jax.Array, view: KernelView) -> tuple[int, int] | None:
        """An axis of the kernel and the axis of the result that has the same positions; None where there is none."""
        return None

    def choose(self, view: KernelView, training: bool) -> str:
        """Factored, which forms nothing of W's shape, unless fused costs clearly less.

        Building ΔW counts for more than its FLOPs, because it is bound by memory. In training on several devices fused
        is never chosen: they would have to gather W + ΔW twice, or to add up gradients of its shape.
        """
        if training and jax.device_count() > 1:
            return "factored"
        costs = self.costs(view, training)
        saved = costs["factored"] - costs["fused"] - _ELEMENT_FLOPS * costs["elements"]
        worth = _WORTH_FORMING["training" if training else "inference"] * costs["base"]
        return "fused" if saved > worth else "factored"

    def factored(self, x: jax.Array, view: KernelView, forward_mode: bool, kept: Kept) -> jax.Array:
        """The frozen result plus the update, added in float32 or better.

        Args:
            x: the plain operand.
            view: the adapted one.
            forward_mode: plain operations that `jax.jvp` can differentiate, instead of a `custom_vjp`.
            kept: what to hold until the backward pass, to have x there.
        """
        dtype = x.dtype
        base, view = self.base(x, view), view.without_gain()
        shapes, build, rebuilds = view.shapes, kept.build, kept.rebuilds

        @standard_promotion()
        def forward(x, kept_values, factors):
            update, h = self.update(x, dataclasses.replace(shapes, factors=factors))
            return update, (kept_values, factors, h)

        @standard_promotion()
        def backward(residuals, g):
            def pull_back(factors, kept_values, h, g):
                return self.pull_back(build(kept_values), dataclasses.replace(shapes, factors=factors), h, g)

            kept_values, factors, h = residuals
            if rebuilds:
                dx, dfactors = self._alone(pull_back, (factors, kept_values, h, g), 2, g)
            else:
                dx, dfactors = pull_back(factors, kept_values, h, g)
            return dx.astype(dtype), None, dfactors

        update = jax.custom_vjp(lambda *arguments: forward(*arguments)[0])
        update.defvjp(forward, backward)
        arguments = (x, kept.values, view.factors)
        delta = forward(*arguments)[0] if forward_mode else update(*arguments)
        total = base.astype(float32_or_wider(base.dtype, delta.dtype)) + split_as(delta, base)
        return materialized(total, view.factors[0].w1_a).astype(base.dtype)

    def base(self, x: jax.Array, view: KernelView) -> jax.Array:
        """The frozen operation, with what weight decompositions multiply the base weight by on x or on the result."""
        factors = self.gain_factors(x, view)
        assert factors is not None, "asked before"
        if True not in factors:
            return self.apply(x if False not in factors else (x * (1 + factors[False])).astype(x.dtype), view.kernel)
        plain = self.apply(x, view.kernel)
        base = (plain * (1 + factors[True])).astype(plain.dtype)
        return base + self.apply((x * factors[False]).astype(x.dtype), view.kernel) if False in factors else base

    def gain_factors(self, x: Any, view: KernelView) -> dict[bool, jax.Array] | None:
        """The multiples of the base weight that weight decompositions add, as multiples of the result and of x.

        Returns:
            By whether it is of the result (see `gain_place`); None where one can be neither, and the weight is formed.
        """
        gains = [gain for side in "oi" if (gain := view.gain(side)) is not None]
        places = [self.gain_place(x, gain) for gain in gains]
        factors = dict(place for place in places if place is not None)
        return factors if len(factors) == len(gains) else None

    @abc.abstractmethod
    def gain_place(self, x: Any, gain: jax.Array) -> tuple[bool, jax.Array] | None:
        """How a multiple of the weight, an array that broadcasts against the view, can be had without forming it.

        Returns:
            Whether it is a multiple of the result (else of x), and an array that broadcasts against that; or None.
        """

    def fused(self, x: jax.Array, view: KernelView, kept: Kept) -> jax.Array:
        """The operation with W + ΔW, which is formed, used and forgotten in the forward and in the backward pass.

        The factors' gradients come through the gradient of ΔW, or from the Khatri-Rao factors where that costs less.
        """
        costs, dtype = self.gradient_costs(view), x.dtype
        through_weight = costs["weight"] < costs["factors"] or view.has_gain
        shapes, build, rebuilt = view.shapes, kept.build, 2 if kept.rebuilds else 1

        def product(x, factors, kernel):
            return self.formed(x, dataclasses.replace(shapes, kernel=kernel, factors=factors))

        @standard_promotion()
        def forward(x, kept_values, factors, kernel):
            def run(factors, x, kernel):
                return self.formed_in_blocks(x, dataclasses.replace(shapes, kernel=kernel, factors=factors))

            return self._alone(run, (factors, x, kernel), 1, x)

        @standard_promotion()
        def backward(residuals, g):
            def pull_back(factors, kept_values, kernel, g):
                x = build(kept_values)
                if through_weight:
                    return jax.vjp(lambda x, factors: product(x, factors, kernel), x, factors)[1](g)
                (dx,) = jax.vjp(lambda x: product(x, factors, kernel), x)[1](g)
                whole = dataclasses.replace(shapes, factors=factors)
                _, h = self.update(x, whole)
                return dx, self.pull_back(x, whole, h, g)[1]

            kept_values, factors, kernel = residuals
            dx, dfactors = self._alone(pull_back, (factors, kept_values, kernel, g), rebuilt, g)
            return dx.astype(dtype), None, dfactors, None

        fused = jax.custom_vjp(forward)
        fused.defvjp(lambda *args: (forward(*args), args[1:]), backward)
        return fused(x, kept.values, view.factors, view.kernel)

    def _alone(self, fn: Callable[..., Any], args: tuple[Any, ...], rebuilt: int, pending: jax.Array) -> Any:
        """`fn(*args)`, started when `pending` is there, with nothing of it merged with the forward pass.

        Args:
            fn: computes with the factors.
            args: the factors first.
            rebuilt: of how many of the first arguments `fn` makes what must not be kept from before.
            pending: one of the arguments, the last one to be there.
        """
        if self.branches:
            return alone(fn, args, args[0][0].w1_a)

        def tied(*args):
            return fn(*after(pending, args[:rebuilt]), *args[rebuilt:])

        def barrier(*args):
            return fn(*lax.optimization_barrier(args))

        # On several devices an element of a sharded array would be sent around.
        return lax.platform_dependent(*args, cpu=tied if jax.device_count() == 1 else barrier, default=barrier)

    def formed(self, x: jax.Array, view: KernelView) -> jax.Array:
        """The operation with W + ΔW as one array."""
        return self.apply(x, view.dense(forward_mode=True))

    def formed_in_blocks(self, x: jax.Array, view: KernelView) -> jax.Array:
        """The same with one block of W + ΔW after the other, where one CPU runs the program and that is faster.

        On several devices a block would be gathered from all of them.
        """
        axes = self.free_axis(x, view)
        size = 1 if axes is None else view.shape[axes[0]]
        fewest = -(-view.kernel.size // _BLOCK_ELEMENTS)
        blocks = next((n for n in range(fewest, 4 * fewest) if n and size % n == 0), 1)
        if axes is None or blocks == 1 or jax.device_count() > 1:
            return self.formed(x, view)
        axis, result_axis = axes
        sizes = [n // blocks if a == axis else n for a, n in enumerate(view.shape)]

        def whole(x, view):
            return self.formed(x, view)

        def in_blocks(x, view):
            def add_block(n, result):
                at = n * sizes[axis]
                block = view.dynamic_slice([at if a == axis else 0 for a in range(len(sizes))], sizes)
                assert block is not None
                return lax.dynamic_update_slice_in_dim(result, self.formed(x, block), at, result_axis)

            shape = jax.eval_shape(whole, x, view)
            return lax.fori_loop(0, blocks, add_block, jnp.zeros(shape.shape, shape.dtype))

        return lax.platform_dependent(x, view, cpu=in_blocks, default=whole)
