"""`JoinedProduct`: a factored product whose second step is a part of x·W.

x·W + h·KA is [x, h]·[W; KA] with h = x·KB. The compilers of TPUs read the joined operands where
their parts are, and nothing of y's shape is added to it. docs/design.md has the figures.
"""

# JAX's own functions are only partly typed.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from loha_jax.transform.contraction import contract
from loha_jax.transform.factored_product import FactoredProduct
from loha_jax.transform.kernel_view import KernelView
from loha_jax.transform.options import Options
from loha_jax.transform.product import Product
from loha_jax.transform.view_factors import ViewFactors
from loha_jax.transform.whole_product import WholeProduct

FEWEST_ROWS = 1024
"""Of x, in training: fewer are not joined."""


@dataclasses.dataclass(frozen=True)
class JoinedProduct(WholeProduct):
    """A `WholeProduct` for one TPU, outside of loops and of batches of adapters.

    In a loop W is a slice of a stack, which would be copied; where each row has an adapter of its
    own, W would be copied for each. On several devices W's contracted axis may be sharded, and
    would be gathered. With few rows, or without a backward pass, it takes more cycles than it
    saves: W alone can be loaded beside other work (benchmarks/README.md).
    """

    dtypes: ClassVar[tuple[DTypeLike, ...]] = (jnp.bfloat16,)

    def _of_platform(self, options: Options) -> str:
        if options.base_apart or not options.training or self.rows < FEWEST_ROWS:
            return "W is not joined"
        return super()._of_platform(options)

    def _of_form(self, x: jax.Array, view: KernelView) -> str:
        return "W is a stack, or a slice of one" if self.batch or view.sliced else ""

    def _run(
        self, steps: FactoredProduct, x: jax.Array, view: KernelView
    ) -> tuple[jax.Array, jax.Array]:
        kb, ka = (k.astype(steps.dtype) for k in steps.khatri_rao(view.factors))
        h = contract(x, steps.x, kb, steps.kb, steps.h, steps.precision, dtype=steps.dtype)
        (w,) = self._weight(view)
        into_out = self._stored_as_into_out(view)
        # [in, out] over [R, out], or [out, in] beside [out, R]
        joined = jnp.concatenate([w, ka if into_out else ka.T], 0 if into_out else 1)
        return contract(
            jnp.concatenate([x, h], -1),
            steps.x,
            joined,
            "io" if into_out else "oi",
            steps.y,
            steps.precision,
            dtype=steps.dtype,
        ), h

    def _run_back(
        self, steps: FactoredProduct, x: jax.Array, view: KernelView, h: jax.Array, g: jax.Array
    ) -> tuple[jax.Array, tuple[ViewFactors, ...]]:
        update, dfactors = Product._run_back(self, steps, x, view, h, g)
        (w,) = self._weight(view)
        labels = "io" if self._stored_as_into_out(view) else "oi"
        base = contract(g, steps.y, w, labels, steps.x, steps.precision, dtype=steps.dtype)
        # The product adds the update to its result, and does not read it again for that.
        return base + lax.optimization_barrier(update), dfactors
