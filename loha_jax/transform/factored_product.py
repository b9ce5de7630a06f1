"""The factored product (x KB) KA of arrays whose axes are grouped, and its derivative."""

# JAX's own functions are only partly typed.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from loha_jax.lowrank.hadamard import float32_or_wider, khatri_rao_columns
from loha_jax.runtime.sizes import is_known
from loha_jax.transform import typed_jax
from loha_jax.transform.contraction import contract
from loha_jax.transform.view_factors import ViewFactors

ROW_LABELS = "nmlkjhgedazyxwvuts"
"""Labels of the axes of rows: n, and more where several are kept."""


@dataclasses.dataclass(frozen=True)
class FactoredProduct:
    """The two products y = (x KB) KA, with one letter for each axis of an array.

    The letters: b batch stack, n (and more) rows of x, c contracted stack, f free stack, i
    contracted features, o free features, R = Σr². Hashable, so that equal layers share traces.

    Attributes:
        b, c, f, i, o: the letters of the groups that are there, "" for the others.
        n: one letter per axis of rows.
        stack_order: permutation of the factors' stack axes to b, c, f.
        stack_shape: the shape that they then take.
        swapped: the kernel's out axes are contracted.
        dtype: of the two products, and of the cotangent of x.
        precision: of the `dot_general`.
    """

    b: str
    c: str
    f: str
    i: str
    o: str
    n: str
    stack_order: tuple[int, ...]
    stack_shape: tuple[int, ...]
    swapped: bool
    dtype: jnp.dtype
    precision: lax.PrecisionLike

    @property
    def x(self) -> str:
        """The axes of the input."""
        return f"{self.b}{self.n}{self.c}{self.i}"

    @property
    def kb(self) -> str:
        """The axes of the Khatri-Rao factor that x is multiplied with first."""
        return f"{self.b}{self.c}{self.f}R{self.i}"

    @property
    def ka(self) -> str:
        """The axes of the Khatri-Rao factor of the second product."""
        return f"{self.b}{self.c}{self.f}R{self.o}"

    @property
    def h(self) -> str:
        """The axes of x KB."""
        return f"{self.b}{self.c}{self.n}{self.f}R"

    @property
    def y(self) -> str:
        """The axes of the result."""
        return f"{self.b}{self.f}{self.n}{self.o}"

    def run(
        self, x: Float[Array, "*x"], factors: tuple[ViewFactors, ...]
    ) -> tuple[Float[Array, "*y"], Float[Array, "*h"]]:
        """Return y and h = x KB."""
        if self._has_few_rows(x, factors):
            return self._run_few_rows(x, factors)
        kb, ka = (k.astype(self.dtype) for k in self.khatri_rao(factors))
        # [b, n, c, i] · [b, c, f, R, i] -> [b, c, n, f, R]
        h = self._of_rows(x.astype(self.dtype), self.x, kb, self.kb, self.h)
        # [b, c, n, f, R] · [b, c, f, R, o] -> [b, f, n, o]
        return self._of_rows(h, self.h, ka, self.ka, self.y), h

    def pull_back(
        self,
        x: Float[Array, "*x"],
        factors: tuple[ViewFactors, ...],
        h: Float[Array, "*h"],
        g: Float[Array, "*y"],
    ) -> tuple[Float[Array, "*x"], tuple[ViewFactors, ...]]:
        """Return the cotangents of x and the factors.

        The order of the operands matters: dhᵀ@x and hᵀ@g, with R leading, run fast on XLA:CPU.
        """
        if self._has_few_rows(x, factors):  # no array of R columns here either

            def few_rows(x: jax.Array, factors: tuple[ViewFactors, ...]) -> jax.Array:
                return self._run_few_rows(x, factors)[0]

            return typed_jax.vjp(few_rows, x.astype(self.dtype), factors)[1](g)
        (kb, ka), to_factors = typed_jax.vjp(self.khatri_rao, factors)
        x = x.astype(self.dtype)
        dh = self._of_rows(g, self.y, ka.astype(self.dtype), self.ka, self.h)
        dx = self._of_rows(dh, self.h, kb.astype(self.dtype), self.kb, self.x, like=x)
        dkb = contract(dh, self.h, x, self.x, self.kb, self.precision, like=kb)
        dka = contract(h, self.h, g, self.y, self.ka, self.precision, like=ka)
        return dx, *to_factors((dkb, dka))

    def _of_rows(
        self,
        a: Float[Array, "*a"],
        a_labels: str,
        b: Float[Array, "*b"],
        b_labels: str,
        out: str,
        like: Float[Array, "*result"] | None = None,
    ) -> Float[Array, "*result"]:
        """Return a product that has rows, in `dtype`."""
        return contract(a, a_labels, b, b_labels, out, self.precision, like, self.dtype)

    def khatri_rao(
        self, factors: tuple[ViewFactors, ...]
    ) -> tuple[Float[Array, "*kb"], Float[Array, "*ka"]]:
        """Return KB and the scaled KA of all adapters, with the axes of `kb` and `ka`.

        They are in float32 or wider, and so are their cotangents.
        """
        kb, ka = khatri_rao(factors, self.dtype, swapped=self.swapped)
        return self._arrange(kb, self.i), self._arrange(ka, self.o)

    def _arrange(
        self, k: Float[Array, "*stack squared features"], label: str
    ) -> Float[Array, "*arranged"]:
        """Return the axes in the order b, c, f, R, features, without those that have no label."""
        *stack, r, n = k.shape
        if stack:
            k = k.reshape(*(size for size in stack if size > 1), r, n)
            k = jnp.transpose(k, [*self.stack_order, k.ndim - 2, k.ndim - 1])
        return k.reshape(*self.stack_shape, r, *((n,) if label else ()))

    def _has_few_rows(self, x: Float[Array, "*x"], factors: tuple[ViewFactors, ...]) -> bool:
        """Return whether x has fewer rows than every rank, and no axis but rows and features."""
        plain = (self.x, self.y) == (f"{self.n}i", f"{self.n}o")
        known = all(map(is_known, x.shape))
        return plain and known and math.prod(x.shape[:-1]) < min(f.r for f in factors)

    def _run_few_rows(
        self, x: Float[Array, "*rows i"], factors: tuple[ViewFactors, ...]
    ) -> tuple[Float[Array, "*rows o"], Float[Array, "*rows R"]]:
        """Return the same for fewer rows than ranks, as in decoding, without KB and KA.

        (x KB)[n, p, q] = Σ_i x[n, i] b1[p, i] b2[q, i]. KA works the same way. The arrays are
        smaller, and the cost is no higher. They are in float32 or wider, y is in `dtype`.
        """
        dtype = float32_or_wider(self.dtype)
        y, hs = jnp.zeros((), dtype), list[jax.Array]()
        for f in factors:
            f = f.astype(dtype)
            # every stack has size 1: [out, r] and [r, in]
            a1, b1, a2, b2 = (w.reshape(w.shape[-2:]) for w in (f.w1_a, f.w1_b, f.w2_a, f.w2_b))
            a1, a2 = a1.T, a2.T
            scaling = f.scaling.reshape(())
            of_h, of_y = (1, scaling)  # KA is the scaled one
            if self.swapped:
                a1, b1, a2, b2 = b1, a1, b2, a2
                of_h, of_y = of_y, of_h
            n, scaled = self.n, x.astype(dtype)[..., None, :] * b1  # [n, p, i]
            h = contract(scaled, f"{n}pi", b2, "qi", f"{n}pq", self.precision) * of_h
            y = y + (contract(h, f"{n}pq", a2, "qo", f"{n}po", self.precision) * a1).sum(-2) * of_y
            hs.append(h.reshape(*x.shape[:-1], math.prod(h.shape[-2:])))  # [n, R]
        return y.astype(self.dtype), jnp.concatenate(hs, -1) if len(hs) > 1 else hs[0]


