"""`OnePassKernel`: what a chip's kernel of an adapted product has to say and do."""

# JAX's own functions are only partly typed.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class OnePassKernel(abc.ABC):
    """y = x·W + h·KA with h = x·KB, for arrays of some shapes.

    It is hashable, so that equal layers share traces.

    Attributes:
        stack: number of products.
        rows, into, out: rows of x, contracted and free features.
        rank: R of all adapters together, filled up to a multiple of `rank_unit`.
        transposed: W is `[stack, out, into]`, else `[stack, into, out]`.
        dtype: of all arrays, one of `dtypes`. Sums are in float32.
        highest: whether products of float32 have the highest precision, or the default one.
        interpret: run by JAX's interpreter, on any platform.
    """

    rank_unit: ClassVar[int]
    dtypes: ClassVar[tuple[DTypeLike, ...]]
    unfit: ClassVar[str]
    """Why arrays of `dtypes` do not fit, where they do not."""

    stack: int
    rows: int
    into: int
    out: int
    rank: int
    transposed: bool
    dtype: jnp.dtype
    highest: bool
    interpret: bool

    def reversed(self) -> Self:
        """Return the kernel of the input's gradient: of g, with KA for KB and KB for KA."""
        return dataclasses.replace(
            self, into=self.out, out=self.into, transposed=not self.transposed
        )

    @abc.abstractmethod
    def fits(self) -> bool:
        """Return whether the chip can run this and the backward kernel."""

    @abc.abstractmethod
    def run(
        self, x: jax.Array, w: jax.Array, kb: jax.Array, ka: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Return y `[stack, rows, out]` and h = x·KB `[stack, rows, rank]`.

        Args:
            x: `[stack, rows, into]`.
            w: `[stack, into, out]`, or `[stack, out, into]` where transposed.
            kb: `[stack, rank, into]`.
            ka: `[stack, rank, out]`.
        """


def rows_dot(x: jax.Array, k: jax.Array, axis: int) -> jax.Array:
    """Return `[stack, rows, .]`: x times k, whose axis `axis` is contracted, in x's dtype."""
    return lax.dot_general(x, k, (((2,), (axis,)), ((0,), (0,))), preferred_element_type=x.dtype)
