"""`PackedKernel`: a quantised kernel in a traced function, dequantised where it is multiplied.

A view of a quantised kernel must not hold the dequantised array: the model's derivative would keep
it for the backward pass, in every layer. Structural operations are therefore noted (`put_off`) and
applied after dequantising, inside the product (`frozen_product`), in each pass anew. What cuts an
axis, such as a scan over layers, cuts the quantised arrays.
"""

# JAX's own functions are only partly typed.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax

from loha_jax.runtime.promotion import standard_promotion
from loha_jax.runtime.xla_hints import behind_barrier, isolated, wait_for
from loha_jax.transform.arguments import flatten
from loha_jax.transform.typed_jax import is_traced, map_arrays, with_vjp
from loha_jax.tree.quantised import QuantisedArray

AxisOperation = Callable[[jax.Array, int], jax.Array]
"""Changes the positions along one axis of an array."""


class Step(NamedTuple):
    """An operation that is put off: `operation(kernel, *settings)`, hashable.

    Attributes:
        operation: a function of a module.
        settings: hashable arguments.
        operand: the number of the traced argument that comes before the settings, or None.
    """

    operation: Callable[..., jax.Array]
    settings: tuple[Any, ...]
    operand: int | None = None

    def apply(self, kernel: jax.Array, operands: Sequence[jax.Array]) -> jax.Array:
        """Return the result for a kernel and the traced arguments of all steps."""
        own = () if self.operand is None else (operands[self.operand],)
        return self.operation(kernel, *own, *self.settings)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedKernel:
    """A quantised kernel with the operations that are still to be applied to it.

    Attributes:
        stored: the kernel as it lies in the tree, or a part of it.
        operands: traced arguments of the steps.
        steps: what is applied after dequantising.
        shape, dtype: of the result.
        scanned: on the way into a scan, the axis that it takes away; it is the first one of the
            stored arrays then.
        missing: inside a scan, the axis of length 1 that the stored arrays lack. They are the very
            slices that the scan makes, so that it does not keep copies of them.
    """

    stored: QuantisedArray
    operands: tuple[jax.Array, ...] = ()
    steps: tuple[Step, ...] = dataclasses.field(default=(), metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    dtype: jnp.dtype = dataclasses.field(default=jnp.dtype("float32"), metadata={"static": True})
    scanned: int | None = dataclasses.field(default=None, metadata={"static": True})
    missing: int | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def of(cls, stored: QuantisedArray) -> PackedKernel:
        """Return a kernel as it is stored."""
        return cls(stored, shape=stored.shape, dtype=stored.dtype)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype).size

    def dense(self) -> jax.Array:
        """Return the floating array."""
        kernel = self._complete.stored.__jax_array__()
        for step in self.steps:
            kernel = step.apply(kernel, self.operands)
        return kernel

    def then(self, operation: Callable[..., jax.Array], *settings: Hashable) -> PackedKernel:
        """Return the kernel with one more step."""
        return self._with(Step(operation, settings), self.operands)

    def scaled(self, factor: jax.Array, operation: Callable[..., jax.Array]) -> PackedKernel:
        """Return the kernel with `operation(kernel, factor)`, for a scalar, as one more step."""
        return self._with(Step(operation, (), len(self.operands)), (*self.operands, factor))

    def _with(self, step: Step, operands: tuple[jax.Array, ...]) -> PackedKernel:
        like = jax.ShapeDtypeStruct(self.shape, self.dtype)
        result = jax.eval_shape(step.apply, like, operands)
        return dataclasses.replace(
            self,
            operands=operands,
            steps=(*self.steps, step),
            shape=result.shape,
            dtype=result.dtype,
        )

    def cut(self, axis: int, operation: AxisOperation) -> PackedKernel | None:
        """Apply `operation(array, axis)`, which changes the positions along an axis.

        Returns:
            The kernel with its quantised arrays cut; None where it has to be dequantised first.
        """
        whole, origin = self._complete, self._stored_axis(axis)
        cut = None if origin is None else whole.stored.cut(origin, operation)
        if cut is None or origin is None:
            return None
        shape = (*self.shape[:axis], cut.shape[origin], *self.shape[axis + 1 :])
        return dataclasses.replace(whole, stored=cut, shape=shape)

    @property
    def _complete(self) -> PackedKernel:
        """The kernel with all axes in its stored arrays."""
        axis = self.missing
        if axis is None:
            return self
        stored = map_arrays(lambda x: jnp.expand_dims(x, axis), self.stored)
        return dataclasses.replace(self, stored=stored, missing=None)

    def _stored_axis(self, axis: int) -> int | None:
        """Return the axis of the stored kernel that an axis of the result is; None if unknown."""
        for step in reversed(self.steps):
            if step.operation is lax.transpose:
                axis = step.settings[0][axis]
            elif step.operation is lax.squeeze:
                for gone in sorted(step.settings[0]):
                    axis += gone <= axis
            elif step.operation is not lax.convert_element_type and step.operand is None:
                return None
        return axis

    def before_scan(self) -> PackedKernel | None:
        """Return the kernel with the scan's axis, its leading one, first in all stored arrays.

        Returns:
            None where the arrays cannot be cut along it.
        """
        whole, axis = self._complete, self._stored_axis(0)
        if axis is None or not whole.stored.lies_along(axis):
            return None
        length = self.shape[0]

        def leading(x: jax.Array) -> jax.Array:
            x = jnp.moveaxis(x, axis, 0)
            return x if x.shape[0] == length else jnp.broadcast_to(x, (length, *x.shape[1:]))

        stored = map_arrays(leading, whole.stored)
        return dataclasses.replace(whole, stored=stored, scanned=axis)

    def inside_scan(self) -> PackedKernel:
        """Return one slice of the kernel, inside the scan, where the stored arrays lack an axis."""
        shape = (1, *self.shape[1:])
        one = dataclasses.replace(self, shape=shape, scanned=None, missing=self.scanned)
        return one.then(lax.squeeze, (0,))


