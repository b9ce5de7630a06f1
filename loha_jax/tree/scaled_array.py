"""`ScaledArray`: a kernel as narrow values and their scale."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from loha_jax.tree.quantised_types import register_quantised, rounded, spread


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ScaledArray:
    """A quantised kernel: `values * scale`, for a tree that holds the two side by side.

    Attributes:
        values: integers or float8, in the kernel's shape.
        scale: with as many axes; along each it is as long as the values, of length 1, or a divisor
            of their length (blocks of equal size).
        dtype: of the kernel as it is computed with; the scale's by default.

    Raises:
        ValueError: the scale does not fit the values.

    Example:
        >>> kernel = ScaledArray(jnp.full((4, 2), 3, jnp.int8), jnp.array([[0.5, 2.0]]))
        >>> import loha_jax
        >>> loha_jax.dequantise({"q": {"kernel": kernel}})["q"]["kernel"].tolist()[0]
        [1.5, 6.0]
    """

    values: Any
    scale: Any
    dtype: Any = dataclasses.field(default=None, metadata={"static": True})

    def __post_init__(self) -> None:
        values, scale = (getattr(x, "shape", None) for x in (self.values, self.scale))
        if values is None or scale is None:  # a node of a tree of something else than arrays
            return
        if self.dtype is None:
            object.__setattr__(self, "dtype", jnp.dtype(self.scale.dtype))
        if len(values) != len(scale) or any(
            count == 0 or size % count for size, count in zip(values, scale, strict=True)
        ):
            raise ValueError(
                f"A scale of shape {tuple(scale)} does not fit values of shape {tuple(values)}: it "
                "has as many axes, each as long as that of the values, of length 1, or a divisor. "
                "Give it axes of length 1 with reshape"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel."""
        return self.values.shape


def _dequantise(kernel: ScaledArray) -> jax.Array:
    wide = jnp.promote_types(kernel.scale.dtype, jnp.float32)
    scale = spread(kernel.scale.astype(wide), kernel.shape)
    return (kernel.values.astype(wide) * scale).astype(kernel.dtype)


def _requantise(kernel: jax.Array, old: ScaledArray) -> ScaledArray:
    values, scale = rounded(kernel, old.scale, old.values.dtype)
    return ScaledArray(values, scale, old.dtype)


register_quantised(ScaledArray, _dequantise, _requantise, axiswise=True)
