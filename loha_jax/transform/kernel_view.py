"""`KernelView`: an adapted kernel as it looks at one point of a traced function.

A model rarely multiplies with the kernel as it is stored: it is transposed, reshaped, sliced, cast,
or one layer is taken from a stack. A view follows these without materialising ΔW. Each axis of the
kernel is made of *atoms*, indivisible runs of stack, in, out or spatial positions. Structural
operations permute, group, split and cut atoms, and the factors follow.

Example: a query kernel `[768, 12, 64]` with the layout "ioo" has three atoms, i 768, o 12 and o 64.
Reshaped to `[768, 768]`, its second axis is made of the two out atoms.
"""

# JAX's own functions are only partly typed.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from loha_jax.runtime.sizes import is_empty, is_known
from loha_jax.transform.packed_kernel import (
    AxisOperation,
    PackedKernel,
    cut,
    put_off,
    scaled,
)
from loha_jax.transform.typed_jax import map_arrays
from loha_jax.transform.view_factors import ViewFactors
from loha_jax.tree.leaves import LoHaWeight
from loha_jax.tree.quantised import QuantisedArray

Dims = tuple[tuple[int, ...], ...]
"""For each axis, the atoms that it is made of."""


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
class KernelView:
    """A kernel with its adapters, seen through structural operations.

    Attributes:
        kernel: the base weight, with the operations applied.
        factors: the active adapters.
        atoms: all atoms; those of one kind are in the order in which PEFT's tensors flatten them.
        dims: for each axis of `kernel`, the atoms (of size > 1) it is made of, outermost first.
        name: of the module, for reports; empty where none is made: equal layers share traces.
        sliced: whether a loop or vmap of the caller has taken stack axes off.
    """

    kernel: jax.Array | PackedKernel
    factors: tuple[ViewFactors, ...]
    atoms: tuple[Atom, ...] = dataclasses.field(metadata={"static": True})
    dims: Dims = dataclasses.field(metadata={"static": True})
    name: str = dataclasses.field(default="", metadata={"static": True})
    sliced: bool = dataclasses.field(default=False, metadata={"static": True})

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
        return cls(kernel, factors, atoms, dims, name, layout != leaf.layout)

    @classmethod
    def unknown(cls, kernel: jax.Array | PackedKernel, name: str) -> KernelView:
        """Return the view of a plain array whose layout is to be inferred."""
        atoms = tuple(Atom("?", size, axis) for axis, size in enumerate(kernel.shape))
        dims = tuple((n,) if atom.size > 1 else () for n, atom in enumerate(atoms))
        return cls(kernel, (), atoms, dims, name)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the view."""
        return self.kernel.shape

    @property
    def shapes(self) -> KernelView:
        """The view with a `jax.ShapeDtypeStruct` for each array.

        Differentiation rules hold it: they outlive the trace of the arrays.
        """
        return map_arrays(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self)

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
        return _moved(self, dims, lax.transpose, tuple(permutation))

    def convert(self, dtype: DTypeLike) -> KernelView | None:
        """`lax.convert_element_type`; the factors keep their dtype."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return None
        return _moved(self, self.dims, lax.convert_element_type, dtype)

    def squeeze(self, dimensions: Sequence[int]) -> KernelView:
        """`lax.squeeze`."""
        dims = tuple(atoms for axis, atoms in enumerate(self.dims) if axis not in dimensions)
        return _moved(self, dims, lax.squeeze, tuple(dimensions))

    def broadcast_in_dim(
        self, shape: Sequence[int], broadcast_dimensions: Sequence[int]
    ) -> KernelView | None:
        """`lax.broadcast_in_dim`: new axes, and axes of size 1 that grow, get atoms of kind "b"."""
        if not all(map(is_known, shape)):
            return None
        atoms = list(self.atoms)
        dims: list[tuple[int, ...]] = []
        for axis, size in enumerate(shape):
            source = broadcast_dimensions.index(axis) if axis in broadcast_dimensions else None
            if source is not None and self.shape[source] == size:
                dims.append(self.dims[source])
            elif size == 1:
                dims.append(())
            else:
                dims.append((len(atoms),))
                atoms.append(Atom("b", size, -1))
        view = dataclasses.replace(self, atoms=tuple(atoms))
        return _moved(view, tuple(dims), _broadcast, tuple(shape), tuple(broadcast_dimensions))

    def reshape(self, shape: Sequence[int]) -> KernelView | None:
        """`lax.reshape`: regroup atoms, splitting those within which a new axis ends."""
        queue: list[int] = [n for atoms in self.dims for n in atoms]
        view: KernelView = self
        dims: list[tuple[int, ...]] = []
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
                    queue = [atom + 1, *_after_split(atom, queue)]
                    dims = [tuple(_after_split(atom, d)) for d in dims]
                    group = [*_after_split(atom, group), atom]
                    size = 1
                else:
                    return None
            dims.append(tuple(group))
        return _moved(view, tuple(dims), lax.reshape, tuple(shape))

    def slice(
        self, starts: Sequence[int], limits: Sequence[int], strides: Sequence[int] | None
    ) -> KernelView | None:
        """`lax.slice`."""

        def take(start: int, limit: int, stride: int) -> AxisOperation:
            return lambda x, axis: lax.slice_in_dim(x, start, limit, stride, axis)

        axes = zip(self.shape, starts, limits, strides or (1,) * len(starts), strict=True)
        return self._cut_each(
            [None if (a, b, c) == (0, size, 1) else take(a, b, c) for size, a, b, c in axes]
        )

    def dynamic_slice(self, starts: Sequence[ArrayLike], sizes: Sequence[int]) -> KernelView | None:
        """`lax.dynamic_slice`."""

        def take(start: ArrayLike, size: int) -> AxisOperation:
            return lambda x, axis: lax.dynamic_slice_in_dim(x, start, size, axis)

        axes = zip(self.shape, starts, sizes, strict=True)
        return self._cut_each([None if n == have else take(at, n) for have, at, n in axes])

    def scaled(
        self, factor: jax.Array, operation: Callable[[jax.Array, jax.Array], jax.Array]
    ) -> KernelView:
        """Return the view multiplied or divided by a scalar."""
        factors = tuple(
            dataclasses.replace(f, scaling=operation(f.scaling, factor)) for f in self.factors
        )
        kernel = scaled(self.kernel, factor, operation)
        return dataclasses.replace(self, kernel=kernel, factors=factors)

    def rev(self, dimensions: Sequence[int]) -> KernelView:
        """`lax.rev`."""
        view = _moved(self, self.dims, lax.rev, tuple(dimensions))
        for atom in (n for axis in dimensions for n in self.dims[axis]):
            view = view._map_atom(atom, lambda x, at: lax.rev(x, (at,)), self.atoms[atom].size)
        return view

    def _cut_each(self, operations: Sequence[AxisOperation | None]) -> KernelView | None:
        """Return `cut` along each axis that has an operation."""
        view: KernelView | None = self
        for axis, operation in enumerate(operations):
            if view is not None and operation is not None:
                view = view.cut(axis, operation)
        return view

    def cut(self, axis: int, operation: AxisOperation) -> KernelView | None:
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

    def _map_atom(self, atom: int, operation: AxisOperation, size: int) -> KernelView:
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
                return map_arrays(lambda x: operation(x, self.of_kind("s").index(atom)), f)
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
            factors = map_arrays(
                lambda x: x.reshape(*x.shape[:at], outer, inner, *x.shape[at + 1 :]), factors
            )
        return dataclasses.replace(self, factors=factors, atoms=tuple(atoms))


