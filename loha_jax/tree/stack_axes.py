"""Where the stack axes of a kernel and of its factors are, after a scan or a vmap.

`Factors` have their stack axes in front. Where factors are kept beside a kernel (a Flax model), a
scan over axis 1 of the kernel takes axis 1 of each factor, so that is where the stack axis has to
be. This module alone knows where the axes are: it brings them to the front, and back.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from loha_jax.lowrank.layout import Layout
from loha_jax.tree.factors import Factors, module_index
from loha_jax.tree.leaves import LoHaWeight

T = TypeVar("T")


class StackPlaces(NamedTuple):
    """The places of the stack axes in a kernel, and in the arrays beside it.

    Attributes:
        layout: of the kernel.
        from_end: an array has its stack axes as far from its last axis as the kernel has them, and
            not from its first. A scan over a negative axis needs that.
    """

    layout: Layout
    from_end: bool = False

    def of_array(self, ndim: int) -> tuple[int, ...]:
        """Return the places in an array with this number of axes, in the order of the stack.

        Where the kernel's places do not exist in the array, they are counted from the end. Where
        those do not exist either, the stack axes are in front.
        """
        front, missing = self.layout.axes("s"), self.layout.ndim - ndim
        end = tuple(axis - missing for axis in front)
        in_order = (end, front) if self.from_end else (front, end)
        for places in (*in_order, tuple(range(len(front)))):
            if all(0 <= axis < ndim for axis in places):
                return places
        raise ValueError(f"An array of {ndim} axes has no place for the stack of {self.layout}")

    def stack_first(self, ndim: int) -> tuple[int, ...]:
        """Return the axes of an array, those of the stack first."""
        places = self.of_array(ndim)
        return (*places, *(axis for axis in range(ndim) if axis not in places))

    def order(self, ndim: int) -> tuple[int, ...]:
        """Return for each axis of an array its place where the stack axes are in front."""
        axes = self.stack_first(ndim)
        return tuple(sorted(range(ndim), key=axes.__getitem__))

    def to_front(self, array: Any) -> Any:
        """Return an array with its stack axes in front."""
        return transposed(array, self.stack_first(len(array.shape)))

    def from_front(self, array: Any) -> Any:
        """Return an array with its stack axes in their places, the inverse of `to_front`."""
        return transposed(array, self.order(len(array.shape)))


def transposed(array: Any, order: Sequence[int]) -> Any:
    """Return an array, or a shape, with its axes in another order; as it is if they stay."""
    if tuple(order) == tuple(range(len(order))):
        return array
    if not isinstance(array, jax.ShapeDtypeStruct):
        return jnp.transpose(array, order)
    place = array.sharding
    if isinstance(place, NamedSharding):
        spec = (*place.spec, *(None,) * (len(order) - len(place.spec)))
        place = NamedSharding(place.mesh, PartitionSpec(*(spec[axis] for axis in order)))
    shape = tuple(array.shape[axis] for axis in order)
    return jax.ShapeDtypeStruct(shape, array.dtype, sharding=place)


class _Reading(NamedTuple):
    """One way to understand the axes of a kernel and of its factors.

    Attributes:
        places: where the stack axes are now.
        added: the axes of the kernel that are new.
        layout: of the leaf; axes that were taken away are in front, as `Layout.strip` has it.
    """

    places: StackPlaces
    added: tuple[int, ...]
    layout: Layout

    @property
    def is_in_front(self) -> bool:
        """True if the new axes are the first ones, counted from the first."""
        return self.added == tuple(range(len(self.added))) != () and not self.places.from_end


def with_stack_in_front(
    leaf: LoHaWeight, *, from_end: bool = False, axis: int | None = None
) -> tuple[LoHaWeight, StackPlaces]:
    """Return a leaf whose factors have their stack axes in front, and where they were.

    The kernel may have more or fewer axes than its layout says: those that a scan or vmap has added
    or taken away since the adapter was made. Their places follow from the shapes of the kernel and
    of the factors. Added axes become stack axes.

    Args:
        leaf: the arrays of its factors are as they are kept beside the kernel.
        from_end: see `StackPlaces`; known if no axis has been added or taken away.
        axis: an axis of the kernel that was added, if the model says so. It is negative for a scan
            over a negative axis.

    Raises:
        ValueError: the shapes fit no place of the axes, or several.
    """
    change = len(leaf.kernel.shape) - leaf.layout.ndim
    if change == 0:
        places = StackPlaces(leaf.layout, from_end)
        return _arranged(leaf, _Reading(places, (), leaf.layout)), places
    fitting = [reading for reading in _readings(leaf, change, from_end) if _fits(leaf, reading)]
    if change > 0 and axis is not None:
        added = axis % len(leaf.kernel.shape)
        fitting = [
            reading
            for reading in fitting
            if added in reading.added and (axis >= 0 or reading.places.from_end)
        ]
    # In front is where vmap and scan put them by default. What fits there is no scan over a
    # negative axis, unless the model says so.
    if any(reading.is_in_front for reading in fitting):
        fitting = [reading for reading in fitting if not reading.places.from_end]
    results = {_meaning(leaf, reading): reading for reading in reversed(fitting)}
    if len(results) != 1:
        raise _unclear(leaf, [reading.places.layout.word for reading in results.values()])
    (reading,) = results.values()
    return _arranged(leaf, reading), reading.places


def _readings(leaf: LoHaWeight, change: int, from_end: bool) -> Iterator[_Reading]:
    ndim = len(leaf.kernel.shape)
    if change > 0:
        for added in itertools.combinations(range(ndim), change):
            layout = leaf.layout.with_stack(added)
            # A factor has two axes besides its stack; further places are only known from the end.
            stack = layout.axes("s")
            for end in (False, True) if max(stack) < len(stack) + 2 else (True,):
                yield _Reading(StackPlaces(layout, end), added, layout)
        return
    for taken in itertools.combinations(leaf.layout.axes("s"), -change):
        layout = leaf.layout.in_front(taken)
        yield _Reading(StackPlaces(layout.strip(ndim), from_end), (), layout)


def _fits(leaf: LoHaWeight, reading: _Reading) -> bool:
    """Return whether the shapes of the factors are those of the kernel's adapter."""
    places, shape = reading.places, tuple(leaf.kernel.shape)
    sizes = places.layout.torch_shape(shape)
    count = len(places.layout.axes("s"))
    stack, (out, in_, *spatial) = sizes[:count], sizes[count:]
    for factors in leaf.adapters.values():
        shapes = [tuple(x.shape) for x in (factors.hada_w1_a, factors.hada_w1_b)]
        if any(len(own) != count + 2 for own in shapes):
            return False
        axes = places.stack_first(count + 2)
        a, b = (tuple(own[axis] for axis in axes) for own in shapes)
        rank = b[count]
        if factors.is_cp:
            expected = (*stack, rank, out), (*stack, rank, in_)
        else:
            expected = (*stack, out, rank), (*stack, rank, in_ * math.prod(spatial))
        if (a, b) != expected:
            return False
    return True


