"""Products (`dot_general`) with an adapted kernel: factored (no ΔW), and what it costs.

With the Khatri-Rao factors KA and KB of inner size R = Σr², x·ΔW = (x KB) KA. `Product` sorts the
axes by what they mean; `factored_product` computes.
"""

# JAX's own functions are only partly typed.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax

from loha_jax.runtime.sizes import is_known, nominal
from loha_jax.transform import factored_product
from loha_jax.transform.compute_dtype import ComputeDtype, dtype_of_update
from loha_jax.transform.decomposed_base import BaseScaling
from loha_jax.transform.factored_product import ROW_LABELS, FactoredProduct
from loha_jax.transform.kernel_view import KernelView, large_atoms, size_of
from loha_jax.transform.operation import Intermediates, NoRule, Operation, Params
from loha_jax.transform.typed_jax import vjp
from loha_jax.transform.view_factors import ViewFactors

Dims = tuple[tuple[int, ...], tuple[int, ...]]
"""Contracted and batch axes of an operand."""


@dataclasses.dataclass(frozen=True)
class Product(Operation):
    """A `dot_general` of a plain array with a `KernelView`, its axes sorted by what they mean.

    Attributes:
        kernel_first: whether the kernel is the left operand.
        batch, contracted, free: the view's stack atoms by their part in the product.
        main, rest: its contracted and its free atoms: in and out ones, exchanged where `swapped`.
        swapped: the kernel's out axes are contracted (x @ Wᵀ of an `io` kernel, a tied embedding,
            an input gradient).
        params: of the `dot_general`, as items, without the dimension numbers.
        kernel_dims, x_dims: (contracted, batch) axes of the two operands, pairwise.
        computed_in: the rule for the update's dtype.
        rows: number of rows of x per batch stack index; symbolic sizes count as 1.
    """

    primitive: ClassVar[str] = "dot_general"

    kernel_first: bool
    batch: tuple[int, ...]
    contracted: tuple[int, ...]
    free: tuple[int, ...]
    main: tuple[int, ...]
    rest: tuple[int, ...]
    swapped: bool
    params: Params
    kernel_dims: Dims
    x_dims: Dims
    computed_in: ComputeDtype
    rows: int

    @classmethod
    def of(
        cls,
        view: KernelView,
        x: jax.Array,
        kernel_first: bool,
        params: Mapping[str, Any],
        computed_in: ComputeDtype,
    ) -> Product | NoRule:
        """Return the product with its axes sorted, or why it has no factored form."""
        numbers: tuple[Dims, Dims] = params["dimension_numbers"]
        (lc, rc), (lb, rb) = numbers
        left, right = (tuple(lc), tuple(lb)), (tuple(rc), tuple(rb))
        kernel_dims, x_dims = (left, right) if kernel_first else (right, left)
        in_contracted = [n for d in kernel_dims[0] for n in view.dims[d]]
        in_batch = [n for d in kernel_dims[1] for n in view.dims[d]]
        used = sum(kernel_dims, ())
        in_free = [n for d, atoms in enumerate(view.dims) if d not in used for n in atoms]

        def kinds(atoms: Iterable[int]) -> set[str]:
            return {"i" if view.atoms[n].kind == "k" else view.atoms[n].kind for n in atoms}

        if kinds(in_batch) - {"s", "b"}:
            return NoRule("a batch axis is an in or out axis of the kernel")
        if "b" in kinds(in_contracted) | kinds(in_free):
            return NoRule("the kernel is broadcast along a contracted or free axis")
        if {"i", "o"} <= kinds(in_contracted):
            return NoRule("in and out axes are contracted together")
        # Axes of size 1 have no atoms: in or out axes that the view lacks may be on either side.
        swapped = "o" in kinds(in_contracted) or (
            "i" in kinds(in_free) and "o" not in kinds(in_free)
        )
        main, rest = ("o", "i") if swapped else ("i", "o")
        if main in kinds(in_free) or rest in kinds(in_contracted):
            return NoRule("only some of the in or out axes are contracted")
        large = {side: large_atoms(view, side) for side in "sio"}
        rows = nominal(size for d, size in enumerate(x.shape) if d not in x_dims[0] + x_dims[1])
        return cls(
            kernel_first=kernel_first,
            batch=tuple(n for n in large["s"] if n in in_batch),
            contracted=tuple(n for n in large["s"] if n in in_contracted),
            free=tuple(n for n in large["s"] if n in in_free),
            main=large[main],
            rest=large[rest],
            swapped=swapped,
            params=tuple(item for item in params.items() if item[0] != "dimension_numbers"),
            kernel_dims=kernel_dims,
            x_dims=x_dims,
            computed_in=computed_in,
            rows=rows * size_of(view, [n for n in in_batch if view.atoms[n].kind == "b"]),
        )

    def apply(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """See `Operation.apply`."""
        (kc, kb), (xc, xb), params = self.kernel_dims, self.x_dims, dict(self.params)
        if self.kernel_first:
            return lax.dot_general(kernel, x, ((kc, xc), (kb, xb)), **params)
        return lax.dot_general(x, kernel, ((xc, kc), (xb, kb)), **params)

    def place_gain(self, x: jax.Array, gain: jax.Array) -> BaseScaling | None:
        """See `Operation.place_gain`."""
        contracted, batch = self.kernel_dims
        free = [d for d in range(gain.ndim) if d not in contracted + batch]
        varying = {d for d, size in enumerate(gain.shape) if size > 1}
        if not varying & set(contracted):
            ones = (1,) * (x.ndim - len(contracted) - len(batch))
            own = tuple(gain.shape[d] for d in free)
            # [*batch, *free axes of the left operand, *free axes of the right one]
            shape = [
                *(gain.shape[d] for d in batch),
                *(own + ones if self.kernel_first else ones + own),
            ]
            return BaseScaling(
                of_result=jnp.transpose(gain, [*contracted, *batch, *free]).reshape(shape)
            )
        if not varying & set(free):
            pairs = dict(zip(self.x_dims[0] + self.x_dims[1], contracted + batch, strict=True))
            # [*axes of x], 1 for its rows
            shape = [gain.shape[pairs[axis]] if axis in pairs else 1 for axis in range(x.ndim)]
            ordered = jnp.transpose(gain, [*free, *(pairs[axis] for axis in sorted(pairs))])
            return BaseScaling(of_input=ordered.reshape(shape))
        return None

    def free_axis(self, x: jax.Array, view: KernelView) -> tuple[int, int] | None:
        """See `Operation.free_axis`: the longest free axis of the kernel that can be sliced."""
        contracted, batch = self.kernel_dims
        free = [d for d in range(len(view.shape)) if d not in contracted + batch]
        single = [d for d in free if len(view.dims[d]) == 1]
        if not single:
            return None
        axis = max(single, key=lambda d: view.shape[d])
        before = 0 if self.kernel_first else x.ndim - len(contracted) - len(batch)
        return axis, len(batch) + before + free.index(axis)

    def update(self, x: jax.Array, view: KernelView) -> tuple[jax.Array, Intermediates]:
        """See `Operation.update`: (x KB) KA of all adapters together, and x KB."""
        view = view.flat()
        result, h = self._run(self._steps(x, view), self._group_x(x, view), view)
        return self._ungroup(result, x, view), (h,)

    def pull_back(
        self, x: jax.Array, view: KernelView, h: Intermediates, g: jax.Array
    ) -> tuple[jax.Array, tuple[ViewFactors, ...]]:
        """See `Operation.pull_back`."""

        def flat(factors: tuple[ViewFactors, ...]) -> tuple[ViewFactors, ...]:
            return tuple(f.flat() for f in factors)

        def group(x: jax.Array) -> jax.Array:
            return self._group_x(x, view)

        def ungroup(delta: jax.Array) -> jax.Array:
            return self._ungroup(delta, x, view)

        factors, from_flat = vjp(flat, view.factors)
        view = dataclasses.replace(view, factors=factors)
        steps = self._steps(x, view)
        grouped, from_grouped = vjp(group, x.astype(steps.dtype))
        delta, _ = jax.eval_shape(lambda: factored_product.run(steps, grouped, factors))
        (g,) = cast(tuple[jax.Array], jax.linear_transpose(ungroup, delta)(g.astype(delta.dtype)))
        dx, dfactors = self._run_back(steps, grouped, view, h[0], g)
        return *from_grouped(dx), *from_flat(dfactors)

    def _run(
        self, steps: FactoredProduct, x: jax.Array, view: KernelView
    ) -> tuple[jax.Array, jax.Array]:
        """Return the result `[b, f, n, rest]` for a grouped x, and h."""
        return factored_product.run(steps, x, view.factors)

    def _run_back(
        self, steps: FactoredProduct, x: jax.Array, view: KernelView, h: jax.Array, g: jax.Array
    ) -> tuple[jax.Array, tuple[ViewFactors, ...]]:
        """Return the cotangents of a grouped x and of the factors."""
        return factored_product.pull_back(steps, x, view.factors, h, g)

    def _steps(self, x: jax.Array, view: KernelView) -> FactoredProduct:
        """Return the two products for arrays of these shapes, a letter for each group of axes."""
        groups = (self.batch, self.contracted, self.free)
        stack = large_atoms(view, "s")
        rows = len(self._row_sizes(x, view))
        return FactoredProduct(
            *("bcf"[n] if group else "" for n, group in enumerate(groups)),
            i="i" if self.main else "",
            o="o" if self.rest else "",
            n=ROW_LABELS[:rows],
            stack_order=tuple(stack.index(n) for group in groups for n in group),
            stack_shape=tuple(size_of(view, group) for group in groups if group),
            swapped=self.swapped,
            dtype=dtype_of_update(
                self.computed_in, x.dtype, view.kernel, *(f.w1_a.dtype for f in view.factors)
            ),
            precision=dict(self.params).get("precision"),
        )

    def sizes(self, view: KernelView) -> tuple[int, int, int]:
        """Return the contracted and the free features of a module, and the number of modules."""
        stack = self.batch + self.contracted + self.free
        return size_of(view, self.main), size_of(view, self.rest), size_of(view, stack)

    def _x_axes(self, x: jax.Array, view: KernelView) -> list[_Axis]:
        """Return x's axes, contracted and batch ones split into atoms."""
        pairs = dict(zip(sum(self.x_dims, ()), sum(self.kernel_dims, ()), strict=True))
        result: list[_Axis] = []
        for axis, size in enumerate(x.shape):
            if axis in pairs:
                result += [_Axis(n, None, view.atoms[n].size) for n in view.dims[pairs[axis]]]
            else:
                result.append(_Axis(None, axis, size))
        return result

    def _x_rows(self, x: jax.Array, view: KernelView) -> list[_Axis]:
        """Return the axes of x that make up its rows."""
        axes = self._x_axes(x, view)
        return [a for a in axes if a.atom is None or view.atoms[a.atom].kind == "b"]

    def _row_sizes(self, x: jax.Array, view: KernelView) -> list[int]:
        """Return the sizes of the axes that x's rows are kept in.

        On one device it is one axis, of which XLA:CPU needs no transposed copy. On several devices
        the rows keep their axes: those that are sharded cannot be joined without moving data.
        """
        sizes = [axis.size for axis in self._x_rows(x, view)]
        if jax.device_count() == 1:
            return [math.prod(sizes)]
        return [size for size in sizes if not is_known(size) or size > 1]

    def _group_x(self, x: jax.Array, view: KernelView) -> jax.Array:
        """Return x as `[b, n, c, main]`; n can be several axes."""
        axes = self._x_axes(x, view)
        batch, contracted, main = (
            _atom_axes(view, group) for group in (self.batch, self.contracted, self.main)
        )
        order = [axes.index(a) for a in (*batch, *self._x_rows(x, view), *contracted, *main)]
        sizes = [math.prod(a.size for a in group) for group in (contracted, main) if group]
        expanded = _permute(x.reshape([a.size for a in axes]), order)  # one axis per atom
        return expanded.reshape(
            [*([size_of(view, self.batch)] if batch else []), *self._row_sizes(x, view), *sizes]
        )

    def _ungroup(self, delta: jax.Array, x: jax.Array, view: KernelView) -> jax.Array:
        """Return `[b, f, n, rest]` as the result of the `dot_general`.

        That has batch axes, free axes of the left and free axes of the right operand.
        """
        contracted, batch = self.kernel_dims
        free = [d for d in range(len(view.dims)) if d not in contracted + batch]
        rows = self._x_rows(x, view)
        own_rows = [a for a in rows if a.atom is None]
        batch_out, free_out = (
            _atom_axes(view, [n for d in dims for n in view.dims[d]]) for dims in (batch, free)
        )
        have = [*_atom_axes(view, self.batch + self.free), *rows, *_atom_axes(view, self.rest)]
        ends = (free_out, own_rows) if self.kernel_first else (own_rows, free_out)
        order = [have.index(a) for a in (*batch_out, *ends[0], *ends[1])]
        delta = _permute(delta.reshape([a.size for a in have]), order)  # one axis per atom
        shapes = ([view.shape[d] for d in free], [a.size for a in own_rows])
        left, right = shapes if self.kernel_first else shapes[::-1]
        return delta.reshape([*(view.shape[d] for d in batch), *left, *right])


class _Axis(NamedTuple):
    """An axis of x or of the result.

    Attributes:
        atom: of the view; None for an axis that only x has.
        row: the axis of x; None for an atom.
        size: of the axis.
    """

    atom: int | None
    row: int | None
    size: int


def _atom_axes(view: KernelView, atoms: Iterable[int]) -> list[_Axis]:
    return [_Axis(n, None, view.atoms[n].size) for n in atoms]


def _permute(x: jax.Array, order: list[int]) -> jax.Array:
    return x if order == sorted(order) else jnp.transpose(x, order)