def _moved(
    view: KernelView, dims: Dims, operation: Callable[..., jax.Array], *settings: Hashable
) -> KernelView:
    """Return a view after an operation on the kernel alone."""
    kernel = put_off(operation, view.kernel, *settings)
    return dataclasses.replace(view, kernel=kernel, dims=dims)


def _broadcast(x: jax.Array, shape: Sequence[int], axes: Sequence[int]) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, axes)


def frozen_kernel(kernel: jax.Array | QuantisedArray) -> jax.Array | PackedKernel:
    """Return a leaf's kernel as a view holds it, without a gradient."""
    if isinstance(kernel, QuantisedArray):
        return PackedKernel.of(map_arrays(lax.stop_gradient, kernel))
    return lax.stop_gradient(kernel)


def _after_split(atom: int, atoms: Sequence[int]) -> list[int]:
    """Return the numbers of some atoms after one was split in two."""
    return [n + (n > atom) for n in atoms]


Value = jax.Array | KernelView
"""A value while a jaxpr is evaluated."""


def large_atoms(view: KernelView, side: str) -> tuple[int, ...]:
    """Return the atoms of a side that the view has axes for, as the factors flatten them."""
    return tuple(n for n in view.of_side(side) if view.atoms[n].size > 1)


def size_of(view: KernelView, atoms: Sequence[int]) -> int:
    """Return the product of the sizes of some atoms."""
    return math.prod(view.atoms[n].size for n in atoms)
