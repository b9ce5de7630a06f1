"""`RowTransform`: how the rows of a torch tensor follow from those of a JAX parameter."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from loha_jax.runtime.scalars import plain_scalar


@dataclasses.dataclass(frozen=True, repr=False)
class RowTransform:
    """A permutation of a parameter's output rows, and a number that multiplies them.

    Row `n` of the torch tensor is row `permutation[n]` of the JAX parameter, times `scale`. Rows
    are the output features, the first axis of a torch weight or bias.

    A permutation that is shorter than the parameter is applied to each block of its length: that of
    one head permutes every head. Permutations are exact. So is a scale that is a power of two;
    another one rounds once, in float32 or wider. ΔW follows the same rule as W.

    Args:
        permutation: each of `range(n)` once, or None.
        scale: finite and not 0.

    Raises:
        TypeError: the permutation holds something other than integers, or scale is no number.
        ValueError: it is no permutation, or scale is 0 or not finite.

    Example:
        >>> rows = RowTransform([1, 0], scale=2)
        >>> rows.to_torch(np.array([1.0, 2.0, 3.0, 4.0]))
        array([4., 2., 8., 6.])
        >>> rows.from_torch(np.array([4.0, 2.0, 8.0, 6.0]))
        array([1., 2., 3., 4.])
    """

    permutation: Sequence[int] | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        scale = plain_scalar(self.scale)
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            raise TypeError(f"`scale` is a number, got {self.scale!r}")
        if not math.isfinite(scale) or scale == 0:
            raise ValueError(f"`scale` is finite and not 0, got {scale!r}")
        order = None if self.permutation is None else tuple(map(operator.index, self.permutation))
        if order is not None:
            _check_permutation(order)
        object.__setattr__(self, "permutation", order)
        object.__setattr__(self, "scale", float(scale))

    @classmethod
    def rotary(cls, head_dim: int, scale: float = 1.0) -> RowTransform:
        """Return the transform of a projection whose heads interleave the halves of rotary pairs.

        Rotary embeddings rotate pairs of features. Hugging Face's models pair feature `i` with `i +
        head_dim/2`, those of MaxText's Llama and of Meta `2i` with `2i + 1`.

        Args:
            head_dim: of one head, whatever their number.
            scale: of the rows. MaxText divides its query by √head_dim, so it is `head_dim**0.5`
                there, and 1 for its key.

        Raises:
            ValueError: `head_dim` is not positive and even.

        Example:
            >>> RowTransform.rotary(6).permutation
            (0, 2, 4, 1, 3, 5)
        """
        size = operator.index(head_dim)
        if size <= 0 or size % 2:
            raise ValueError(f"`head_dim` is positive and even, got {head_dim!r}")
        return cls((*range(0, size, 2), *range(1, size, 2)), scale)

    def __repr__(self) -> str:
        order = self.permutation
        shown = order if order is None or len(order) <= 8 else f"<{len(order)} rows>"
        return f"RowTransform({shown}, scale={self.scale:g})"

    @property
    def unscaled(self) -> RowTransform:
        """The permutation without the scale."""
        return RowTransform(self.permutation)

    @property
    def of_norms(self) -> RowTransform:
        """The transform of the rows' norms, whose scale is positive."""
        return RowTransform(self.permutation, abs(self.scale))

    def problem(self, sizes: Sequence[int]) -> str | None:
        """Return why this does not fit a parameter with these output axes, or None.

        Args:
            sizes: in flattening order. A permutation may not end within an axis, such as that of a
                head, unless it is the only one.
        """
        size, rows = len(self.permutation or ()), math.prod(sizes)
        whole = [math.prod(sizes[n:]) for n in range(len(sizes))]
        if not size or size in whole or (len(sizes) < 2 and rows % size == 0):
            return None
        shown = f"{rows} = {' x '.join(map(str, sizes))}" if len(sizes) > 1 else f"{rows}"
        return (
            f"its transform permutes blocks of {size} rows, and it has {shown}. Give the "
            "permutation of all rows, or of one head"
        )

    def to_torch(
        self, leaf: np.ndarray, axis: int = 0, dtype: DTypeLike | None = None
    ) -> np.ndarray:
        """Return an array of the JAX parameter's rows as torch has them.

        Args:
            leaf: with its output features flattened.
            axis: of the output features.
            dtype: of the result; the array's own by default.

        Raises:
            ValueError: the size of the axis does not fit, a value becomes too large, or there is a
                scale, and the result's dtype is none of 16 or more floating bits.
        """
        leaf = np.asarray(leaf)
        index = self._index(leaf.shape[axis])
        return self._scaled(leaf if index is None else np.take(leaf, index, axis), False, dtype)

    def from_torch(
        self, tensor: np.ndarray, axis: int = 0, dtype: DTypeLike | None = None
    ) -> np.ndarray:
        """Return an array of torch's rows as the JAX parameter has them; see `to_torch`."""
        tensor = np.asarray(tensor)
        index = self._index(tensor.shape[axis])
        moved = tensor if index is None else np.take(tensor, np.argsort(index), axis)
        return self._scaled(moved, True, dtype)

    def _scaled(self, array: np.ndarray, inverse: bool, dtype: DTypeLike | None) -> np.ndarray:
        """Return an array times the scale, or divided by it, rounded once from float64."""
        result = np.dtype(array.dtype if dtype is None else dtype)
        if self.scale == 1:
            return array.astype(result, copy=False)
        if not jnp.issubdtype(result, jnp.floating) or result.itemsize < 2:
            raise ValueError(f"its transform scales by {self.scale:g}, which does not fit {result}")
        wide = array.astype(np.float64)
        wide = wide / self.scale if inverse else wide * self.scale
        with np.errstate(over="ignore"):
            rounded = wide if result == np.float64 else wide.astype(np.float32).astype(result)
        if not np.isfinite(rounded).all() and np.isfinite(wide).all():
            raise ValueError(f"scaled by its transform, a value is too large for {result}")
        return rounded

    def _index(self, rows: int) -> np.ndarray | None:
        """Return the permutation of all rows, or None."""
        if (order := self.permutation) is None:
            return None
        if problem := self.problem((rows,)):
            raise ValueError(problem)
        return np.arange(rows).reshape(-1, len(order))[:, list(order)].reshape(-1)


def _check_permutation(order: tuple[int, ...]) -> None:
    """Raise ValueError for integers that are no permutation."""
    if not order:
        raise ValueError("`permutation` is empty; leave it out to keep the order of rows")
    if sorted(order) != list(range(len(order))):
        shown = f"{', '.join(map(str, order[:8]))}{', …' if len(order) > 8 else ''}"
        raise ValueError(
            f"`permutation` holds each of 0 … {len(order) - 1} once, got {len(order)} numbers: "
            f"{shown}"
        )
