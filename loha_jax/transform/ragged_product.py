"""Ragged products (`jax.lax.ragged_dot`): each group of rows times the kernel of its expert.

x·ΔW = (x KB) KA for each group. Both products are ragged ones with the groups of the first.
"""

# JAX's own functions are only partly typed.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from loha_jax.runtime.promotion import standard_promotion
from loha_jax.runtime.sizes import nominal
from loha_jax.transform.compute_dtype import ComputeDtype, dtype_of_update
from loha_jax.transform.decomposed_base import has_gain
from loha_jax.transform.factored_product import khatri_rao
from loha_jax.transform.kernel_view import KernelView, large_atoms, size_of
from loha_jax.transform.operation import CostModel, NoRule
from loha_jax.transform.product import Dims
from loha_jax.transform.typed_jax import vjp, with_vjp
from loha_jax.transform.view_factors import ViewFactors

Factors = tuple[ViewFactors, ...]
Residuals = tuple[jax.Array, Factors, jax.Array, jax.Array]
Experts = Float[Array, "experts rows columns"]


@dataclasses.dataclass(frozen=True)
class RaggedProduct(CostModel):
    """A `ragged_dot_general` of rows x with a `KernelView` of experts.

    It is not an `Operation`: the sizes of the groups are a third array.

    Attributes:
        groups: the view's atoms that number the experts.
        main, rest: its contracted and its free atoms: in and out ones, exchanged where `swapped`.
        swapped: the kernel's out axes are contracted.
        order: permutation of x's axes to rows and the contracted axes in the order of `main`.
        result: sizes of the result's axes after the rows.
        rows: the mean number of rows of an expert, at least 1.
        computed_in: the rule for the update's dtype.
        precision: of the product.
    """

    primitive: ClassVar[str] = "ragged_dot_general"

    groups: tuple[int, ...]
    main: tuple[int, ...]
    rest: tuple[int, ...]
    swapped: bool
    order: tuple[int, ...]
    result: tuple[int, ...]
    rows: int
    computed_in: ComputeDtype
    precision: lax.PrecisionLike

    @classmethod
    def of(
        cls, view: KernelView, x: jax.Array, params: Mapping[str, Any], computed_in: ComputeDtype
    ) -> RaggedProduct | NoRule:
        """Return the product with its axes sorted, or why it has no factored form."""
        numbers = params["ragged_dot_dimension_numbers"]
        contracting, batch = cast("tuple[Dims, Dims]", numbers.dot_dimension_numbers)
        x_axes, kernel_axes = contracting
        ragged: tuple[int, ...] = tuple(numbers.lhs_ragged_dimensions)
        experts: tuple[int, ...] = tuple(numbers.rhs_group_dimensions)
        offset = params["group_offset"] is not None
        if len(experts) != 1 or any(batch) or set(ragged) & set(x_axes) or offset:
            return NoRule("the groups are not rows of x, each with the kernel of its expert")
        if x.ndim != 1 + len(x_axes):
            return NoRule("x has axes besides its rows and the contracted ones")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return NoRule("a product with an operand that is not floating")
        if has_gain(view):
            return NoRule("a weight decomposition of experts")
        # The order in which the factors flatten the contracted features.
        pairs = sorted(zip(kernel_axes, x_axes, strict=True), key=lambda pair: view.dims[pair[0]])
        free = [d for d in range(len(view.dims)) if d not in experts and d not in kernel_axes]
        contracted = tuple(n for d, _ in pairs for n in view.dims[d])
        kept = tuple(n for d in free for n in view.dims[d])
        sides = {side: large_atoms(view, side) for side in "sio"}
        if view.dims[experts[0]] != sides["s"]:
            return NoRule("the groups are not the kernel's stack of experts")
        swapped = (contracted, kept) != (sides["i"], sides["o"])
        if swapped and (contracted, kept) != (sides["o"], sides["i"]):
            return NoRule("only some of the in or out axes are contracted, or in another order")
        return cls(
            groups=sides["s"],
            main=contracted,
            rest=kept,
            swapped=swapped,
            order=(*ragged, *(axis for _, axis in pairs)),
            result=tuple(view.shape[d] for d in free),
            rows=max(1, nominal(x.shape[axis] for axis in ragged) // size_of(view, sides["s"])),
            computed_in=computed_in,
            precision=params["precision"],
        )

    def update(
        self, x: jax.Array, view: KernelView, sizes: jax.Array, *, forward_mode: bool
    ) -> jax.Array:
        """Return what the adapters add to the result, in the dtype that it is computed in.

        The backward pass keeps x, x KB and the factors.

        Args:
            x: the rows.
            view: the kernel.
            sizes: the number of rows of each group.
            forward_mode: plain products that `jax.jvp` can differentiate.
        """
        factors = view.flat().factors
        own = (f.w1_a.dtype for f in factors)
        dtype = dtype_of_update(self.computed_in, x.dtype, view.kernel, *own)

        @standard_promotion()
        def forward(
            x: jax.Array, factors: Factors, sizes: jax.Array
        ) -> tuple[jax.Array, Residuals]:
            kb, ka = self._khatri_rao(factors, dtype)
            h = self._ragged(x.astype(dtype), kb, sizes)
            return self._ragged(h, ka, sizes), (x, factors, sizes, h)

        @standard_promotion()
        def backward(residuals: Residuals, g: jax.Array) -> tuple[jax.Array, Factors, None]:
            x, factors, sizes, h = residuals

            def khatri_rao(factors: Factors) -> tuple[Experts, Experts]:
                return self._khatri_rao(factors, dtype)

            def ragged(x: jax.Array, w: Experts) -> jax.Array:
                return self._ragged(x, w, sizes)

            (kb, ka), to_factors = vjp(khatri_rao, factors)
            dh, dka = vjp(ragged, h, ka)[1](g)
            dx, dkb = vjp(ragged, x.astype(dtype), kb)[1](dh)
            return dx.astype(x.dtype), *to_factors((dkb, dka)), None

        def update(x: jax.Array, factors: Factors, sizes: jax.Array) -> jax.Array:
            return forward(x, factors, sizes)[0]

        # [*axes of x] -> [rows, main]
        rows = jnp.transpose(x, self.order)
        rows = rows.reshape(rows.shape[0], size_of(view, self.main))
        if not forward_mode:
            update = with_vjp(update, forward, backward)
        # [rows, rest] -> [rows, *axes of the result]
        return update(rows, factors, sizes).reshape(rows.shape[0], *self.result)

    def sizes(self, view: KernelView) -> tuple[int, int, int]:
        """Return the contracted and the free features of an expert, and the number of experts."""
        return size_of(view, self.main), size_of(view, self.rest), size_of(view, self.groups)

    def _khatri_rao(self, factors: Factors, dtype: jnp.dtype) -> tuple[Experts, Experts]:
        """Return KB `[experts, main, R]` and the scaled KA `[experts, R, rest]` of all adapters."""
        kb, ka = khatri_rao(factors, dtype, swapped=self.swapped)
        # [*stack, R, features] -> [experts, R, features]
        kb, ka = (k.reshape(-1, *k.shape[-2:]).astype(dtype) for k in (kb, ka))
        return jnp.swapaxes(kb, 1, 2), ka

    def _ragged(
        self, x: Float[Array, "rows a"], w: Float[Array, "experts a b"], sizes: jax.Array
    ) -> Float[Array, "rows b"]:
        """Return each row of x times the matrix of its expert."""
        dtype = x.dtype
        return lax.ragged_dot(x, w, sizes, precision=self.precision, preferred_element_type=dtype)
