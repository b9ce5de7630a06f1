"""`OnePassProduct`: a product with an adapted kernel, W included, by `TpuProduct`."""

# JAX's own functions are only partly typed.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from loha_jax.transform import tpu_product
from loha_jax.transform.contraction import contract
from loha_jax.transform.factored_product import FactoredProduct
from loha_jax.transform.kernel_view import KernelView
from loha_jax.transform.options import Options
from loha_jax.transform.tpu_product import LANES, TpuProduct
from loha_jax.transform.typed_jax import vjp
from loha_jax.transform.view_factors import ViewFactors
from loha_jax.transform.whole_product import WholeProduct

INTERPRET = False
"""Set by tests: kernels run by JAX's interpreter."""

_TOO_SMALL = ("TPU v2", "TPU v3", "TPU v4")
_Precision = lax.Precision | tuple[lax.Precision, lax.Precision] | None
_PRECISIONS = (None, lax.Precision.DEFAULT, lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class OnePassProduct(WholeProduct):
    """A `WholeProduct` that passes once over x, W and y."""

    dtypes: ClassVar[tuple[DTypeLike, ...]] = (jnp.bfloat16, jnp.float32)

    def _of_platform(self, options: Options) -> str:
        if jax.devices()[0].device_kind.startswith(_TOO_SMALL):
            return "a TPU before v5 has too little memory on the chip"
        return super()._of_platform(options)

    def _of_form(self, x: jax.Array, view: KernelView) -> str:
        if self._precision() not in _PRECISIONS:
            return "the precision is neither the default nor the highest"
        if not self._kernel(x, view).fits():
            return "R or the features are too many for the chip's memory"
        return ""

    def _kernel(self, x: jax.Array, view: KernelView) -> TpuProduct:
        """Return the kernel for arrays of these shapes."""
        into, out, stack = self.sizes(view)
        return TpuProduct(
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

    def _run(
        self, steps: FactoredProduct, x: jax.Array, view: KernelView
    ) -> tuple[jax.Array, jax.Array]:
        kernel = self._kernel(x, view)
        narrow = (_operand(k, kernel) for k in steps.khatri_rao(view.factors))
        y, h = tpu_product.run(kernel, _flat(x, kernel), self._weight(view), *narrow)
        return y.reshape(*x.shape[:-1], kernel.out), h

    def _run_back(
        self, steps: FactoredProduct, x: jax.Array, view: KernelView, h: jax.Array, g: jax.Array
    ) -> tuple[jax.Array, tuple[ViewFactors, ...]]:
        kernel = self._kernel(x, view)
        (kb, ka), to_factors = vjp(steps.khatri_rao, view.factors)
        flat, g, w = _flat(x, kernel), _flat(g, kernel.reversed()), self._weight(view)
        narrow = (_operand(k, kernel) for k in (ka, kb))
        dx, dh = tpu_product.run(kernel.reversed(), g, w, *narrow)
        # XLA passes once over x and once over g.
        r = kb.shape[-2]
        dkb = contract(dh[..., :r], "bnR", flat, "bni", "bRi", steps.precision)
        dka = contract(h[..., :r], "bnR", g, "bno", "bRo", steps.precision)
        dkb, dka = dkb.reshape(kb.shape), dka.reshape(ka.shape)
        return dx.reshape(x.shape), *to_factors((dkb, dka))


def _flat(x: jax.Array, kernel: TpuProduct) -> jax.Array:
    """Return `[stack, rows, features]`."""
    return x.reshape(kernel.stack, kernel.rows, x.shape[-1])


def _operand(k: jax.Array, kernel: TpuProduct) -> jax.Array:
    """Return KB or KA as `[stack, rank, features]` in the kernel's dtype, with zeros from R on."""
    k = k.reshape(kernel.stack, *k.shape[-2:]).astype(kernel.dtype)
    return jnp.pad(k, ((0, 0), (0, kernel.rank - k.shape[1]), (0, 0)))
