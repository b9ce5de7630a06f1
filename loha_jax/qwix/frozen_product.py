"""The gradient of a product with a frozen kernel, quantised or not.

qwix' own derivative of a quantised product keeps a float copy of the kernel until the backward
pass. If the activations are quantised too, it is not that of the product: rounding has the
derivative zero. The derivative here is that of the float product with the dequantised kernel, which
is dequantised again in the backward pass. What is kept is the kernel as it is stored, so that a
scan over layers keeps no copies.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import qwix

from loha_jax.runtime.promotion import standard_promotion


def with_gradient(
    product: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    kernel: jax.Array | qwix.QArray,
    result: jax.Array,
) -> jax.Array:
    """Return `result`, with the derivative of `product(x, dequantised kernel)` by x.

    Args:
        product: linear in x, with results of the shape and dtype of `result`.
        x: the plain operand.
        kernel: gets no gradient.
        result: the product as qwix computes it.
    """
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)

    def forward(
        x: jax.Array, kernel: jax.Array | qwix.QArray, result: jax.Array
    ) -> tuple[jax.Array, jax.Array | qwix.QArray]:
        return result, kernel

    @standard_promotion()
    def backward(kernel: jax.Array | qwix.QArray, g: jax.Array) -> tuple[jax.Array, None, None]:
        dense = qwix.dequantize(kernel) if isinstance(kernel, qwix.QArray) else kernel
        dense = dense.astype(shape.dtype)
        (dx,) = jax.linear_transpose(lambda x: product(x, dense), shape)(g)
        return dx, None, None

    computed = jax.custom_vjp(lambda x, kernel, result: result)
    computed.defvjp(forward, backward)
    return computed(x, kernel, result)
