"""The three forms of an adapted operation, and the choice to compute one as a single program.

Dense materialises W + ΔW. Factored computes x·W + (x·KB)·KA, without an array of the kernel's
shape. Fused materialises W + ΔW in the forward pass and again in the backward pass. It does not
keep W + ΔW between the two.
"""

# JAX's own functions are only partly typed.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import lax

from loha_jax.runtime.device_types import split_as
from loha_jax.runtime.promotion import standard_promotion
from loha_jax.runtime.xla_hints import behind_barrier, computed_once, isolated, wait_for
from loha_jax.transform.compute_dtype import with_update
from loha_jax.transform.decomposed_base import has_gain, scaled_base
from loha_jax.transform.input_recomputation import KeptInput
from loha_jax.transform.kernel_view import KernelView
from loha_jax.transform.materialised import dense_kernel
from loha_jax.transform.operation import Intermediates, Operation
from loha_jax.transform.packed_kernel import Kernel
from loha_jax.transform.strategy import Strategy
from loha_jax.transform.typed_jax import checkpoint, is_traced, jit, vjp, with_vjp
from loha_jax.transform.view_factors import ViewFactors

_BLOCK_ELEMENTS = 1 << 20
"""Elements of ΔW that the forward pass materialises at a time on one CPU: they fit its caches."""

R = TypeVar("R")
AllFactors = tuple[ViewFactors, ...]
Arrays = tuple[jax.Array, ...]
Residuals = tuple[AllFactors, Arrays, Kernel | None, Intermediates]


class Computation(NamedTuple):
    """How an operation is computed.

    Attributes:
        strategy: "factored", "fused", "dense", or "pallas" with a `OnePassProduct`.
        forward_mode: plain operations that `jax.jvp` can differentiate, instead of a `custom_vjp`.
        update_alone: x·ΔW, without x·W. Of the kernel only the shape and the dtype are used.
    """

    strategy: Strategy
    forward_mode: bool
    update_alone: bool


def compute(
    operation: Operation, how: Computation, x: jax.Array, view: KernelView, kept: KeptInput
) -> jax.Array:
    """Return the operation of x with the adapted kernel, computed as `how` says.

    Where nothing is traced, it is one compiled program that equal layers and later calls share.

    Args:
        operation: the operation.
        how: the strategy, and what else says how it is computed.
        x: the plain operand.
        view: the adapted one.
        kept: what to hold until the backward pass, to have x there.
    """
    if not is_traced((x, view)):
        return _compiled(operation, how, x, view)
    return _traced(operation, how, x, view, kept)


def _traced(
    operation: Operation, how: Computation, x: jax.Array, view: KernelView, kept: KeptInput
) -> jax.Array:
    if how.update_alone:
        return _update_alone(operation, how, x, view, kept)
    if operation.includes_base:
        return _low_rank(operation, x, view, kept, how.forward_mode, kernel=view.kernel)
    if how.strategy == "factored":
        return _factored(operation, x, view, kept, how.forward_mode)
    if how.strategy == "fused":
        return _fused(operation, x, view, kept)
    return _dense(operation, x, view, how.forward_mode)


@functools.partial(jit, static=(0, 1))
@standard_promotion()
def _compiled(operation: Operation, how: Computation, x: jax.Array, view: KernelView) -> jax.Array:
    return _traced(operation, how, x, view, KeptInput.whole(x))


def _update_alone(
    operation: Operation, how: Computation, x: jax.Array, view: KernelView, kept: KeptInput
) -> jax.Array:
    """Return x·ΔW in the operation's dtype. "fused" does not keep ΔW for the backward pass."""
    like = jax.ShapeDtypeStruct(view.shape, view.kernel.dtype)
    dtype = jax.eval_shape(operation.apply, x, like).dtype
    if how.strategy == "factored":
        return _low_rank(operation, x, view, kept, how.forward_mode).astype(dtype)

    def product(x: jax.Array, factors: AllFactors) -> jax.Array:
        kernel = jnp.zeros(view.shape, view.kernel.dtype)
        update = dataclasses.replace(view, kernel=kernel, factors=factors)
        return _dense(operation, x, update, how.forward_mode)

    if how.strategy == "fused":
        return checkpoint(product)(x, view.factors)
    return product(x, view.factors)