Kernel = jax.Array | PackedKernel
"""The base weight of a view."""


def plain(kernel: Kernel) -> jax.Array:
    """Return a packed kernel dequantised; others as they are."""
    return kernel.dense() if isinstance(kernel, PackedKernel) else kernel


def put_off(operation: Callable[..., jax.Array], kernel: Kernel, *settings: Hashable) -> Kernel:
    """Return `operation(kernel, *settings)`; of a packed kernel when it is dequantised."""
    if isinstance(kernel, PackedKernel):
        return kernel.then(operation, *settings)
    return operation(kernel, *settings)


def scaled(
    kernel: Kernel, factor: jax.Array, operation: Callable[[jax.Array, jax.Array], jax.Array]
) -> Kernel:
    """Return `operation(kernel, factor)` for a scalar; put off for a packed kernel."""
    if isinstance(kernel, PackedKernel):
        return kernel.scaled(factor, operation)
    return operation(kernel, factor)


def cut(kernel: Kernel, axis: int, operation: AxisOperation) -> Kernel:
    """Return `operation(kernel, axis)`, which changes the positions along an axis."""
    if isinstance(kernel, PackedKernel):
        packed = kernel.cut(axis, operation)
        return operation(kernel.dense(), axis) if packed is None else packed
    return operation(kernel, axis)


def before_scan(kernel: Kernel) -> Kernel:
    """Return a kernel to be scanned over its leading axis; `inside_scan` takes its slices."""
    if isinstance(kernel, PackedKernel):
        packed = kernel.before_scan()
        return kernel.dense() if packed is None else packed
    return kernel


def inside_scan(kernel: Kernel) -> Kernel:
    """Return a slice of what `before_scan` returned as a kernel."""
    return kernel.inside_scan() if isinstance(kernel, PackedKernel) else kernel


def frozen_product(
    apply: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    kernel: Kernel,
    *,
    branches: bool,
    forward_mode: bool,
) -> jax.Array:
    """Return `apply(x, kernel)`, linear in x, for a frozen kernel.

    A packed kernel is dequantised when x is computed, and again in the backward pass, when the
    result's cotangent is: one layer's kernel at a time. Nothing is kept for the backward pass.

    Args:
        apply: a product.
        x: the other operand.
        kernel: an array, or a packed kernel.
        branches: whether XLA:CPU computes the product as fast inside a branch as outside.
        forward_mode: plain operations that `jax.jvp` can differentiate.
    """
    if not isinstance(kernel, PackedKernel):
        return apply(x, kernel)
    if forward_mode or not is_traced((x, kernel)):
        return apply(x, kernel.dense())
    shape = jax.eval_shape(jnp.asarray, x)  # with its explicit sharding

    @standard_promotion()
    def forward(x: jax.Array, kernel: PackedKernel) -> jax.Array:
        return _when_computed(lambda x, kernel: apply(x, kernel.dense()), x, kernel, branches)

    @standard_promotion()
    def backward(kernel: PackedKernel, g: jax.Array) -> tuple[jax.Array, None]:
        def pull_back(g: jax.Array, kernel: PackedKernel) -> jax.Array:
            product = functools.partial(_swapped, apply, kernel.dense())
            return cast(jax.Array, jax.linear_transpose(product, shape)(g)[0])

        return _when_computed(pull_back, g, kernel, branches), None

    def forward_and_residuals(x: jax.Array, kernel: PackedKernel) -> tuple[jax.Array, PackedKernel]:
        return forward(x, kernel), kernel

    return with_vjp(forward, forward_and_residuals, backward)(x, kernel)


def _swapped(
    apply: Callable[[jax.Array, jax.Array], jax.Array], kernel: jax.Array, x: jax.Array
) -> jax.Array:
    return apply(x, kernel)


def _when_computed(
    fn: Callable[[jax.Array, PackedKernel], jax.Array],
    pending: jax.Array,
    kernel: PackedKernel,
    branches: bool,
) -> jax.Array:
    """Return `fn(pending, kernel)`; the kernel is dequantised after `pending`, for this alone."""
    if branches:
        return isolated(fn, (pending, kernel), _a_float_of(kernel))

    def tied(pending: jax.Array, kernel: PackedKernel) -> jax.Array:
        return fn(pending, _waiting(pending, kernel))

    return behind_barrier(fn, (pending, kernel), on_one_cpu=tied)


def _is_float(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize > 1


def _a_float_of(kernel: PackedKernel) -> jax.Array:
    """Return the smallest stored array that is wide enough to compute with: a scale."""
    arrays = jax.tree.leaves(kernel.stored)
    return min([x for x in arrays if _is_float(x)] or arrays, key=lambda x: x.size)


def _waiting(pending: jax.Array, kernel: PackedKernel) -> PackedKernel:
    """Return the kernel with its scales computed after `pending`."""
    arrays, treedef = flatten(kernel.stored)
    chosen = [_is_float(x) for x in arrays]
    tied = [
        wait_for(pending, x) if own or not any(chosen) else x
        for x, own in zip(arrays, chosen, strict=True)
    ]
    return dataclasses.replace(kernel, stored=treedef.unflatten(tied))
