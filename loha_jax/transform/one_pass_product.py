"""`OnePassProduct`: a product with an adapted kernel, W included, by `PallasProduct`.

`of_product` answers whether one can be computed so; where it cannot, it is factored.
"""

# JAX's own functions are only partly typed.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
import math
from typing import cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType

from loha_jax.runtime.sizes import is_known
from loha_jax.transform import pallas_product
from loha_jax.transform.contraction import contract
from loha_jax.transform.decomposed_base import has_gain
from loha_jax.transform.factored_product import FactoredProduct
from loha_jax.transform.kernel_view import KernelView
from loha_jax.transform.operation import CostModel, NoRule
from loha_jax.transform.options import Options
from loha_jax.transform.packed_kernel import PackedKernel
from loha_jax.transform.pallas_product import LANES, PallasProduct
from loha_jax.transform.product import Product
from loha_jax.transform.typed_jax import vjp
from loha_jax.transform.view_factors import ViewFactors

INTERPRET = False
"""Set by tests: kernels run by JAX's interpreter, on any platform."""

_TOO_SMALL = ("TPU v2", "TPU v3", "TPU v4")
_DTYPES = (jnp.bfloat16, jnp.float32)
_Precision = lax.Precision | tuple[lax.Precision, lax.Precision] | None
_PRECISIONS = (None, lax.Precision.DEFAULT, lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class OnePassProduct(Product):
    """A `Product` whose `update` is x·W + x·ΔW, and whose `pull_back` has both for x."""

    @classmethod
    def of_product(
        cls, operation: CostModel, x: jax.Array, view: KernelView, options: Options
    ) -> OnePassProduct | NoRule:
        """Return the product as one that is computed in one pass, or why it cannot be."""
        if not isinstance(operation, Product):
            return NoRule("it is no matrix product")
        if options.forward_mode or options.update_alone:
            return NoRule("forward_mode" if options.forward_mode else "the base is computed apart")
        product = cls(**{f.name: getattr(operation, f.name) for f in dataclasses.fields(operation)})
        reason = _of_platform() or product._of_axes(x, view) or product._of_arrays(x, view)
        return NoRule(reason) if reason else product

    def _of_axes(self, x: jax.Array, view: KernelView) -> str:
        """Return why the axes do not suit a kernel, or nothing."""
        (contracted, batch), (x_contracted, x_batch) = self.kernel_dims, self.x_dims
        leading, ndim = tuple(range(len(batch))), len(view.shape)
        free = [axis for axis in range(ndim) if axis not in (*batch, *contracted)]
        if self.contracted or self.free or len(contracted) != 1 or len(free) != 1:
            return "the kernel has other axes than a stack, in and out"
        if tuple(batch) != leading or tuple(x_batch) != leading or x_contracted != (x.ndim - 1,):
            return "its axes are in another order than stack, rows, features"
        stack = tuple(n for axis in batch for n in view.dims[axis])
        own = (stack, view.dims[contracted[0]], view.dims[free[0]])
        if own != (self.batch, self.main, self.rest) or not (self.main and self.rest):
            return "the kernel's axes are not the factors': broadcast, permuted, or of size 1"
        return ""

    def _of_arrays(self, x: jax.Array, view: KernelView) -> str:
        """Return why the arrays do not suit a kernel, or nothing."""
        params, steps = dict(self.params), self._steps(x, view)
        if isinstance(view.kernel, PackedKernel):
            return "the kernel is quantised"
        if has_gain(view):
            return "a weight decomposition"
        dtypes = {x.dtype, view.kernel.dtype, steps.dtype}
        dtypes.add(jnp.dtype(params.get("preferred_element_type") or x.dtype))
        if len(dtypes) > 1 or x.dtype not in _DTYPES:
            return "input, kernel, update and result are not all bfloat16 or all float32"
        if self._precision() not in _PRECISIONS:
            return "the precision is neither the default nor the highest"
        if not all(map(is_known, x.shape)):
            return "a size is not known"
        if self.rows < min(f.r for f in view.factors):
            return "fewer rows than ranks"
        if not self._kernel(x, view).fits():
            return "R or the features are too many for the chip's memory"
        return ""

    def _kernel(self, x: jax.Array, view: KernelView) -> PallasProduct:
        """Return the kernel for arrays of these shapes."""
        into, out, stack = self.sizes(view)
        return PallasProduct(
            stack=stack,
            rows=math.prod(x.shape) // (stack * into),
            into=into,
            out=out,
            rank=-(-sum(f.r**2 for f in view.factors) // LANES) * LANES,
            transposed=not self._stored_as_into_out(view),
            dtype=x.dtype,
            # Products of bfloat16 are exact, and TPUs' compiler refuses a higher precision of them.
            highest=x.dtype == jnp.float32 and self._precision() == lax.Precision.HIGHEST,
            interpret=INTERPRET,
        )

    def _precision(self) -> lax.PrecisionLike:
        """Return the precision; a pair only where it is another one for each operand."""
        precision = cast("_Precision", dict(self.params).get("precision"))
        if isinstance(precision, tuple):
            return precision[0] if precision[0] == precision[1] else precision
        return precision

    def _stored_as_into_out(self, view: KernelView) -> bool:
        """Return whether the stored kernel's contracted axis is before the free one."""
        return view.atoms[self.main[0]].axis < view.atoms[self.rest[0]].axis

    def _weight(self, view: KernelView) -> jax.Array:
        """Return W as it is stored, `[stack, ., .]`: a kernel's operand is not transposed freely.

        What transposed it in the model is transposed back, and XLA drops both.
        """
        kernel = view.kernel
        assert isinstance(kernel, jax.Array)
        ((axis,), batch) = self.kernel_dims
        if (axis == len(batch)) != self._stored_as_into_out(view):
            kernel = jnp.swapaxes(kernel, -1, -2)
        return kernel.reshape(-1, *kernel.shape[-2:])

    def _run(
        self, steps: FactoredProduct, x: jax.Array, view: KernelView
    ) -> tuple[jax.Array, jax.Array]:
        kernel = self._kernel(x, view)
        narrow = (_operand(k, kernel) for k in steps.khatri_rao(view.factors))
        y, h = pallas_product.run(kernel, _flat(x, kernel), self._weight(view), *narrow)
        return y.reshape(*x.shape[:-1], kernel.out), h

    def _run_back(
        self, steps: FactoredProduct, x: jax.Array, view: KernelView, h: jax.Array, g: jax.Array
    ) -> tuple[jax.Array, tuple[ViewFactors, ...]]:
        kernel = self._kernel(x, view)
        (kb, ka), to_factors = vjp(steps.khatri_rao, view.factors)
        flat, g, w = _flat(x, kernel), _flat(g, kernel.reversed()), self._weight(view)
        narrow = (_operand(k, kernel) for k in (ka, kb))
        dx, dh = pallas_product.run(kernel.reversed(), g, w, *narrow)
        # XLA passes once over x and once over g.
        r = kb.shape[-2]
        dkb = contract(dh[..., :r], "bnR", flat, "bni", "bRi", steps.precision)
        dka = contract(h[..., :r], "bnR", g, "bno", "bRo", steps.precision)
        dkb, dka = dkb.reshape(kb.shape), dka.reshape(ka.shape)
        return dx.reshape(x.shape), *to_factors((dkb, dka))


def _of_platform() -> str:
    """Return why no kernel runs here, or nothing."""
    if jax.default_backend() != "tpu" and not INTERPRET:
        return "it is written for TPUs"
    if jax.devices()[0].device_kind.startswith(_TOO_SMALL):
        return "a TPU before v5 has too little memory on the chip"
    kinds = jax.sharding.get_abstract_mesh().axis_types
    in_shard_map = bool(kinds) and all(kind == AxisType.Manual for kind in kinds)
    return "" if jax.device_count() == 1 or in_shard_map else "several devices, and no shard_map"


def _flat(x: jax.Array, kernel: PallasProduct) -> jax.Array:
    """Return `[stack, rows, features]`."""
    return x.reshape(kernel.stack, kernel.rows, x.shape[-1])


def _operand(k: jax.Array, kernel: PallasProduct) -> jax.Array:
    """Return KB or KA as `[stack, rank, features]` in the kernel's dtype, with zeros from R on."""
    k = k.reshape(kernel.stack, *k.shape[-2:]).astype(kernel.dtype)
    return jnp.pad(k, ((0, 0), (0, kernel.rank - k.shape[1]), (0, 0)))
