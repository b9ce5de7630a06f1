"""`KernelView`: an adapted kernel as it looks at one point of a traced function.

A model rarely multiplies with the kernel as it is stored: it is transposed, reshaped, sliced, cast,
or one layer is taken from a stack. A view follows these without materialising ΔW. Each axis of the
kernel is made of *atoms*, indivisible runs of stack, in, out or spatial positions. Structural
operations permute, group, split and cut atoms, and the factors follow.

Example: a query kernel `[768, 12, 64]` with the layout "ioo" has three atoms, i 768, o 12 and o 64.
Reshaped to `[768, 768]`, its second axis is made of the two out atoms.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from loha_jax.lowrank.hadamard import float32_or_wider, multiply_core
from loha_jax.lowrank.layout import Layout
from loha_jax.lowrank.weight_decomposition import is_on_out, on_flat
from loha_jax.runtime.sizes import is_empty, is_known
from loha_jax.transform.packed_kernel import PackedKernel, cut, plain, put_off, scaled
from loha_jax.tree.factors import Factors
from loha_jax.tree.leaves import LoHaWeight
from loha_jax.tree.quantised import QuantisedArray


@dataclasses.dataclass(frozen=True)
class Atom:
    """A run of positions along one axis of the stored kernel.

    Attributes:
        kind: "s" (stack), "i" (in), "o" (out), "k" (spatial), "b" (added by broadcasting), "?" (not
            known yet: layout inference).
        size: number of positions.
        axis: axis of the stored kernel, -1 for "b".
    """

    kind: str
    size: int
    axis: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ViewFactors:
    """One adapter of a view, with one leading axis per stack atom.

    Attributes:
        w1_a, w2_a: `[*s, out, r]`.
        w1_b, w2_b: `[*s, r, in·prod(spatial)]`, or `[*s, r, in]` with cores.
        t1, t2: cores `[*s, r, r, prod(spatial)]` of a convolution in CP form, or None.
        scaling: `[*s]`.
        out_gain, in_gain: of a weight decomposition, the multiple of the base weight that is added:
            `[*s, out, 1]` or `[*s, 1, in]`; or None. ΔW's own multiple is in the factors.
    """

    w1_a: Any
    w1_b: Any
    w2_a: Any
    w2_b: Any
    t1: Any
    t2: Any
    scaling: Any
    out_gain: Any = None
    in_gain: Any = None

    @classmethod
    def of(cls, f: Factors, kernel: jax.Array, layout: Layout) -> ViewFactors:
        """Return an adapter of a kernel as it is stored."""
        shape = kernel.shape
        stack = layout.sizes("s", shape)
        a1, a2, t1, t2 = f.hada_w1_a, f.hada_w2_a, f.hada_t1, f.hada_t2
        if f.is_cp:
            a1, a2 = jnp.swapaxes(a1, -1, -2), jnp.swapaxes(a2, -1, -2)  # [*stack, out, r]
            r = a1.shape[-1]
            t1, t2 = t1.reshape(*stack, r, r, -1), t2.reshape(*stack, r, r, -1)
        view = cls(a1, f.hada_w1_b, a2, f.hada_w2_b, t1, t2, f.scale)
        if f.dora_scale is None or (gains := f.gains(plain(kernel), layout)) is None:
            return view
        own, base = gains  # [*stack, out, 1, ...] or [*stack, 1, in, 1, ...]
        if is_on_out(base.shape, layout.torch_shape(shape), len(stack)):
            rows = (*base.shape[: len(stack) + 1], 1)  # [*stack, out, 1]
            return dataclasses.replace(
                view, w1_a=a1 * own.reshape(rows), out_gain=base.reshape(rows)
            )
        columns = (*stack, 1, base.shape[len(stack) + 1])  # [*stack, 1, in]
        own = (
            own.reshape(columns) if f.is_cp else on_flat(own, len(stack), layout.sizes("k", shape))
        )
        return dataclasses.replace(view, w1_b=f.hada_w1_b * own, in_gain=base.reshape(columns))

    @property
    def r(self) -> int:
        """The rank of both factors."""
        return self.w1_a.shape[-1]

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the factors' products: float32 or wider."""
        return float32_or_wider(self.w1_a.dtype)

    def astype(self, dtype: Any) -> ViewFactors:
        """Return all arrays in another dtype."""
        return jax.tree.map(lambda w: w.astype(dtype), self)

    def flat(self) -> ViewFactors:
        """Return the same update without cores, which multiply into w*_b at the same rank."""
        if self.t1 is None:
            return self
        f, dtype = self.astype(self.dtype), self.dtype
        w1_b, w2_b = multiply_core(f.t1, f.w1_b, dtype), multiply_core(f.t2, f.w2_b, dtype)
        return dataclasses.replace(f, w1_b=w1_b, w2_b=w2_b, t1=None, t2=None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KernelView:
    """A kernel with its adapters, seen through structural operations.

    Attributes:
        kernel: the base weight, with the operations applied.
        factors: the active adapters.
        atoms: all atoms; those of one kind are in the order in which PEFT's tensors flatten them.
        dims: for each axis of `kernel`, the atoms (of size > 1) it is made of, outermost first.
        name: the module's name, for reports; empty where none is made, so that equal layers share
            traces.
    """

    kernel: Any
    factors: tuple[ViewFactors, ...]
    atoms: tuple[Atom, ...] = dataclasses.field(metadata={"static": True})
    dims: tuple[tuple[int, ...], ...] = dataclasses.field(metadata={"static": True})
    name: str = dataclasses.field(default="", metadata={"static": True})

    @classmethod
    def of(cls, leaf: LoHaWeight, name: str = "") -> KernelView:
        """Return the view of a leaf as it is stored."""
        layout = leaf.layout.strip(leaf.kernel.ndim)
        shape = leaf.kernel.shape
        order = layout.order
        kinds = {axis: kind for kind in "soik" for axis in layout.axes(kind)}
        atoms = tuple(Atom(kinds[axis], shape[axis], axis) for axis in order)
        dims = tuple((order.index(axis),) if shape[axis] > 1 else () for axis in range(layout.ndim))
        kernel = frozen_kernel(leaf.kernel)
        factors = tuple(ViewFactors.of(f, kernel, layout) for f in leaf.active_adapters)
        return cls(kernel, factors, atoms, dims, name)

    @classmethod
    def unknown(cls, kernel: Any, name: str) -> KernelView:
        """Return the view of a plain array whose layout is to be inferred."""
        atoms = tuple(Atom("?", size, axis) for axis, size in enumerate(kernel.shape))
        return cls(
            kernel,
            (),
            atoms,
            tuple((n,) if atom.size > 1 else () for n, atom in enumerate(atoms)),
            name,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the view."""
        return self.kernel.shape

    @property
    def shapes(self) -> KernelView:
        """The view with a `jax.ShapeDtypeStruct` for each array.

        Differentiation rules hold it: they outlive the trace of the arrays.
        """
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self)

    def of_kind(self, kind: str) -> list[int]:
        """Return the atoms of one kind, in flattening order."""
        return [n for n, atom in enumerate(self.atoms) if atom.kind == kind]

    def of_side(self, side: str) -> list[int]:
        """Return the atoms of the factors' in or out axis; spatial atoms follow the in ones."""
        return self.of_kind("i") + self.of_kind("k") if side == "i" else self.of_kind(side)

    def flat(self) -> KernelView:
        """Return the same view without cores."""
        return dataclasses.replace(self, factors=tuple(f.flat() for f in self.factors))

    def without_gain(self) -> KernelView:
        """Return the view of W + ΔW, without the multiples of W that weight decompositions add."""
        factors = tuple(dataclasses.replace(f, out_gain=None, in_gain=None) for f in self.factors)
        return dataclasses.replace(self, factors=factors)

    # --- structural operations: each returns the new view, or None where a view cannot follow ---

    def transpose(self, permutation: Sequence[int]) -> KernelView:
        """`lax.transpose`."""
        dims = tuple(self.dims[axis] for axis in permutation)
        kernel = put_off(lax.transpose, self.kernel, tuple(permutation))
        return dataclasses.replace(self, kernel=kernel, dims=dims)

    def convert(self, dtype: Any) -> KernelView | None:
        """`lax.convert_element_type`; the factors keep their dtype."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return None
        kernel = put_off(lax.convert_element_type, self.kernel, dtype)
        return dataclasses.replace(self, kernel=kernel)

    def squeeze(self, dimensions: Sequence[int]) -> KernelView:
        """`lax.squeeze`."""
        dims = tuple(atoms for axis, atoms in enumerate(self.dims) if axis not in dimensions)
        kernel = put_off(lax.squeeze, self.kernel, tuple(dimensions))
        return dataclasses.replace(self, kernel=kernel, dims=dims)

    def broadcast_in_dim(
        self, shape: Sequence[int], broadcast_dimensions: Sequence[int]
    ) -> KernelView | None:
        """`lax.broadcast_in_dim`: new axes, and axes of size 1 that grow, get atoms of kind "b"."""
        if not all(map(is_known, shape)):
            return None
        atoms, dims = list(self.atoms), []
        for axis, size in enumerate(shape):
            source = broadcast_dimensions.index(axis) if axis in broadcast_dimensions else None
            if source is not None and self.shape[source] == size:
                dims.append(self.dims[source])
            elif size == 1:
                dims.append(())
            else:
                dims.append((len(atoms),))
                atoms.append(Atom("b", size, -1))
        axes = tuple(broadcast_dimensions)
        kernel = put_off(lax.broadcast_in_dim, self.kernel, tuple(shape), axes)
        return dataclasses.replace(self, kernel=kernel, atoms=tuple(atoms), dims=tuple(dims))

    def reshape(self, shape: Sequence[int]) -> KernelView | None:
        """`lax.reshape`: regroup atoms, splitting those within which a new axis ends."""
        queue = [n for atoms in self.dims for n in atoms]
        view, dims = self, []
        for size in shape:
            group: list[int] = []
            while size > 1:
                atom = queue.pop(0)
                have = view.atoms[atom].size
                if size % have == 0:
                    group.append(atom)
                    size //= have
                elif have % size == 0:
                    view = view._split(atom, size)
                    queue = [atom + 1] + [n + (n > atom) for n in queue]
                    dims = [tuple(n + (n > atom) for n in d) for d in dims]
                    group = [n + (n > atom) for n in group] + [atom]
                    size = 1
                else:
                    return None
            dims.append(tuple(group))
        kernel = put_off(lax.reshape, self.kernel, tuple(shape))
        return dataclasses.replace(view, kernel=kernel, dims=tuple(dims))

    def slice(
        self, starts: Sequence[int], limits: Sequence[int], strides: Sequence[int] | None
    ) -> KernelView | None:
        """`lax.slice`."""
        strides = strides or (1,) * len(starts)
        view = self
        for axis, (start, limit, stride) in enumerate(zip(starts, limits, strides, strict=True)):
            if (start, limit, stride) == (0, self.shape[axis], 1):
                continue
            cut = view.cut(
                axis, lambda x, at, a=start, b=limit, c=stride: lax.slice_in_dim(x, a, b, c, at)
            )
            if cut is None:
                return None
            view = cut
        return view

    def dynamic_slice(self, starts: Sequence[Any], sizes: Sequence[int]) -> KernelView | None:
        """`lax.dynamic_slice`."""
        view = self
        for axis, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            if size == self.shape[axis]:
                continue
            cut = view.cut(
                axis, lambda x, at, a=start, n=size: lax.dynamic_slice_in_dim(x, a, n, at)
            )
            if cut is None:
                return None
            view = cut
        return view

    def scaled(self, factor: Any, operation: Callable[[Any, Any], Any]) -> KernelView:
        """Return the view multiplied or divided by a scalar."""
        factors = tuple(
            dataclasses.replace(f, scaling=operation(f.scaling, factor)) for f in self.factors
        )
        kernel = scaled(self.kernel, factor, operation)
        return dataclasses.replace(self, kernel=kernel, factors=factors)

    def rev(self, dimensions: Sequence[int]) -> KernelView:
        """`lax.rev`."""
        view = dataclasses.replace(self, kernel=put_off(lax.rev, self.kernel, tuple(dimensions)))
        for atom in (n for axis in dimensions for n in self.dims[axis]):
            view = view._map_atom(atom, lambda x, at: lax.rev(x, (at,)), self.atoms[atom].size)
        return view

    def cut(self, axis: int, operation: Callable[[Any, int], Any]) -> KernelView | None:
        """Apply `operation(array, axis)`, which changes the positions along an axis.

        Returns:
            The view with the kernel and its factors changed; None where the axis is made of several
            atoms, whose positions cannot be told apart, or nothing is left.
        """
        if len(self.dims[axis]) != 1:
            return None
        (atom,) = self.dims[axis]
        kernel = cut(self.kernel, axis, operation)
        if is_empty(kernel.shape):
            return None
        view = self._map_atom(atom, operation, kernel.shape[axis])
        dims = list(view.dims)
        if kernel.shape[axis] == 1:
            dims[axis] = ()
        return dataclasses.replace(view, kernel=kernel, dims=tuple(dims))

    # --- atoms ---

    def _map_atom(self, atom: int, operation: Callable[[Any, int], Any], size: int) -> KernelView:
        """Apply an operation to the axis of one atom in every factor that has it."""
        kind = self.atoms[atom].kind
        leading = len(self.of_kind("s"))

        def mapped(x: jax.Array, axis: int, side: list[int]) -> jax.Array:
            """Apply it to the atom's part of an axis that is made of the atoms of `side`."""
            inner = [self.atoms[n].size for n in side]  # the axis as one axis per atom
            y = operation(
                x.reshape(*x.shape[:axis], *inner, *x.shape[axis + 1 :]), axis + side.index(atom)
            )
            return y.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])

        def change(f: ViewFactors) -> ViewFactors:
            if kind == "s":
                return jax.tree.map(lambda x: operation(x, self.of_kind("s").index(atom)), f)
            if kind == "o":
                names, axis, side = ("w1_a", "w2_a"), leading, self.of_kind("o")
            elif kind == "k" and f.t1 is not None:
                names, axis, side = ("t1", "t2"), leading + 2, self.of_kind("k")
            else:
                names, axis = ("w1_b", "w2_b"), leading + 1
                side = self.of_kind("i") if f.t1 is not None else self.of_side("i")
            changed = {name: mapped(getattr(f, name), axis, side) for name in names}
            if kind == "o" and f.out_gain is not None:
                changed["out_gain"] = mapped(f.out_gain, axis, side)
            if kind == "i" and f.in_gain is not None:
                changed["in_gain"] = mapped(f.in_gain, leading + 1, self.of_kind("i"))
            return dataclasses.replace(f, **changed)

        factors = self.factors if kind in "b?" else tuple(change(f) for f in self.factors)
        atoms = list(self.atoms)
        atoms[atom] = dataclasses.replace(atoms[atom], size=size)
        return dataclasses.replace(self, factors=factors, atoms=tuple(atoms))

    def _split(self, atom: int, outer: int) -> KernelView:
        """Split an atom in two that follow each other; `dims` is left to the caller."""
        old = self.atoms[atom]
        inner = old.size // outer
        atoms = [
            *self.atoms[:atom],
            *(dataclasses.replace(old, size=n) for n in (outer, inner)),
            *self.atoms[atom + 1 :],
        ]
        factors = self.factors
        if old.kind == "s":
            at = self.of_kind("s").index(atom)
            factors = jax.tree.map(
                lambda x: x.reshape(*x.shape[:at], outer, inner, *x.shape[at + 1 :]), factors
            )
        return dataclasses.replace(self, factors=factors, atoms=tuple(atoms))


def frozen_kernel(kernel: Any) -> Any:
    """Return a leaf's kernel as a view holds it, without a gradient."""
    if isinstance(kernel, QuantisedArray):
        return PackedKernel.of(lax.stop_gradient(kernel))
    return lax.stop_gradient(kernel)


def size_of(view: KernelView, atoms: Sequence[int]) -> int:
    """Return the product of the sizes of some atoms."""
    return math.prod(view.atoms[n].size for n in atoms)
