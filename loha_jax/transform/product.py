"""Products (`dot_general`) with an adapted kernel: factored (no ΔW), and what it costs.

With the Khatri-Rao factors KA and KB of inner size R = Σr², x·ΔW = (x KB) KA: the two products of
`_FactoredSteps.run`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from loha_jax.lowrank.hadamard import float32_or_wider, khatri_rao_columns
from loha_jax.runtime.sizes import is_known, nominal
from loha_jax.transform.contraction import contract
from loha_jax.transform.decomposed_base import BaseScaling
from loha_jax.transform.kernel_view import KernelView, ViewFactors, size_of
from loha_jax.transform.operation import NoRule, Operation
from loha_jax.transform.strategy import Strategy


@dataclasses.dataclass(frozen=True)
class Product(Operation):
    """A `dot_general` of a plain array with a `KernelView`, its axes sorted by what they mean.

    Attributes:
        kernel_first: whether the kernel is the left operand.
        batch, contracted, free: the view's stack atoms by their part in the product.
        main, rest: its in and its out atoms, contracted and free; exchanged where `swapped`.
        swapped: the kernel's out axes are contracted (x @ Wᵀ of an `io` kernel, a tied embedding,
            an input gradient).
        params: of the `dot_general`, without the dimension numbers.
        kernel_dims, x_dims: (contracted, batch) axes of the two operands, pairwise.
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
    params: Any
    kernel_dims: tuple[tuple[int, ...], tuple[int, ...]]
    x_dims: tuple[tuple[int, ...], tuple[int, ...]]
    rows: int

    @classmethod
    def of(
        cls, view: KernelView, x: Any, kernel_first: bool, params: dict[str, Any]
    ) -> Product | NoRule:
        """Return the product with its axes sorted, or why it has no factored form."""
        (lc, rc), (lb, rb) = params["dimension_numbers"]
        kernel_dims, x_dims = ((tuple(lc), tuple(lb)), (tuple(rc), tuple(rb)))
        if not kernel_first:
            kernel_dims, x_dims = x_dims, kernel_dims
        in_contracted = [n for d in kernel_dims[0] for n in view.dims[d]]
        in_batch = [n for d in kernel_dims[1] for n in view.dims[d]]
        in_free = [
            n
            for d, atoms in enumerate(view.dims)
            if d not in kernel_dims[0] + kernel_dims[1]
            for n in atoms
        ]

        def kinds(atoms):
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
        large = {
            side: tuple(n for n in view.of_side(side) if view.atoms[n].size > 1) for side in "sio"
        }
        rows = nominal(size for d, size in enumerate(x.shape) if d not in x_dims[0] + x_dims[1])
        return cls(
            kernel_first=kernel_first,
            batch=tuple(n for n in large["s"] if n in in_batch),
            contracted=tuple(n for n in large["s"] if n in in_contracted),
            free=tuple(n for n in large["s"] if n in in_free),
            main=large[main],
            rest=large[rest],
            swapped=swapped,
            params={k: v for k, v in params.items() if k != "dimension_numbers"},
            kernel_dims=kernel_dims,
            x_dims=x_dims,
            rows=rows * size_of(view, [n for n in in_batch if view.atoms[n].kind == "b"]),
        )

    def apply(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """See `Operation.apply`."""
        operands = (kernel, x) if self.kernel_first else (x, kernel)
        left, right = (
            (self.kernel_dims, self.x_dims)
            if self.kernel_first
            else (self.x_dims, self.kernel_dims)
        )
        numbers = ((left[0], right[0]), (left[1], right[1]))
        return lax.dot_general(*operands, numbers, **self.params)

    def place_gain(self, x: Any, gain: jax.Array) -> BaseScaling | None:
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

    def update(self, x: jax.Array, view: KernelView) -> tuple[jax.Array, jax.Array]:
        """See `Operation.update`: (x KB) KA of all adapters together, and x KB."""
        view = view.flat()
        delta, h = _run(self._steps(x, view), self._group_x(x, view), view.factors)
        return self._ungroup(delta, x, view), h

    def pull_back(
        self, x: jax.Array, view: KernelView, h: jax.Array, g: jax.Array
    ) -> tuple[jax.Array, tuple[ViewFactors, ...]]:
        """See `Operation.pull_back`."""
        factors, from_flat = jax.vjp(lambda factors: tuple(f.flat() for f in factors), view.factors)
        view = dataclasses.replace(view, factors=factors)
        steps = self._steps(x, view)
        groups, from_groups = jax.vjp(
            lambda x: self._group_x(x.astype(steps.dtype), view), x.astype(steps.dtype)
        )
        delta = jax.eval_shape(lambda: _run(steps, groups, factors)[0])
        (g,) = jax.linear_transpose(lambda delta: self._ungroup(delta, x, view), delta)(
            g.astype(delta.dtype)
        )
        dx, dfactors = _pull_back(steps, groups, factors, h, g)
        return *from_groups(dx), *from_flat(dfactors)

    def _steps(self, x: jax.Array, view: KernelView) -> _FactoredSteps:
        groups = (self.batch, self.contracted, self.free)
        stack = [n for n in view.of_kind("s") if view.atoms[n].size > 1]
        rows = len(self._row_sizes(x, view))
        return _FactoredSteps(
            *("bcf"[n] if group else "" for n, group in enumerate(groups)),
            i="i" if self.main else "",
            o="o" if self.rest else "",
            n=_ROW_LABELS[:rows],
            stack_order=tuple(stack.index(n) for group in groups for n in group),
            stack_shape=tuple(size_of(view, group) for group in groups if group),
            swapped=self.swapped,
            dtype=float32_or_wider(x.dtype, *(f.w1_a.dtype for f in view.factors)),
            precision=self.params.get("precision"),
        )

    def elements(self, view: KernelView) -> int:
        """See `Operation.elements`."""
        return math.prod(self._sizes(view))

    def factored_flops(self, view: KernelView) -> float:
        """See `Operation.factored_flops`."""
        into, out, modules = self._sizes(view)
        return sum(f.r**2 for f in view.factors) * (into + out) * modules * (2.0 * self.rows + 2)

    def temporary_bytes(self, view: KernelView, strategy: Strategy) -> int:
        """See `Operation.temporary_bytes`."""
        if strategy != "factored":
            return 4 * math.prod(view.shape)
        into, out, modules = self._sizes(view)
        return 4 * sum(f.r**2 for f in view.factors) * max(into, out, self.rows) * modules

    def _sizes(self, view: KernelView) -> tuple[int, int, int]:
        """Return the contracted and the free features of a module, and the number of modules."""
        stack = self.batch + self.contracted + self.free
        return size_of(view, self.main), size_of(view, self.rest), size_of(view, stack)

    # --- axes ---

    def _x_layout(self, x_shape: tuple[int, ...], view: KernelView) -> list[tuple[str, int, int]]:
        """Return x's axes, contracted and batch ones split into atoms.

        Returns:
            ("atom", atom, size) or ("row", axis, size) for each.
        """
        kernel_axis = {
            xd: kd
            for x_side, k_side in zip(self.x_dims, self.kernel_dims, strict=True)
            for xd, kd in zip(x_side, k_side, strict=True)
        }
        result: list[tuple[str, int, int]] = []
        for axis, size in enumerate(x_shape):
            if axis in kernel_axis:
                result += [("atom", n, view.atoms[n].size) for n in view.dims[kernel_axis[axis]]]
            else:
                result.append(("row", axis, size))
        return result

    def _x_rows(self, x: jax.Array, view: KernelView) -> list[tuple[str, int, int]]:
        """Return the axes of x that make up its rows."""
        return [
            a
            for a in self._x_layout(x.shape, view)
            if a[0] == "row" or view.atoms[a[1]].kind == "b"
        ]

    def _row_sizes(self, x: jax.Array, view: KernelView) -> list[int]:
        """Return the sizes of the axes that x's rows are kept in.

        On one device it is one axis, of which XLA:CPU needs no transposed copy. On several devices
        the rows keep their axes: those that are sharded cannot be joined without moving data.
        """
        sizes = [a[2] for a in self._x_rows(x, view)]
        if jax.device_count() == 1:
            return [math.prod(sizes)]
        return [size for size in sizes if not is_known(size) or size > 1]

    def _group_x(self, x: jax.Array, view: KernelView) -> jax.Array:
        """Return x as `[b, n, c, main]`; n can be several axes."""
        axes, rows = self._x_layout(x.shape, view), self._x_rows(x, view)
        position = {a[:2]: n for n, a in enumerate(axes)}
        groups = [self.batch, None, self.contracted, self.main]
        order, sizes = [], []
        for group in groups:
            if group is None:
                order += [position[a[:2]] for a in rows]
                sizes += self._row_sizes(x, view)
            elif group:
                order += [position["atom", n] for n in group]
                sizes.append(size_of(view, group))
        expanded = x.reshape([a[2] for a in axes])  # one axis per atom
        if order != sorted(order):
            expanded = jnp.transpose(expanded, order)
        return expanded.reshape(sizes)

    def _ungroup(self, delta: jax.Array, x: jax.Array, view: KernelView) -> jax.Array:
        """Return `[b, f, n, rest]` as the result of the `dot_general`.

        That has batch axes, free axes of the left and free axes of the right operand.
        """
        rows = self._x_rows(x, view)
        have = (
            [("atom", n) for n in self.batch + self.free]
            + [a[:2] for a in rows]
            + [("atom", n) for n in self.rest]
        )
        size = {a[:2]: a[2] for a in rows} | {
            ("atom", n): atom.size for n, atom in enumerate(view.atoms)
        }
        contracted, batch = self.kernel_dims
        batch_out = [("atom", n) for d in batch for n in view.dims[d]]
        kernel_out = [
            ("atom", n) for d, a in enumerate(view.dims) if d not in contracted + batch for n in a
        ]
        row_out = [a[:2] for a in rows if a[0] == "row"]
        want = batch_out + (kernel_out + row_out if self.kernel_first else row_out + kernel_out)
        delta = delta.reshape([size[a] for a in have])  # one axis per atom
        order = [have.index(a) for a in want]
        if order != sorted(order):
            delta = jnp.transpose(delta, order)
        batch_shape = [view.shape[d] for d in batch]
        kernel_shape = [n for d, n in enumerate(view.shape) if d not in contracted + batch]
        row_shape = [a[2] for a in rows if a[0] == "row"]
        return delta.reshape(
            batch_shape
            + (kernel_shape + row_shape if self.kernel_first else row_shape + kernel_shape)
        )


_ROW_LABELS = "nmlkjhgedazyxwvuts"


@dataclasses.dataclass(frozen=True)
class _FactoredSteps:
    """The factored product (x KB) KA of arrays whose axes are grouped.

    Hashable, so that equal layers share traces. Axis labels: b batch stack, n rows of x, c
    contracted stack, f free stack, i contracted features, o free features, R = Σr².

    Attributes:
        b, c, f, i, o: the labels of the groups that are there, "" for the others.
        n: one label per axis of rows.
        stack_order: permutation of the factors' stack axes to b, c, f.
        stack_shape: the shape that they then take.
        swapped: the kernel's out axes are contracted.
        dtype: of the factors' products.
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
    dtype: Any
    precision: Any

    @property
    def x(self) -> str:
        return f"{self.b}{self.n}{self.c}{self.i}"

    @property
    def kb(self) -> str:
        return f"{self.b}{self.c}{self.f}R{self.i}"

    @property
    def ka(self) -> str:
        return f"{self.b}{self.c}{self.f}R{self.o}"

    @property
    def h(self) -> str:
        return f"{self.b}{self.c}{self.n}{self.f}R"

    @property
    def y(self) -> str:
        return f"{self.b}{self.f}{self.n}{self.o}"

    def run(self, x: jax.Array, factors: tuple[ViewFactors, ...]) -> tuple[jax.Array, jax.Array]:
        """Return the product y = (x KB) KA and h = x KB."""
        if self._has_few_rows(x, factors):
            return self._run_few_rows(x, factors)
        kb, ka = self.khatri_rao(factors)
        # [b, n, c, i] · [b, c, f, R, i] -> [b, c, n, f, R]
        h = contract(x.astype(self.dtype), self.x, kb, self.kb, self.h, self.precision)
        # [b, c, n, f, R] · [b, c, f, R, o] -> [b, f, n, o]
        return contract(h, self.h, ka, self.ka, self.y, self.precision), h

    def khatri_rao(self, factors: tuple[ViewFactors, ...]) -> tuple[jax.Array, jax.Array]:
        """Return KB `[b, c, f, R, i]` and the scaled KA `[b, c, f, R, o]` of all adapters."""
        pairs = []
        for f in factors:
            a1, b1, a2, b2 = (w.astype(self.dtype) for w in (f.w1_a, f.w1_b, f.w2_a, f.w2_b))
            # [*stack, out, r] twice -> [*stack, r², out]
            ka = khatri_rao_columns(jnp.swapaxes(a1, -1, -2), jnp.swapaxes(a2, -1, -2))
            scaling = f.scaling.astype(self.dtype)
            pairs.append((khatri_rao_columns(b1, b2), ka * scaling.reshape(*scaling.shape, 1, 1)))
        kb, ka = (
            jnp.concatenate(side, -2) if len(pairs) > 1 else side[0]
            for side in zip(*pairs, strict=True)
        )
        if self.swapped:
            kb, ka = ka, kb
        return self._arrange(kb, self.i), self._arrange(ka, self.o)

    def _arrange(self, k: jax.Array, label: str) -> jax.Array:
        """Return `[*stack, R, features]` as `[b, c, f, R, features]`, without unlabelled axes."""
        *stack, r, n = k.shape
        if stack:
            k = k.reshape(*(size for size in stack if size > 1), r, n)
            k = jnp.transpose(k, [*self.stack_order, k.ndim - 2, k.ndim - 1])
        return k.reshape(*self.stack_shape, r, *((n,) if label else ()))

    def _has_few_rows(self, x: jax.Array, factors: tuple[ViewFactors, ...]) -> bool:
        plain = (self.x, self.y) == (f"{self.n}i", f"{self.n}o")
        known = all(map(is_known, x.shape))
        return plain and known and math.prod(x.shape[:-1]) < min(f.r for f in factors)

    def _run_few_rows(
        self, x: jax.Array, factors: tuple[ViewFactors, ...]
    ) -> tuple[jax.Array, jax.Array]:
        """Return the same for fewer rows than ranks, as in decoding, without KB and KA.

        (x KB)[n, p, q] = Σ_i x[n, i] b1[p, i] b2[q, i], and likewise for KA: smaller, and then as
        cheap.
        """
        y, hs = jnp.zeros((), self.dtype), []
        for f in factors:
            f = f.astype(self.dtype)
            # every stack has size 1: [out, r] and [r, in]
            a1, b1, a2, b2 = (w.reshape(w.shape[-2:]) for w in (f.w1_a, f.w1_b, f.w2_a, f.w2_b))
            a1, a2 = a1.T, a2.T
            scaling = f.scaling.reshape(())
            of_h, of_y = (1, scaling)  # KA is the scaled one
            if self.swapped:
                a1, b1, a2, b2 = b1, a1, b2, a2
                of_h, of_y = of_y, of_h
            n, scaled = self.n, x.astype(self.dtype)[..., None, :] * b1  # [n, p, i]
            h = contract(scaled, f"{n}pi", b2, "qi", f"{n}pq", self.precision) * of_h
            y = y + (contract(h, f"{n}pq", a2, "qo", f"{n}po", self.precision) * a1).sum(-2) * of_y
            hs.append(h.reshape(*x.shape[:-1], math.prod(h.shape[-2:])))  # [n, R]
        return y, jnp.concatenate(hs, -1) if len(hs) > 1 else hs[0]

    def pull_back(
        self, x: jax.Array, factors: tuple[ViewFactors, ...], h: jax.Array, g: jax.Array
    ) -> tuple[jax.Array, tuple[ViewFactors, ...]]:
        """Return the cotangents of x and the factors.

        The order of the operands matters: dhᵀ@x and hᵀ@g, with R leading, run fast on XLA:CPU.
        """
        if self._has_few_rows(x, factors):  # no array of R columns here either
            return jax.vjp(
                lambda x, factors: self._run_few_rows(x, factors)[0], x.astype(self.dtype), factors
            )[1](g)
        (kb, ka), to_factors = jax.vjp(self.khatri_rao, factors)
        dh = contract(g, self.y, ka, self.ka, self.h, self.precision)
        dx = contract(dh, self.h, kb, self.kb, self.x, self.precision, like=x)
        dkb = contract(dh, self.h, x.astype(self.dtype), self.x, self.kb, self.precision, like=kb)
        dka = contract(h, self.h, g, self.y, self.ka, self.precision, like=ka)
        return dx, *to_factors((dkb, dka))


_run = jax.jit(_FactoredSteps.run, static_argnums=0)
_pull_back = jax.jit(_FactoredSteps.pull_back, static_argnums=0)
