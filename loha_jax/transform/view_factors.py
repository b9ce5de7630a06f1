"""`ViewFactors`: the factors of one adapter, as they follow the axes of a kernel's view."""

# JAX's own functions are only partly typed.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from loha_jax.lowrank.hadamard import float32_or_wider, multiply_core
from loha_jax.lowrank.layout import Layout
from loha_jax.lowrank.weight_decomposition import is_on_out, on_flat
from loha_jax.transform.packed_kernel import PackedKernel, plain
from loha_jax.transform.typed_jax import map_arrays
from loha_jax.tree.factors import Factors


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ViewFactors:
    """One adapter of a view, with one leading axis per stack atom.

    Attributes:
        w1_a, w2_a: `[*s, out, r]`.
        w1_b, w2_b: `[*s, r, in·prod(spatial)]`, or `[*s, r, in]` with cores.
        t1, t2: cores `[*s, r, r, prod(spatial)]` of a convolution in CP form, or None.
        scaling: `[*s]`.
        out_gain, in_gain: of a weight decomposition, the multiple of the base weight that is added:
            `[*s, out, 1]` or `[*s, 1, in]`; or None. ΔW's own multiple is in the factors.
    """

    w1_a: jax.Array
    w1_b: jax.Array
    w2_a: jax.Array
    w2_b: jax.Array
    t1: jax.Array | None
    t2: jax.Array | None
    scaling: jax.Array
    out_gain: jax.Array | None = None
    in_gain: jax.Array | None = None

    @classmethod
    def of(cls, f: Factors, kernel: jax.Array | PackedKernel, layout: Layout) -> ViewFactors:
        """Return an adapter of a kernel as it is stored."""
        shape = kernel.shape
        stack = layout.sizes("s", shape)
        a1, a2, t1, t2 = f.hada_w1_a, f.hada_w2_a, f.hada_t1, f.hada_t2
        if f.is_cp:
            a1, a2 = jnp.swapaxes(a1, -1, -2), jnp.swapaxes(a2, -1, -2)  # [*stack, out, r]
            r = a1.shape[-1]
            t1, t2 = t1.reshape(*stack, r, r, -1), t2.reshape(*stack, r, r, -1)
        view = cls(a1, f.hada_w1_b, a2, f.hada_w2_b, t1, t2, f.scale)
        if f.dora_scale is None or (gains := f.gains(plain(kernel), layout)) is None:
            return view
        own, base = gains  # [*stack, out, 1, ...] or [*stack, 1, in, 1, ...]
        if is_on_out(base.shape, layout.torch_shape(shape), len(stack)):
            rows = (*base.shape[: len(stack) + 1], 1)  # [*stack, out, 1]
            return dataclasses.replace(
                view, w1_a=a1 * own.reshape(rows), out_gain=base.reshape(rows)
            )
        columns = (*stack, 1, base.shape[len(stack) + 1])  # [*stack, 1, in]
        own = (
            own.reshape(columns) if f.is_cp else on_flat(own, len(stack), layout.sizes("k", shape))
        )
        return dataclasses.replace(view, w1_b=f.hada_w1_b * own, in_gain=base.reshape(columns))

    @property
    def r(self) -> int:
        """The rank of both factors."""
        return self.w1_a.shape[-1]

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the factors' products: float32 or wider."""
        return float32_or_wider(self.w1_a.dtype)

    def astype(self, dtype: DTypeLike) -> ViewFactors:
        """Return all arrays in another dtype."""
        return map_arrays(lambda w: w.astype(dtype), self)

    def for_products(self, dtype: jnp.dtype) -> ViewFactors:
        """Return the factors, in float32 or wider, for products that are computed in a dtype.

        The Khatri-Rao products of small factors and large ones would leave the range of float16, so
        for it all arrays of a pair are made about equally large.
        """
        f = self.astype(float32_or_wider(dtype))
        if dtype != jnp.float16:
            return f
        w1_a, w1_b, *t1 = _balanced(f.w1_a, f.w1_b, f.t1)
        w2_a, w2_b, *t2 = _balanced(f.w2_a, f.w2_b, f.t2)
        (t1,), (t2,) = t1 or (None,), t2 or (None,)
        return dataclasses.replace(f, w1_a=w1_a, w1_b=w1_b, w2_a=w2_a, w2_b=w2_b, t1=t1, t2=t2)

    def flat(self) -> ViewFactors:
        """Return the same update without cores, which multiply into w*_b at the same rank."""
        if self.t1 is None or self.t2 is None:
            return self
        w1_b = multiply_core(self.t1, self.w1_b, self.dtype)
        w2_b = multiply_core(self.t2, self.w2_b, self.dtype)
        f = dataclasses.replace(self, w1_b=w1_b, w2_b=w2_b, t1=None, t2=None)
        return f.astype(self.dtype)


def _balanced(a: jax.Array, *others: jax.Array | None) -> list[jax.Array]:
    """Return arrays `[*s, r, ...]` times powers of two whose product is 1, about equally large."""
    arrays = [a, *(x for x in others if x is not None)]
    stack = a.ndim - 2
    largest = [
        jnp.max(jnp.abs(jax.lax.stop_gradient(x)), axis=range(stack, x.ndim)) for x in arrays
    ]
    sizes = [jnp.where(x > 0, x, 1) for x in largest]  # [*s]
    mean = math.prod(size ** (1 / len(sizes)) for size in sizes)
    powers = [jax.lax.reduce_precision(mean / size, 8, 0) for size in sizes[1:]]
    powers = [1 / math.prod(powers), *powers]
    return [
        x * jnp.expand_dims(power, range(stack, x.ndim))
        for x, power in zip(arrays, powers, strict=True)
    ]
