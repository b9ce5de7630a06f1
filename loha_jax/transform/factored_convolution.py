"""The update of one adapter of a convolution as two linear steps, and their derivative."""

# JAX's own functions are only partly typed.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from loha_jax.lowrank.hadamard import khatri_rao_columns
from loha_jax.transform.contraction import contract
from loha_jax.transform.operation import Params
from loha_jax.transform.typed_jax import jit, vjp
from loha_jax.transform.view_factors import ViewFactors

_SPACE = "tuvwxyz"


@dataclasses.dataclass(frozen=True)
class FactoredConvolution:
    """The steps x to h and h to y.

    x is `[n, *space, stacked·groups·in]`, h `[n·groups, *space, stacked·r²]`, y
    `[n, *space, stacked·groups·out]`. The factors are as in `ViewFactors`, with one stack axis and
    separate input axes: w*_a `[stacked, groups·out, r]`; w*_b `[stacked, r, in, *spatial]` or, with
    cores, `[stacked, r, in]` and t* `[stacked, r, r, *spatial]`. Hashable, so that equal layers
    share traces.

    Attributes:
        stacked: modules stacked in the kernel's out axis.
        groups: of each module.
        window: strides, padding and dilations of the convolution, as items.
        dtype: of x, h and y. The factors are multiplied in float32 or wider.
        precision: of all steps.
    """

    stacked: int
    groups: int
    window: Params
    dtype: jnp.dtype
    precision: lax.PrecisionLike

    def down(
        self, x: Float[Array, "n *space features"], f: ViewFactors
    ) -> Float[Array, "images *space_of_h {self.stacked}*{f.r}**2"]:
        """Return h for x."""
        x, f = x.astype(self.dtype), f.for_products(self.dtype)
        n, *space, features = x.shape
        letters, per_group = _SPACE[: len(space)], features // (self.stacked * self.groups)
        if self.groups > 1:  # groups become images: [n·groups, *space, stacked·in]
            x = x.reshape(n, *space, self.stacked, self.groups, per_group)
            x = jnp.moveaxis(x, -2, 1).reshape(n * self.groups, *space, self.stacked * per_group)
        if f.t1 is None or f.t2 is None:
            kernel = _khatri_rao(f.w1_b, f.w2_b)  # [stacked, r², in, *spatial]
        else:
            kb = khatri_rao_columns(f.w1_b, f.w2_b)  # [stacked, r², in]
            x = x.reshape(*x.shape[:-1], self.stacked, per_group)
            kb = kb.astype(self.dtype)
            x = self._contract(x, f"n{letters}sc", kb, "sRc", f"n{letters}sR")
            x = x.reshape(*x.shape[:-2], self.stacked * f.r**2)
            # the Kronecker product of the cores: [stacked, r, r, r, r, *spatial]
            core = f.t1[:, :, None, :, None] * f.t2[:, None, :, None, :]
            kernel = core.reshape(self.stacked, f.r**2, f.r**2, *core.shape[5:])
        # [stacked·r², from, *spatial]
        kernel = kernel.reshape(-1, *kernel.shape[2:]).astype(self.dtype)
        axes = len(space)
        kernel = jnp.transpose(kernel, [*range(2, 2 + axes), 1, 0])  # [*spatial, from, stacked·r²]
        numbers = lax.ConvDimensionNumbers(
            (0, axes + 1, *range(1, axes + 1)),
            (axes + 1, axes, *range(axes)),
            (0, axes + 1, *range(1, axes + 1)),
        )
        return lax.conv_general_dilated(
            x,
            kernel,
            **dict(self.window),
            dimension_numbers=numbers,
            feature_group_count=self.stacked,
            precision=self.precision,
        )

    def up(
        self, h: Float[Array, "images *space {self.stacked}*{f.r}**2"], f: ViewFactors
    ) -> Float[Array, "n *space features"]:
        """Return y for h."""
        f = f.for_products(self.dtype)
        a1, a2 = (jnp.swapaxes(a, -1, -2) for a in (f.w1_a, f.w2_a))
        ka = khatri_rao_columns(a1, a2) * f.scaling.reshape(-1, 1, 1)  # [stacked, r², groups·out]
        ka = ka.reshape(*ka.shape[:2], self.groups, -1).astype(self.dtype)
        letters = _SPACE[: h.ndim - 2]
        h = h.reshape(h.shape[0] // self.groups, self.groups, *h.shape[1:-1], self.stacked, f.r**2)
        y = self._contract(h, f"ng{letters}sR", ka, "sRgo", f"n{letters}sgo")
        return y.reshape(*y.shape[:-3], math.prod(y.shape[-3:]))

    def _contract(
        self, a: Float[Array, "*a"], a_labels: str, b: Float[Array, "*b"], b_labels: str, out: str
    ) -> Float[Array, "*result"]:
        return contract(a, a_labels, b, b_labels, out, self.precision, dtype=self.dtype)

    def pull_back(
        self,
        x: Float[Array, "n *space features"],
        f: ViewFactors,
        h: Float[Array, "images *space_of_h channels"],
        g: Float[Array, "n *space_of_h out"],
    ) -> tuple[Float[Array, "n *space features"], ViewFactors]:
        """Return the cotangents of x and the factors."""
        dh, df_up = vjp(self.up, h, f)[1](g)
        dx, df_down = vjp(self.down, x, f)[1](dh)
        return dx, jax.tree.map(jnp.add, df_up, df_down)


down = jit(FactoredConvolution.down, static=(0,))
up = jit(FactoredConvolution.up, static=(0,))
pull_back = jit(FactoredConvolution.pull_back, static=(0,))


def _khatri_rao(
    w1: Float[Array, "stacked r1 *rest"], w2: Float[Array, "stacked r2 *rest"]
) -> Float[Array, "stacked r1*r2 *rest"]:
    """Return the Khatri-Rao product along the second axis."""
    product = w1[:, :, None] * w2[:, None, :]
    return product.reshape(product.shape[0], -1, *product.shape[3:])
