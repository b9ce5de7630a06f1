"""Rules for the operations that read a kernel: products, convolutions and embedding lookups."""

# JAX's own functions are only partly typed.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

from loha_jax.runtime._compat import bind_equation
from loha_jax.runtime.device_types import vary_alike
from loha_jax.runtime.sizes import is_empty, nominal
from loha_jax.transform.compute_dtype import dtype_of_update, with_update
from loha_jax.transform.convolution import Convolution
from loha_jax.transform.decomposed_base import base_scaling
from loha_jax.transform.forms import Computation, compute
from loha_jax.transform.interpreter import Context, Outputs, register
from loha_jax.transform.joined_product import JoinedProduct
from loha_jax.transform.kernel_view import KernelView, Value
from loha_jax.transform.materialised import dense_kernel, update_rows
from loha_jax.transform.one_pass_product import OnePassProduct
from loha_jax.transform.operation import CostModel, NoRule, Operation
from loha_jax.transform.options import Options
from loha_jax.transform.packed_kernel import Kernel, PackedKernel, frozen_product, plain
from loha_jax.transform.product import Product
from loha_jax.transform.ragged_product import RaggedProduct
from loha_jax.transform.strategy import Strategy, strategy_of
from loha_jax.transform.typed_jax import Operand, array_type, checkpoint
from loha_jax.transform.whole_product import WholeProduct

C = TypeVar("C", bound=CostModel)


@register("dot_general", reads=True)
def _dot_general(eqn: JaxprEqn, values: list[Value], context: Context) -> Outputs:
    kernel_first = isinstance(values[0], KernelView)
    view, x = values if kernel_first else values[::-1]
    if not isinstance(view, KernelView) or isinstance(x, KernelView):
        return NoRule("a product of two adapted weights")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return NoRule("a product with an operand that is not floating")
    if not view.factors:
        return [_frozen(eqn, x, view, kernel_first, context)]
    product = Product.of(view, x, kernel_first, eqn.params, context.options.compute_dtype)
    return _computed(product, view, x, eqn.invars[int(kernel_first)], context)


@register("conv_general_dilated", reads=True)
def _conv_general_dilated(eqn: JaxprEqn, values: list[Value], context: Context) -> Outputs:
    x, view = values
    if not isinstance(view, KernelView) or isinstance(x, KernelView):
        return NoRule("the weight is what a convolution slides over")
    if not view.factors:
        return [_frozen(eqn, x, view, False, context)]
    shape, dtype = array_type(eqn.outvars[0]).shape, context.options.compute_dtype
    convolution = Convolution.of(view, x, shape, eqn.params, dtype)
    return _computed(convolution, view, x, eqn.invars[0], context)


