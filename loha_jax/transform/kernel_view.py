"""`KernelView`: an adapted kernel as it looks at one point of a traced function.

A model rarely multiplies with the kernel as it is stored: it is transposed, reshaped, sliced, cast, or one layer is
taken from a stack. A view follows these without forming ΔW. Each axis of the kernel is made of *atoms*, indivisible
runs of stack, in, out or spatial positions; structural operations permute, group, split and cut atoms, and the factors
follow.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from loha_jax.lowrank.hadamard import float32_or_wider, hada_weight, multiply_core
from loha_jax.lowrank.weight_decomposition import is_on_out, on_flat
from loha_jax.runtime.sizes import is_empty, is_known
from loha_jax.tree.leaves import Factors, LoHaWeight


@dataclasses.dataclass(frozen=True)
class Atom:
    """A run of positions along one axis of the stored kernel.

    Attributes:
        kind: "s" (stack), "i" (in), "o" (out), "k" (spatial), "b" (added by broadcasting), "?" (not known yet: layout
            inference).
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
        w1_b, w2_b: `[*s, r, in·prod(spatial)]`, or `[*s, r, in]` beside cores.
        t1, t2: cores `[*s, r, r, prod(spatial)]` of a convolution in CP form, or None.
        scaling: `[*s]`.
        out_gain, in_gain: of a weight decomposition, what the base weight is to be multiplied by and added:
            `[*s, out, 1]` or `[*s, 1, in]`; or None. The factors hold their own share of it.
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

    @property
    def without_gain(self) -> ViewFactors:
        """What of it is ΔW."""
        return dataclasses.replace(self, out_gain=None, in_gain=None)

    @property
    def r(self) -> int:
        """The rank of both factors."""
        return self.w1_a.shape[-1]

    @property
    def dtype(self) -> jnp.dtype:
        """What the factors' products are computed in: float32 or better."""
        return float32_or_wider(self.w1_a.dtype)

    def astype(self, dtype: Any) -> ViewFactors:
        """All arrays in another dtype."""
        return jax.tree.map(lambda w: w.astype(dtype), self)

    def flat(self) -> ViewFactors:
        """The same update without cores: they multiply into w*_b, exactly and at the same rank."""
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
        atoms: all atoms; those of one kind stand in the order in which PEFT's tensors flatten them.
        dims: for each axis of `kernel`, the atoms (of size > 1) it is made of, outermost first.
        name: the module's name, for reports; empty where none is made, so that equal layers share traces.
    """

    kernel: Any
    factors: tuple[ViewFactors, ...]
    atoms: tuple[Atom, ...] = dataclasses.field(metadata={"static": True})
    dims: tuple[tuple[int, ...], ...] = dataclasses.field(metadata={"static": True})
    name: str = dataclasses.field(default="", metadata={"static": True})

    @classmethod
    def of(cls, leaf: LoHaWeight, name: str = "") -> KernelView:
        """The view of a leaf as it is stored."""
        layout = leaf.layout.strip(leaf.kernel.ndim)
        shape = leaf.kernel.shape
        order = layout.order
        kinds = {axis: kind for kind in "soik" for axis in layout.axes(kind)}
        atoms = tuple(Atom(kinds[axis], shape[axis], axis) for axis in order)
        dims = tuple((order.index(axis),) if shape[axis] > 1 else () for axis in range(layout.ndim))

        stack = layout.sizes("s", shape)

        kernel = lax.stop_gradient(leaf.kernel)

        def view_factors(f: Factors) -> ViewFactors:
            a1, a2, t1, t2 = f.hada_w1_a, f.hada_w2_a, f.hada_t1, f.hada_t2
            if f.is_cp:
                a1, a2 = jnp.swapaxes(a1, -1, -2), jnp.swapaxes(a2, -1, -2)
                r = a1.shape[-1]
                t1, t2 = t1.reshape(*stack, r, r, -1), t2.reshape(*stack, r, r, -1)
            view = ViewFactors(a1, f.hada_w1_b, a2, f.hada_w2_b, t1, t2, f.scale)
            if (gains := f.gains(kernel, layout)) is None:
                return view
            own, base = gains
            if is_on_out(base.shape, layout.torch_shape(shape), len(stack)):
                rows = (*base.shape[: len(stack) + 1], 1)
                return dataclasses.replace(view, w1_a=a1 * own.reshape(rows), out_gain=base.reshape(rows))
            columns = (*stack, 1, base.shape[len(stack) + 1])
            own = own.reshape(columns) if f.is_cp else on_flat(own, len(stack), layout.sizes("k", shape))
            return dataclasses.replace(view, w1_b=f.hada_w1_b * own, in_gain=base.reshape(columns))

        factors = tuple(view_factors(f) for f in leaf.active_adapters)
        return cls(kernel, factors, atoms, dims, name)

    @classmethod
    def unknown(cls, kernel: Any, name: str) -> KernelView:
        """The view of a plain array whose layout is to be inferred."""
        atoms = tuple(Atom("?", size, axis) for axis, size in enumerate(kernel.shape))
        return cls(kernel, (), atoms, tuple((n,) if atom.size > 1 else () for n, atom in enumerate(atoms)), name)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the view."""
        return self.kernel.shape

    @property
    def shapes(self) -> KernelView:
        """The view with a `jax.ShapeDtypeStruct` for each array: differentiation rules outlive the trace of those."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self)

    def of_kind(self, kind: str) -> list[int]:
        """The atoms of one kind, in flattening order."""
        return [n for n, atom in enumerate(self.atoms) if atom.kind == kind]

    def of_side(self, side: str) -> list[int]:
        """The atoms of the factors' in or out side, as they flatten: spatial atoms follow the in ones."""
        return self.of_kind("i") + self.of_kind("k") if side == "i" else self.of_kind(side)

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """Sizes of the stack atoms: the leading axes of the factors."""
        return tuple(self.atoms[n].size for n in self.of_kind("s"))

    # --- structural operations: each returns the new view, or None where a view cannot follow -------------------------

    def transpose(self, permutation: Sequence[int]) -> KernelView:
        """`lax.transpose`."""
        dims = tuple(self.dims[axis] for axis in permutation)
        return dataclasses.replace(self, kernel=lax.transpose(self.kernel, permutation), dims=dims)

    def convert(self, dtype: Any) -> KernelView | None:
        """`lax.convert_element_type`; the factors keep their dtype."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return None
        return dataclasses.replace(self, kernel=lax.convert_element_type(self.kernel, dtype))

    def squeeze(self, dimensions: Sequence[int]) -> KernelView:
        """`lax.squeeze`."""
        dims = tuple(atoms for axis, atoms in enumerate(self.dims) if axis not in dimensions)
        return dataclasses.replace(self, kernel=lax.squeeze(self.kernel, dimensions), dims=dims)

    def broadcast_in_dim(self, shape: Sequence[int], broadcast_dimensions: Sequence[int]) -> KernelView | None:
        """`lax.broadcast_in_dim`: new axes, and axes of size 1 that grow, hold atoms of kind "b"."""
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
        kernel = lax.broadcast_in_dim(self.kernel, shape, broadcast_dimensions)
        return dataclasses.replace(self, kernel=kernel, atoms=tuple(atoms), dims=tuple(dims))

    def reshape(self, shape: Sequence[int]) -> KernelView | None:
        """`lax.reshape`: regroups atoms, splitting those that a new axis ends within."""
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
        return dataclasses.replace(view, kernel=lax.reshape(self.kernel, shape), dims=tuple(dims))

    def slice(self, starts: Sequence[int], limits: Sequence[int], strides: Sequence[int] | None) -> KernelView | None:
        """`lax.slice`."""
        strides = strides or (1,) * len(starts)
        view = self
        for axis, (start, limit, stride) in enumerate(zip(starts, limits, strides, strict=True)):
            if (start, limit, stride) == (0, self.shape[axis], 1):
                continue
            cut = view.cut(axis, lambda x, at, a=start, b=limit, c=stride: lax.slice_in_dim(x, a, b, c, at))
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
            cut = view.cut(axis, lambda x, at, a=start, n=size: lax.dynamic_slice_in_dim(x, a, n, at))
            if cut is None:
                return None
            view = cut
        return view

    def scaled(self, factor: Any, operation: Callable[[Any, Any], Any]) -> KernelView:
        """The kernel multiplied or divided by a scalar."""
        factors = tuple(dataclasses.replace(f, scaling=operation(f.scaling, factor)) for f in self.factors)
        return dataclasses.replace(self, kernel=operation(self.kernel, factor), factors=factors)

    def rev(self, dimensions: Sequence[int]) -> KernelView:
        """`lax.rev`."""
        view = dataclasses.replace(self, kernel=lax.rev(self.kernel, dimensions))
        for atom in (n for axis in dimensions for n in self.dims[axis]):
            view = view._map_atom(atom, lambda x, at: lax.rev(x, (at,)), self.atoms[atom].size)
        return view

    def flat(self) -> KernelView:
        """The same view with flat factors only."""
        return dataclasses.replace(self, factors=tuple(f.flat() for f in self.factors))

    def map_kernel(self, operation: Callable[[Any], Any]) -> KernelView:
        """An operation on the kernel that changes neither values nor axes (a copy, a sharding constraint)."""
        return dataclasses.replace(self, kernel=operation(self.kernel))

    def cut(self, axis: int, operation: Callable[[Any, int], Any]) -> KernelView | None:
        """Applies `operation(array, axis)`, which changes the positions along an axis, to the kernel and its factors.

        None where the axis is made of several atoms, whose positions cannot be told apart, or nothing is left.
        """
        if len(self.dims[axis]) != 1:
            return None
        (atom,) = self.dims[axis]
        kernel = operation(self.kernel, axis)
        if is_empty(kernel.shape):
            return None
        view = self._map_atom(atom, operation, kernel.shape[axis])
        dims = list(view.dims)
        if kernel.shape[axis] == 1:
            dims[axis] = ()
        return dataclasses.replace(view, kernel=kernel, dims=tuple(dims))

    def take_leading(self) -> tuple[int | None, KernelView] | None:
        """Prepares the view to be scanned over its leading axis.

        Returns:
            The atom that the scan takes away (None for an axis of size 1, which no atom stands for) and the view with
            that atom's axis first in every factor; or None where the leading axis is an in or out axis.
        """
        if not self.dims[0]:
            return None, self
        (atom, *more) = self.dims[0]
        if more or self.atoms[atom].kind not in "sb?":
            return None
        if self.atoms[atom].kind != "s":
            return atom, self
        at = self.of_kind("s").index(atom)
        factors = jax.tree.map(lambda x: jnp.moveaxis(x, at, 0), self.factors)
        return atom, dataclasses.replace(self, factors=factors)

    def without_leading(self, atom: int | None) -> KernelView:
        """The view inside the scan: the leading axis and its atom are gone."""
        if atom is None:
            return dataclasses.replace(self, dims=self.dims[1:])
        dims = tuple(tuple(n - (n > atom) for n in d) for d in self.dims[1:])
        return dataclasses.replace(self, atoms=self.atoms[:atom] + self.atoms[atom + 1 :], dims=dims)

    def split(self, spec: Sequence[Any], mesh_shape: Mapping[str, int]) -> tuple[KernelView, KernelView] | None:
        """Prepares the view to be split over the devices of a `shard_map`.

        Args:
            spec: per axis of the kernel the mesh axes that it is split over; missing ones are None.
            mesh_shape: sizes of the mesh axes.

        Returns:
            The view with a `PartitionSpec` for every array, and the view of one shard, whose arrays are to be filled
            in; or None where a shard of the kernel is not made from blocks of the factors.
        """
        atoms, split = list(self.atoms), {}
        for dims, axes in zip(self.dims, spec, strict=False):  # axes that the spec leaves out are not split
            count = math.prod(mesh_shape[name] for name in (axes if isinstance(axes, tuple) else (axes,)) if name)
            if count == 1:
                continue
            if not dims or atoms[dims[0]].size % count:
                return None
            split[dims[0]] = axes
            atoms[dims[0]] = dataclasses.replace(atoms[dims[0]], size=atoms[dims[0]].size // count)
        sides = {side: [n for n in self.of_side(side) if self.atoms[n].size > 1] for side in "oi"}
        if any(n in split for side in sides.values() for n in side[1:]):
            return None
        stack = tuple(split.get(n) for n in self.of_kind("s"))

        def outermost(side: str) -> Any:
            return split.get(sides[side][0]) if sides[side] else None

        def specs(f: ViewFactors) -> ViewFactors:
            out, in_ = outermost("o"), outermost("i")
            by_name = {
                **dict.fromkeys(("w1_a", "w2_a", "out_gain"), (*stack, out, None)),
                **dict.fromkeys(("w1_b", "w2_b", "in_gain"), (*stack, None, in_)),
                **dict.fromkeys(("t1", "t2", "scaling"), stack),
            }
            held = {name: axes for name, axes in by_name.items() if getattr(f, name) is not None}
            return dataclasses.replace(f, **{name: PartitionSpec(*axes) for name, axes in held.items()})

        own = PartitionSpec(*spec)
        shard = dataclasses.replace(
            self, atoms=tuple(atoms), dims=tuple(tuple(n for n in d if atoms[n].size > 1) for d in self.dims)
        )
        factors = tuple(specs(f) for f in self.factors)
        return dataclasses.replace(self, kernel=own, factors=factors), shard

    # --- values -------------------------------------------------------------------------------------------------------

    def dense(self, *, forward_mode: bool = False) -> jax.Array:
        """The view as a plain array: base plus ΔW, in the base's dtype, added in float32 or better."""
        if not self.factors:
            return self.kernel
        present = [n for d in self.dims for n in d]
        # ΔW is built in the orientation of the view, to be transposed as little as possible.
        sides = "sio" if [self.atoms[n].kind for n in present if self.atoms[n].kind in "io"][:1] == ["i"] else "soi"
        atoms = [n for side in sides for n in self.of_side(side) if self.atoms[n].size > 1]
        total = None
        for f in self.factors:
            f = f.flat().astype(f.dtype)
            a1, b1, a2, b2 = f.w1_a, f.w1_b, f.w2_a, f.w2_b
            if sides == "sio":
                a1, b1, a2, b2 = (jnp.swapaxes(w, -1, -2) for w in (b1, a1, b2, a2))
            delta = hada_weight(a1, b1, a2, b2, f.scaling, forward_mode=forward_mode)
            total = delta if total is None else total + delta
        assert total is not None
        total = total.reshape([self.atoms[n].size for n in atoms])
        total = jnp.transpose(total, [atoms.index(n) for n in present if self.atoms[n].kind != "b"])
        total = total.reshape([1 if self.atoms[n].kind == "b" else self.atoms[n].size for n in present])
        total = jnp.broadcast_to(total, [self.atoms[n].size for n in present]).reshape(self.shape)
        wide = float32_or_wider(self.kernel.dtype, total.dtype)
        kernel = self.kernel.astype(wide)
        for side in "oi":
            if (gain := self.gain(side)) is not None:
                total = total + gain.astype(wide) * self.kernel.astype(wide)
        return (kernel + total.astype(wide)).astype(self.kernel.dtype)

    def gain(self, side: str) -> jax.Array | None:
        """What weight decompositions add to the base weight, as a multiple of it along the out or in axes.

        Returns:
            An array that broadcasts against the view, of size 1 along its other axes; None without such adapters.
        """
        gains = [g for f in self.factors if (g := f.out_gain if side == "o" else f.in_gain) is not None]
        if not gains:
            return None
        own = [n for n in (*self.of_kind("s"), *self.of_kind(side)) if self.atoms[n].size > 1]
        present = [n for d in self.dims for n in d]
        total = functools.reduce(jnp.add, gains).reshape([self.atoms[n].size for n in own])
        total = jnp.transpose(total, [own.index(n) for n in present if n in own])
        sizes = [self.atoms[n].size for n in present]
        total = total.reshape([size if n in own else 1 for n, size in zip(present, sizes, strict=True)])
        mixed = [d for d in self.dims if set(d) & set(own) and set(d) - set(own)]
        whole = {n for d in mixed for n in d}
        shape = [s if n in own or n in whole else 1 for n, s in zip(present, sizes, strict=True)]
        total = jnp.broadcast_to(total, shape)
        return total.reshape([math.prod(self.atoms[n].size for n in d) if set(d) & set(own) else 1 for d in self.dims])

    @property
    def has_gain(self) -> bool:
        """Whether an adapter decomposes the weight."""
        return any(f.out_gain is not None or f.in_gain is not None for f in self.factors)

    def without_gain(self) -> KernelView:
        """The view of W + ΔW."""
        return dataclasses.replace(self, factors=tuple(f.without_gain for f in self.factors))

    def rows(self, axis: int, gather: Callable[[Any], Any], *, forward_mode: bool) -> jax.Array | None:
        """ΔW at some positions of one in or out axis (an embedding lookup): only the rows that are read are formed.

        Args:
            axis: of the view.
            gather: takes those positions from axis 0 of a matrix: `[n, r]` to `[*positions, r]`.
            forward_mode: plain products that `jax.jvp` can differentiate.

        Returns:
            `[*positions, *other axes]`, or None where the view has stack axes or the axis is not all of in or out.
        """
        plain = not (self.of_kind("s") or self.of_kind("b") or self.of_kind("k") or self.has_gain)
        if not plain or len(self.dims[axis]) != 1:
            return None
        (atom,) = self.dims[axis]
        kind = self.atoms[atom].kind
        if any(self.atoms[n].size > 1 for n in self.of_kind(kind) if n != atom):
            return None
        others = [n for n in self.of_kind("i" if kind == "o" else "o") if self.atoms[n].size > 1]
        total, positions = None, ()
        for f in self.factors:
            tables, whole = (f.w1_a, f.w2_a), (f.w1_b, f.w2_b)
            if kind == "i":
                tables, whole = tuple(x.T for x in whole), tuple(x.T for x in tables)
            rows = [gather(table) for table in tables]
            positions = rows[0].shape[:-1]
            flat = [row.reshape(-1, row.shape[-1]) for row in rows]
            delta = hada_weight(flat[0], whole[0], flat[1], whole[1], f.scaling, forward_mode=forward_mode)
            total = delta if total is None else total + delta
        assert total is not None
        total = total.reshape(-1, *(self.atoms[n].size for n in others))
        rest = [d for n, d in enumerate(self.dims) if n != axis]
        total = jnp.transpose(total, [0, *(1 + others.index(n) for d in rest for n in d)])
        return total.reshape(*positions, *(size for n, size in enumerate(self.shape) if n != axis))

    # --- atoms --------------------------------------------------------------------------------------------------------

    def _map_atom(self, atom: int, operation: Callable[[Any, int], Any], size: int) -> KernelView:
        """Applies an operation to the axis of one atom in every factor that has it."""
        kind = self.atoms[atom].kind
        stack = self.stack_shape

        def mapped(x: jax.Array, axis: int, side: list[int]) -> jax.Array:
            """`operation` on the atom's axis, where `axis` of x is made of the atoms of `side`."""
            inner = [self.atoms[n].size for n in side]
            y = operation(x.reshape(*x.shape[:axis], *inner, *x.shape[axis + 1 :]), axis + side.index(atom))
            return y.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])

        def change(f: ViewFactors) -> ViewFactors:
            if kind == "s":
                return jax.tree.map(lambda x: operation(x, self.of_kind("s").index(atom)), f)
            if kind == "o":
                names, axis, side = ("w1_a", "w2_a"), len(stack), self.of_kind("o")
            elif kind == "k" and f.t1 is not None:
                names, axis, side = ("t1", "t2"), len(stack) + 2, self.of_kind("k")
            else:
                names, axis = ("w1_b", "w2_b"), len(stack) + 1
                side = self.of_kind("i") if f.t1 is not None else self.of_side("i")
            changed = {name: mapped(getattr(f, name), axis, side) for name in names}
            if kind == "o" and f.out_gain is not None:
                changed["out_gain"] = mapped(f.out_gain, axis, side)
            if kind == "i" and f.in_gain is not None:
                changed["in_gain"] = mapped(f.in_gain, len(stack) + 1, self.of_kind("i"))
            return dataclasses.replace(f, **changed)

        factors = self.factors if kind in "b?" else tuple(change(f) for f in self.factors)
        atoms = list(self.atoms)
        atoms[atom] = dataclasses.replace(atoms[atom], size=size)
        return dataclasses.replace(self, factors=factors, atoms=tuple(atoms))

    def _split(self, atom: int, outer: int) -> KernelView:
        """Splits an atom in two that stand one after the other; `dims` is left to the caller."""
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
            factors = jax.tree.map(lambda x: x.reshape(*x.shape[:at], outer, inner, *x.shape[at + 1 :]), factors)
        return dataclasses.replace(self, factors=factors, atoms=tuple(atoms))


def size_of(view: KernelView, atoms: Sequence[int]) -> int:
    """Product of the sizes of some atoms."""
    return math.prod(view.atoms[n].size for n in atoms)