def khatri_rao(
    factors: tuple[ViewFactors, ...], dtype: jnp.dtype, *, swapped: bool
) -> tuple[jax.Array, jax.Array]:
    """Return KB and the scaled KAᵀ of all adapters, `[*stack, R, features]`; swapped, KAᵀ first.

    They are in float32 or wider, for products in `dtype`.
    """
    pairs = [_khatri_rao_pair(f, dtype) for f in factors]
    kb, ka = (
        jnp.concatenate(side, -2) if len(pairs) > 1 else side[0]
        for side in zip(*pairs, strict=True)
    )
    return (ka, kb) if swapped else (kb, ka)


def _khatri_rao_pair(
    f: ViewFactors, dtype: jnp.dtype
) -> tuple[Float[Array, "*stack squared in"], Float[Array, "*stack squared out"]]:
    """Return KB and the scaled KAᵀ of one adapter."""
    f = f.for_products(dtype)
    # [*stack, out, r] twice -> [*stack, r², out]
    ka = khatri_rao_columns(jnp.swapaxes(f.w1_a, -1, -2), jnp.swapaxes(f.w2_a, -1, -2))
    return khatri_rao_columns(f.w1_b, f.w2_b), ka * f.scaling[..., None, None]


run = typed_jax.jit(FactoredProduct.run, static=(0,))
pull_back = typed_jax.jit(FactoredProduct.pull_back, static=(0,))