def _meaning(leaf: LoHaWeight, reading: _Reading) -> tuple[object, ...]:
    """Return what sets a reading apart from others: equal readings give equal leaves."""
    modules = tuple(
        (_per_module(f.ranks, leaf, reading), _per_module(f.alphas, leaf, reading))
        for f in leaf.adapters.values()
    )
    stack = len(reading.places.layout.axes("s"))
    return reading.layout.word, reading.places.of_array(stack + 2), modules


def _per_module(values: tuple[T, ...], leaf: LoHaWeight, reading: _Reading) -> tuple[T, ...]:
    """Return values per module of the old stack as values per module of the new one."""
    if not reading.added:
        return values
    axes, shape = reading.layout.axes("s"), leaf.kernel.shape
    old = [1 if axis in reading.added else shape[axis] for axis in axes]
    array = np.empty(len(values), object)
    array[:] = values
    return tuple(np.broadcast_to(array.reshape(old), [shape[axis] for axis in axes]).ravel())


def _arranged(leaf: LoHaWeight, reading: _Reading) -> LoHaWeight:
    """Return a leaf as a reading has it."""

    def arranged(factors: Factors) -> Factors:
        arrays = {
            name: reading.places.to_front(x)
            for name, x in factors.arrays.items()
            if not (reading.added and name == "module_index")  # made anew
        }
        if not reading.added:
            same = all(x is arrays[name] for name, x in factors.arrays.items())
            return factors if same else dataclasses.replace(factors, **arrays)
        ranks = _per_module(factors.ranks, leaf, reading)
        alphas = _per_module(factors.alphas, leaf, reading)
        stack = reading.layout.sizes("s", leaf.kernel.shape)
        arrays["module_index"] = module_index(ranks, alphas, stack)
        return dataclasses.replace(factors, ranks=ranks, alphas=alphas, base=None, **arrays)

    names = _per_module(leaf.names, leaf, reading)
    adapters = {name: arranged(factors) for name, factors in leaf.adapters.items()}
    return dataclasses.replace(leaf, adapters=adapters, layout=reading.layout, names=names)


def _unclear(leaf: LoHaWeight, words: Sequence[str]) -> ValueError:
    factors = next(iter(leaf.adapters.values()))
    shapes = [tuple(x.shape) for x in (factors.hada_w1_a, factors.hada_w1_b)]
    what = (
        f"The kernel of {leaf.label or 'a module'} has the shape {tuple(leaf.kernel.shape)} and "
        f"its factors {shapes[0]} and {shapes[1]}; its adapter was made for the layout "
        f"{leaf.layout.word!r}."
    )
    if words:
        return ValueError(
            f"{what} The axes fit the layouts {', '.join(map(repr, dict.fromkeys(words)))}, for a "
            "scan over a positive or a negative axis. Say over which axis of the kernel the layers "
            "are scanned: variable.set_metadata(param_scan_axis=…)."
        )
    return ValueError(
        f"{what} They fit no place of the axes that a scan or vmap has added or taken away. Scan "
        "the kernel and its factors (nnx.LoRAParam) over the same axis."
    )