def _factored(
    operation: Operation, x: jax.Array, view: KernelView, kept: KeptInput, forward_mode: bool
) -> jax.Array:
    """Return x·W + (x·KB)·KA."""
    base = scaled_base(operation, x, view, forward_mode)
    delta = _low_rank(operation, x, view.without_gain(), kept, forward_mode)
    total = with_update(base, lax.optimization_barrier(split_as(delta, base)))
    return computed_once(total.astype(base.dtype), view.factors[0].w1_a)


def _low_rank(
    operation: Operation,
    x: jax.Array,
    view: KernelView,
    kept: KeptInput,
    forward_mode: bool,
    kernel: Kernel | None = None,
) -> jax.Array:
    """Return (x·KB)·KA in the dtype that it is computed in.

    With a kernel, W, it is x·W + (x·KB)·KA, by an operation whose update has both.
    """
    dtype = x.dtype
    # The backward pass holds no array of `kept`: a scan's would be leaked tracers.
    shapes, restore, recomputed = view.shapes, kept.restore, kept.recomputed

    def whole(factors: AllFactors, kernel: Kernel | None) -> KernelView:
        known = shapes.kernel if kernel is None else kernel
        return dataclasses.replace(shapes, factors=factors, kernel=known)

    @standard_promotion()
    def forward(
        x: jax.Array, kept_arrays: Arrays, factors: AllFactors, kernel: Kernel | None
    ) -> tuple[jax.Array, Residuals]:
        update, h = operation.update(x, whole(factors, kernel))
        return update, (factors, kept_arrays, kernel, h)

    def pull_back(
        factors: AllFactors, kept: Arrays, kernel: Kernel | None, h: Intermediates, g: jax.Array
    ) -> tuple[jax.Array, AllFactors]:
        return operation.pull_back(restore(kept), whole(factors, kernel), h, g)

    @standard_promotion()
    def backward(residuals: Residuals, g: jax.Array) -> tuple[jax.Array, None, AllFactors, None]:
        if recomputed:
            dx, dfactors = _isolated(operation, pull_back, (*residuals, g), 2, g)
        else:
            dx, dfactors = pull_back(*residuals, g)
        return lax.optimization_barrier(dx.astype(dtype)), None, dfactors, None

    def update(
        x: jax.Array, kept_arrays: Arrays, factors: AllFactors, kernel: Kernel | None
    ) -> jax.Array:
        return forward(x, kept_arrays, factors, kernel)[0]

    arguments = (x, kept.arrays, view.factors, kernel)
    if forward_mode:
        return update(*arguments)
    return with_vjp(update, forward, backward)(*arguments)