def _frozen(
    eqn: JaxprEqn, x: jax.Array, view: KernelView, kernel_first: bool, context: Context
) -> jax.Array:
    """Return a product with a kernel that no active adapter changes."""

    def apply(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return bind_equation(eqn, [kernel, x] if kernel_first else [x, kernel])[0]

    branches = eqn.primitive.name == "dot_general" or Convolution.branches
    forward_mode = context.options.forward_mode
    return frozen_product(apply, x, view.kernel, branches=branches, forward_mode=forward_mode)


def _computed(
    operation: Operation | NoRule,
    view: KernelView,
    x: jax.Array,
    x_var: Operand,
    context: Context,
) -> Outputs:
    """Return the result of an operation by the strategy for its module.

    Args:
        operation: the operation, or a `NoRule` with the reason why it has no factored form.
        view: the adapted operand.
        x: the plain operand.
        x_var: the plain operand's variable.
        context: of the rule.
    """
    if isinstance(operation, NoRule):
        return operation
    if base_scaling(operation, x, view) is None:
        return NoRule(
            "a weight decomposition whose norms go with neither the operand nor the result"
        )
    options, kept = context.options, context.keep(x_var)
    view, x, arrays = vary_alike((view, x, kept.arrays))
    kept = dataclasses.replace(kept, arrays=arrays)
    operation, strategy = _chosen(operation, x, view, options)
    if is_empty(x.shape):  # no rows, or nothing is summed: the update is as empty, or zero
        return [operation.apply(x, plain(view.kernel))]
    how = Computation(strategy, options.forward_mode, options.update_alone)
    return [compute(operation, how, x, view, kept)]


def _chosen(
    operation: C, x: jax.Array, view: KernelView, options: Options
) -> tuple[C | WholeProduct, Strategy]:
    """Return the strategy for the view's module and its operation, and tell the observer of it."""
    strategy, note = strategy_of(options.strategy, view.name), ""
    whole: WholeProduct | NoRule = NoRule("")
    if strategy == "auto":
        alone = options.update_alone
        update = dtype_of_update(options.compute_dtype, x.dtype, view.kernel)
        same = {x.dtype, view.kernel.dtype, update} == {jnp.dtype(jnp.bfloat16)}
        packed = isinstance(view.kernel, PackedKernel)
        bfloat16 = same and not (packed or alone or options.forward_mode)
        strategy = operation.choose(view, options.training, update_alone=alone, bfloat16=bfloat16)
    if strategy == "fused" and options.forward_mode:
        strategy = "dense"  # without a custom_vjp the two are the same
    if strategy == "pallas":
        whole = OnePassProduct.of_product(operation, x, view, options)
        if isinstance(whole, NoRule):
            strategy, note = "factored", f"not pallas: {whole.reason}"
    if strategy == "factored":
        whole = JoinedProduct.of_product(operation, x, view, options)
    if options.observer is not None:
        options.observer.computed(view, operation, strategy, options.times, note)
    return operation if isinstance(whole, NoRule) else whole, strategy


@register("ragged_dot_general", reads=True)
def _ragged_dot_general(eqn: JaxprEqn, values: list[Value], context: Context) -> Outputs:
    x, view, sizes = values
    if not isinstance(view, KernelView) or isinstance(x, KernelView):
        return NoRule("the weight is what the groups are cut from")
    assert not isinstance(sizes, KernelView)

    def apply(x: jax.Array, kernel: Kernel, sizes: jax.Array) -> jax.Array:
        return bind_equation(eqn, [x, plain(kernel), sizes])[0]

    # A packed kernel is dequantised again in the backward pass.
    base = checkpoint(apply) if isinstance(view.kernel, PackedKernel) else apply
    if not view.factors:
        return [base(x, view.kernel, sizes)]
    product = RaggedProduct.of(view, x, eqn.params, context.options.compute_dtype)
    if isinstance(product, NoRule):
        return product
    options = context.options
    view, x, sizes = vary_alike((view, x, sizes))
    _, strategy = _chosen(product, x, view, options)
    if strategy != "factored":

        def whole(x: jax.Array, view: KernelView, sizes: jax.Array) -> jax.Array:
            return apply(x, dense_kernel(view, forward_mode=options.forward_mode), sizes)

        return [(checkpoint(whole) if strategy == "fused" else whole)(x, view, sizes)]
    delta = product.update(x, view, sizes, forward_mode=options.forward_mode)
    if options.update_alone:
        return [delta.astype(array_type(eqn.outvars[0]).dtype)]
    result = base(x, view.kernel, sizes)
    return [with_update(result, delta).astype(result.dtype)]


@register("gather", reads=True)
def _gather(eqn: JaxprEqn, values: list[Value], context: Context) -> Outputs:
    view, indices = values
    if not isinstance(view, KernelView) or isinstance(indices, KernelView):
        return NoRule("a gather by adapted indices")
    row = _row_axis(eqn, view.shape)
    if row is None:
        return NoRule("a gather of other than whole rows")
    if not view.factors:
        return bind_equation(eqn, [plain(view.kernel), indices])
    axis, column = row
    positions = indices[..., column : column + 1]  # [*positions, 1]

    def gather(table: jax.Array) -> jax.Array:
        # [n, r] -> [*positions, r]
        numbers = lax.GatherDimensionNumbers(
            offset_dims=(indices.ndim - 1,), collapsed_slice_dims=(0,), start_index_map=(0,)
        )
        sizes, mode = (1, table.shape[1]), eqn.params["mode"]
        # The base's rows hold the caller's own fill value.
        return lax.gather(table, positions, numbers, slice_sizes=sizes, mode=mode, fill_value=0)

    options = context.options
    # [*positions, *other axes]
    delta = update_rows(view, axis, gather, forward_mode=options.forward_mode)
    if delta is None:
        return NoRule("a gather along a stack axis or along one of several in or out axes")
    if options.observer is not None:
        options.observer.rows(view, nominal(delta.shape[:-1]), options.times)
    base = bind_equation(eqn, [plain(view.kernel), indices])[0]
    numbers = eqn.params["dimension_numbers"]
    count = len(numbers.offset_dims)
    if not numbers.collapsed_slice_dims:  # the axis that is looked up stays, with size 1
        delta = jnp.expand_dims(delta, delta.ndim - count + 1 + axis)
    delta = jnp.moveaxis(delta, tuple(range(delta.ndim - count, delta.ndim)), numbers.offset_dims)
    return [with_update(base, delta).astype(base.dtype)]


def _row_axis(eqn: JaxprEqn, shape: Sequence[int]) -> tuple[int, int] | None:
    """Return the axis of a gather of single positions, and their column of the indices.

    None for any other gather. A vmap of `table[i]` has indices for the other axes too, which are
    read whole: they are clipped to 0.
    """
    params = eqn.params
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    axes = [
        axis for axis, (size, have) in enumerate(zip(sizes, shape, strict=True)) if size != have
    ]
    if (
        len(axes) != 1
        or sizes[axes[0]] != 1
        or tuple(numbers.collapsed_slice_dims) not in ((), tuple(axes))
    ):
        return None
    if (
        numbers.operand_batching_dims
        or numbers.start_indices_batching_dims
        or axes[0] not in numbers.start_index_map
    ):
        return None
    if len(numbers.start_index_map) > 1 and params["mode"] != lax.GatherScatterMode.CLIP:
        return None
    return axes[0], numbers.start_index_map.index(axes[0])
