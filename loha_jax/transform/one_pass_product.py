"""`OnePassProduct`: a product with an adapted kernel, W included, by a kernel of Pallas'."""

# JAX's own functions are only partly typed.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from loha_jax.runtime._compat import HAS_MOSAIC_GPU
from loha_jax.transform import typed_jax
from loha_jax.transform.contraction import contract
from loha_jax.transform.factored_product import FactoredProduct
from loha_jax.transform.hopper_product import HopperProduct
from loha_jax.transform.kernel_view import KernelView
from loha_jax.transform.one_pass_kernel import OnePassKernel
from loha_jax.transform.options import Options
from loha_jax.transform.tpu_product import TpuProduct
from loha_jax.transform.typed_jax import vjp
from loha_jax.transform.view_factors import ViewFactors
from loha_jax.transform.whole_product import WholeProduct

INTERPRET = False
"""Set by tests: kernels run by JAX's interpreter."""

_HOPPER = "9.0"
"""The compute capability of H100, H200 and GH200. Later chips multiply by other instructions."""

_TOO_SMALL = ("TPU v2", "TPU v3", "TPU v4")
_Precision = lax.Precision | tuple[lax.Precision, lax.Precision] | None
_PRECISIONS = (None, lax.Precision.DEFAULT, lax.Precision.HIGHEST)


def _run_kernel(
    kernel: OnePassKernel, x: jax.Array, w: jax.Array, kb: jax.Array, ka: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return kernel.run(x, w, kb, ka)


_run_shared = typed_jax.jit(_run_kernel, static=(0,))


@dataclasses.dataclass(frozen=True)
class OnePassProduct(WholeProduct):
    """A `WholeProduct` that passes once over W and y: and over x, on TPUs."""

    platforms: ClassVar[tuple[str, ...]] = ("tpu", "gpu")
    dtypes: ClassVar[tuple[DTypeLike, ...]] = (jnp.bfloat16, jnp.float16, jnp.float32)

    def _of_platform(self, options: Options) -> str:
        device = cast(Any, jax.devices()[0])
        if device.device_kind.startswith(_TOO_SMALL):
            return "a TPU before v5 has too little memory on the chip"
        if jax.default_backend() == "gpu":
            if not HAS_MOSAIC_GPU:
                return "on GPUs it needs JAX 0.12"
            if not INTERPRET and getattr(device, "compute_capability", "") != _HOPPER:
                return f"of GPUs, it is written for those of compute capability {_HOPPER}"
        return super()._of_platform(options)

    def _of_form(self, x: jax.Array, view: KernelView) -> str:
        if self._precision() not in _PRECISIONS:
            return "the precision is neither the default nor the highest"
        kernel = self._kernel(x, view)
        if x.dtype not in kernel.dtypes:
            return f"the kernel for this platform does not take {x.dtype.name}"
        return "" if kernel.fits() else kernel.unfit

    def _kernel(self, x: jax.Array, view: KernelView) -> OnePassKernel:
        """Return the platform's kernel for arrays of these shapes."""
        into, out, stack = self.sizes(view)
        kernel = TpuProduct if jax.default_backend() == "tpu" else HopperProduct
        r = sum(f.r**2 for f in view.factors)
        return kernel(
            stack=stack,
            rows=math.prod(x.shape) // (stack * into),
            into=into,
            out=out,
            rank=-(-r // kernel.rank_unit) * kernel.rank_unit,
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
        y, h = _run_shared(kernel, _flat(x, kernel), self._weight(view), *narrow)
        return y.reshape(*x.shape[:-1], kernel.out), h

    def _run_back(
        self, steps: FactoredProduct, x: jax.Array, view: KernelView, h: jax.Array, g: jax.Array
    ) -> tuple[jax.Array, tuple[ViewFactors, ...]]:
        kernel = self._kernel(x, view)
        (kb, ka), to_factors = vjp(steps.khatri_rao, view.factors)
        flat, g, w = _flat(x, kernel), _flat(g, kernel.reversed()), self._weight(view)
        narrow = (_operand(k, kernel) for k in (ka, kb))
        dx, dh = _run_shared(kernel.reversed(), g, w, *narrow)
        # XLA passes once over x and once over g.
        r = kb.shape[-2]
        dkb = contract(dh[..., :r], "bnR", flat, "bni", "bRi", steps.precision)
        dka = contract(h[..., :r], "bnR", g, "bno", "bRo", steps.precision)
        dkb, dka = dkb.reshape(kb.shape), dka.reshape(ka.shape)
        return dx.reshape(x.shape), *to_factors((dkb, dka))


def _flat(x: jax.Array, kernel: OnePassKernel) -> jax.Array:
    """Return `[stack, rows, features]`."""
    return x.reshape(kernel.stack, kernel.rows, x.shape[-1])


def _operand(k: jax.Array, kernel: OnePassKernel) -> jax.Array:
    """Return KB or KA as `[stack, rank, features]` in the kernel's dtype, with zeros from R on."""
    k = k.reshape(kernel.stack, *k.shape[-2:]).astype(kernel.dtype)
    return jnp.pad(k, ((0, 0), (0, kernel.rank - k.shape[1]), (0, 0)))