def _fused(operation: Operation, x: jax.Array, view: KernelView, kept: KeptInput) -> jax.Array:
    """Return x·(W + ΔW), where W + ΔW lives only within the forward and the backward pass.

    The factors' gradients come through the gradient of ΔW, or from the Khatri-Rao factors where
    that costs less.
    """
    costs, dtype = operation.gradient_costs(view), x.dtype
    through_weight = costs.through_weight < costs.through_factors or has_gain(view)
    shapes, restore, recomputed = view.shapes, kept.restore, 2 if kept.recomputed else 1

    @standard_promotion()
    def forward(
        x: jax.Array, kept_arrays: Arrays, factors: AllFactors, kernel: Kernel
    ) -> jax.Array:
        def run(factors: AllFactors, x: jax.Array, kernel: Kernel) -> jax.Array:
            whole = dataclasses.replace(shapes, kernel=kernel, factors=factors)
            return _in_blocks(operation, x, whole)

        return _isolated(operation, run, (factors, x, kernel), 1, x)

    def pull_back(
        factors: AllFactors, kept_arrays: Arrays, kernel: Kernel, g: jax.Array
    ) -> tuple[jax.Array, AllFactors]:
        x = restore(kept_arrays)

        def product(x: jax.Array, factors: AllFactors) -> jax.Array:
            whole = dataclasses.replace(shapes, kernel=kernel, factors=factors)
            return _dense(operation, x, whole, forward_mode=True)

        if through_weight:
            return vjp(product, x, factors)[1](g)
        (dx,) = vjp(functools.partial(product, factors=factors), x)[1](g)
        whole = dataclasses.replace(shapes, factors=factors)
        _, h = operation.update(x, whole)
        return dx, operation.pull_back(x, whole, h, g)[1]

    @standard_promotion()
    def backward(
        residuals: tuple[Arrays, AllFactors, Kernel], g: jax.Array
    ) -> tuple[jax.Array, None, AllFactors, None]:
        kept_arrays, factors, kernel = residuals
        arguments = (factors, kept_arrays, kernel, g)
        dx, dfactors = _isolated(operation, pull_back, arguments, recomputed, g)
        return dx.astype(dtype), None, dfactors, None

    def forward_and_residuals(
        x: jax.Array, kept_arrays: Arrays, factors: AllFactors, kernel: Kernel
    ) -> tuple[jax.Array, tuple[Arrays, AllFactors, Kernel]]:
        return forward(x, kept_arrays, factors, kernel), (kept_arrays, factors, kernel)

    fused = with_vjp(forward, forward_and_residuals, backward)
    return fused(x, kept.arrays, view.factors, view.kernel)


def _dense(operation: Operation, x: jax.Array, view: KernelView, forward_mode: bool) -> jax.Array:
    """Return the operation with W + ΔW as one array."""
    return operation.apply(x, dense_kernel(view, forward_mode=forward_mode))


def _isolated(
    operation: Operation,
    fn: Callable[..., R],
    args: tuple[AllFactors, *tuple[object, ...]],
    recomputed: int,
    pending: jax.Array,
) -> R:
    """Return `fn(*args)`, computed after `pending` and not merged with the forward pass.

    Args:
        operation: that `fn` is a part of.
        fn: computes with the factors.
        args: the factors first.
        recomputed: `fn` recomputes from this many of the first arguments what must not be kept.
        pending: the argument that is computed last.
    """
    if operation.branches:
        return isolated(fn, args, args[0][0].w1_a)

    def tied(*args: object) -> R:
        return fn(*wait_for(pending, args[:recomputed]), *args[recomputed:])

    return behind_barrier(fn, args, on_one_cpu=tied)


def _in_blocks(operation: Operation, x: jax.Array, view: KernelView) -> jax.Array:
    """Return `_dense`, on one CPU one block of W + ΔW after the other where that is faster.

    On several devices a block would be gathered from all of them.
    """

    def whole(x: jax.Array, view: KernelView) -> jax.Array:
        return _dense(operation, x, view, forward_mode=True)

    axes = operation.free_axis(x, view)
    size = 1 if axes is None else view.shape[axes[0]]
    fewest = -(-view.kernel.size // _BLOCK_ELEMENTS)
    blocks = next((n for n in range(fewest, 4 * fewest) if n and size % n == 0), 1)
    if axes is None or blocks == 1 or jax.device_count() > 1:
        return whole(x, view)
    axis, result_axis = axes
    sizes = [n // blocks if a == axis else n for a, n in enumerate(view.shape)]

    def in_blocks(x: jax.Array, view: KernelView) -> jax.Array:
        def add_block(n: jax.Array, result: jax.Array) -> jax.Array:
            at = n * sizes[axis]
            block = view.dynamic_slice([at if a == axis else 0 for a in range(len(sizes))], sizes)
            assert block is not None
            return lax.dynamic_update_slice_in_dim(result, whole(x, block), at, result_axis)

        shape = jax.eval_shape(whole, x, view)
        zeros = jnp.zeros(shape.shape, shape.dtype)
        return cast(jax.Array, lax.fori_loop(0, blocks, add_block, zeros))

    return cast(jax.Array, lax.platform_dependent(x, view, cpu=in_blocks, default=whole))
