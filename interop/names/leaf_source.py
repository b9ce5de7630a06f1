"""`Source`: where the values of one leaf are in a torch checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Generator, Sequence

import numpy as np

from loha_jax.lowrank.hadamard import float32_or_wider
from loha_jax.lowrank.layout import Layout
from loha_jax.lowrank.row_transform import RowTransform


@dataclasses.dataclass(frozen=True)
class Source:
    """The torch tensors that a leaf holds.

    Attributes:
        keys: their names, one per index of the leaf's stack axes in row-major order (one where
            there are none).
        stack: the leaf's stack axes.
        axes: for each axis of the torch tensor the leaf's axes that it flattens, in order; () for
            an axis of size 1 that the leaf does not have.
        layout: the kernel's layout, for adapters; None where the tensor is no module's weight, or
            no layout says it.
        also: names of further tensors with the same values (a tied weight that the file stores
            twice).
        rows: how each tensor's first axis differs from the leaf's, or None.

    Example:
        >>> q = Source.of_layout(("q.weight",), Layout("ioo"))  # [in, heads, head]
        >>> q.torch_shape((6, 2, 4)), q.axes
        ((8, 6), ((1, 2), (0,)))
    """

    keys: tuple[str, ...]
    stack: tuple[int, ...] = ()
    axes: tuple[tuple[int, ...], ...] = ()
    layout: Layout | None = None
    also: tuple[str, ...] = ()
    rows: RowTransform | None = None

    @classmethod
    def of_layout(cls, keys: tuple[str, ...], layout: Layout) -> Source:
        """Return the source of a kernel whose torch weight is `[out, in, *spatial]`."""
        spatial = [(axis,) for axis in layout.axes("k")]
        return cls(keys, layout.axes("s"), (layout.axes("o"), layout.axes("i"), *spatial), layout)

    @property
    def order(self) -> tuple[int, ...]:
        """The leaf's axes in torch's order, the stack axes first."""
        return self.stack + tuple(axis for group in self.axes for axis in group)

    def torch_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of each torch tensor for a leaf of this `shape`."""
        return tuple(math.prod(shape[axis] for axis in group) for group in self.axes)

    def fits(self, shape: Sequence[int], torch_shape: Sequence[int]) -> bool:
        """Return whether a torch tensor has the shape that a leaf needs, but for axes of size 1."""
        return [n for n in self.torch_shape(shape) if n != 1] == [n for n in torch_shape if n != 1]

    def part(self, leaf: np.ndarray, index: int) -> np.ndarray:
        """Return a view of the part of `leaf` that is tensor number `index`."""
        view = leaf.transpose(self.order)
        return view[np.unravel_index(index, view.shape[: len(self.stack)])] if self.stack else view

    def tensor(self, leaf: np.ndarray, index: int = 0) -> np.ndarray:
        """Return torch tensor number `index` of a leaf."""
        tensor = self.part(leaf, index).reshape(self.torch_shape(leaf.shape))
        if self.rows is None:
            return tensor
        with self._errors(index):
            # The file may have a wider dtype than the leaf.
            wide = tensor.dtype if self.rows.scale == 1 else float32_or_wider(tensor.dtype)
            return self.rows.to_torch(tensor, dtype=wide)

    @contextlib.contextmanager
    def _errors(self, index: int) -> Generator[None]:
        """Put the tensor's name into a ValueError from the block."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self.keys[index]}: {error}") from error

    def put(self, tensor: np.ndarray, leaf: np.ndarray, index: int = 0) -> None:
        """Write torch tensor number `index` into a leaf."""
        part = self.part(leaf, index)
        if self.rows is not None:
            tensor = tensor.reshape(self.torch_shape(leaf.shape))
            with self._errors(index):
                tensor = self.rows.from_torch(tensor, dtype=leaf.dtype)
        part[...] = tensor.reshape(part.shape)


def convolution_source(
    key: str, shape: Sequence[int], torch_shape: Sequence[int], torch_oriented: bool
) -> Source | None:
    """Return the source of a convolution's kernel, whose torch tensor has as many axes, or None.

    Example:
        >>> convolution_source("c.weight", (3, 3, 6, 8), (8, 6, 3, 3), False).layout.word
        'kkio'
    """
    if len(shape) < 3 or len(torch_shape) != len(shape):
        return None
    spatial = "k" * (len(shape) - 2)
    source = Source.of_layout((key,), Layout(f"oi{spatial}" if torch_oriented else f"{spatial}io"))
    return source if source.torch_shape(shape) == tuple(torch_shape) else None


def make_source(
    keys: tuple[str, ...],
    shape: Sequence[int],
    stack: Sequence[int],
    groups: Sequence[Sequence[int]],
) -> Source:
    """Return a source from groups that lack the axes of size 1, as contents or strides tell them.

    Such an axis carries no information. Where torch's tensor has one too, they are paired as in a
    convolution (`[k…, in, out]`), else in order. A spare axis becomes a stack axis of one module.
    That is right for a scan over one layer, and for a product that keeps the axis.
    """
    groups = [tuple(group) for group in groups]
    given = {*stack, *(axis for group in groups for axis in group)}
    units = [axis for axis in range(len(shape)) if axis not in given]
    empty = [t for t, group in enumerate(groups) if not group]
    rest = [axis for axis in range(len(shape)) if axis not in stack]
    if rest and len(rest) == len(groups):
        for guess in ([rest[-1], *rest[-2:-1], *rest[:-2]], rest):
            if all(
                (axis in units) if t in empty else groups[t] == (axis,)
                for t, axis in enumerate(guess)
            ):
                groups = [(axis,) for axis in guess]
                units = []
                break
    if units:
        for t, axis in zip(empty, units, strict=False):
            groups[t] = (axis,)
        units = units[len(empty) :]
    stack = tuple(sorted((*stack, *units)))
    is_weight = all(key.rpartition(".")[2] == "weight" for key in keys)
    return Source(
        keys, stack, tuple(groups), _layout(len(shape), stack, groups) if is_weight else None
    )


def _layout(ndim: int, stack: Sequence[int], groups: Sequence[Sequence[int]]) -> Layout | None:
    if len(groups) < 2 or not all(groups) or any(len(group) > 1 for group in groups[2:]):
        return None
    kinds = {"s": stack, "o": groups[0], "i": groups[1], "k": [group[0] for group in groups[2:]]}
    letters = [""] * ndim
    for kind, axes in kinds.items():
        in_order = list(axes) == sorted(axes)
        for n, axis in enumerate(axes):
            letters[axis] = kind if in_order else f"{kind}{n}"
    return Layout("".join(letters))
