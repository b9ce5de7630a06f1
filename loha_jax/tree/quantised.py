"""`QuantisedArray`: a quantised kernel in a tree, as the floating array that it stands for."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey
from jax.typing import DTypeLike
from jaxtyping import PyTree

from loha_jax.targets.module_names import KERNEL_LEAVES, path_parts
from loha_jax.tree.array_like import ArrayLike
from loha_jax.tree.quantised_types import Node, QuantisedType, quantised_type
from loha_jax.tree.short_repr import short_array

T = TypeVar("T")


class QuantisedArray(ArrayLike):
    """A quantised array of a known type, with the interface of the array that it stands for.

    Shape and dtype are those of the dequantised array. Whatever else is asked of it is computed on
    the dequantised array, which is not kept.

    Attributes:
        node: the quantised array itself; None, or an object without arrays, in one half of
            `partition`.
        cast: the name of the dtype that it is cast to when it is dequantised, or None.
    """

    def __init__(self, node: Node, cast: str | None = None):
        self.node = node
        self.cast = cast

    def __repr__(self) -> str:
        if not self.is_whole:
            return "None"
        return f"{short_array(self.type_of_array)} ({self.scheme})"

    @functools.cached_property
    def kind(self) -> QuantisedType:
        """How the node is read."""
        kind = quantised_type(self.node)
        assert kind is not None, type(self.node)
        return kind

    @property
    def is_whole(self) -> bool:
        """True if the arrays are there."""
        return bool(jax.tree.leaves(self.node))

    @property
    def scheme(self) -> str:
        """A word for the numbers that are stored: "int4"."""
        if self.kind.scheme is not None:
            return self.kind.scheme(self.node)
        return str(self._largest.dtype)

    def __jax_array__(self) -> jax.Array:
        array = self.kind.dequantise(self.node)
        return array if self.cast is None else array.astype(self.cast)

    @functools.cached_property
    def type_of_array(self) -> jax.ShapeDtypeStruct:
        """Shape, dtype and explicit sharding of the dequantised array."""
        return jax.eval_shape(
            lambda node: QuantisedArray(node, self.cast).__jax_array__(), self.node
        )

    def as_dtype(self, dtype: DTypeLike) -> QuantisedArray:
        """Return the same quantised array, to be cast to a dtype when it is dequantised."""
        return QuantisedArray(self.node, jnp.dtype(dtype).name)

    @property
    def _largest(self) -> jax.Array:
        return max(jax.tree.leaves(self.node), key=lambda x: x.size)

    @property
    def _frozen(self) -> jax.Array:
        return self._largest

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dequantised array."""
        return self.type_of_array.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the dequantised array."""
        return self.type_of_array.dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the quantised array, as numpy holds its elements."""
        return sum(x.nbytes for x in jax.tree.leaves(self.node))

    @property
    def placed(self) -> jax.Array | None:
        """The stored array that lies on the devices as the kernel would; None where none does."""
        largest = self._largest
        return largest if self.kind.axiswise and largest.shape == self.shape else None

    @property
    def placed_type(self) -> jax.ShapeDtypeStruct:
        """Shape, dtype and sharding of the dequantised array on the devices of the stored one."""
        sharding = getattr(self.placed, "sharding", None)
        return jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=sharding)

    def cut(
        self, axis: int, operation: Callable[[jax.Array, int], jax.Array]
    ) -> QuantisedArray | None:
        """Apply `operation(array, axis)`, which changes the positions along an axis.

        Returns:
            The quantised array of the result; None where it has to be dequantised first, since the
            scales of blocks along the axis do not say which block a position is in.
        """
        arrays, treedef = jax.tree.flatten(self.node)
        if not self.lies_along(axis):
            return None
        size = self.shape[axis]
        cut = [operation(x, axis) if x.shape[axis] == size else x for x in arrays]
        return QuantisedArray(treedef.unflatten(cut), self.cast)

    def part(self, where: Sequence[int]) -> jax.Array:
        """Return one part of the dequantised array, by indices of its first axes."""
        array, indices = self, list(where)
        for axis, index in enumerate(where):
            if (cut := array.cut(axis, functools.partial(_one, index))) is not None:
                array, indices[axis] = cut, 0
        return as_array(array)[tuple(indices)]

    def lies_along(self, axis: int) -> bool:
        """Return whether each stored array has this axis, whole or with length 1."""
        return self.kind.axiswise and all(
            x.ndim == self.ndim and x.shape[axis] in (1, self.shape[axis])
            for x in jax.tree.leaves(self.node)
        )


def _one(index: int, x: jax.Array, axis: int) -> jax.Array:
    return jax.lax.slice_in_dim(x, index, index + 1, axis=axis)


jax.tree_util.register_pytree_with_keys(
    QuantisedArray,
    lambda array: (((GetAttrKey("node"), array.node),), (array.cast,)),
    lambda aux, children: QuantisedArray(*children, cast=aux[0]),
    lambda array: ((array.node,), (array.cast,)),
)


def is_quantised(x: object) -> bool:
    """Return whether `x` is a quantised array of a known type (for `is_leaf=`)."""
    return isinstance(x, QuantisedArray) or quantised_type(x) is not None


def wrapped(leaf: object) -> Any:
    """Return a quantised array as a `QuantisedArray`; other leaves as they are."""
    return QuantisedArray(leaf) if quantised_type(leaf) is not None else leaf


def unwrapped(leaf: object) -> Any:
    """Undo `wrapped`."""
    return leaf.node if isinstance(leaf, QuantisedArray) else leaf


def as_array(kernel: object) -> Any:
    """Return a quantised kernel dequantised; others as they are."""
    return kernel.__jax_array__() if isinstance(kernel, QuantisedArray) else kernel


def dequantise(params: T) -> T:
    """Return a tree with its quantised arrays as floating ones; the kernels of adapters too.

    Example:
        >>> import loha_jax
        >>> kernel = loha_jax.ScaledArray(jnp.ones((3, 4), jnp.int8), jnp.full((1, 1), 0.5))
        >>> dequantise({"q": {"kernel": kernel}})["q"]["kernel"].dtype
        dtype('float32')
    """

    def plain(leaf: object) -> Any:
        return as_array(wrapped(leaf))

    return jax.tree.map(plain, params, is_leaf=is_quantised)


def types_of_quantised(params: T) -> T:
    """Return a tree with the shape and dtype of each quantised array in its place."""

    def type_of(leaf: object) -> object:
        return wrapped(leaf).type_of_array if is_quantised(leaf) else leaf

    return jax.tree.map(type_of, params, is_leaf=is_quantised)


def unknown_quantised(params: PyTree) -> dict[tuple[str, ...], str]:
    """Find what stands in the place of a kernel and holds narrow numbers, but is of no known type.

    Returns:
        The arrays in it by its path, such as `("q", "kernel")`: "q.kernel.bits uint8[3,2]".
    """
    found: dict[tuple[str, ...], str] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantised)[0]:
        parts = path_parts(path)
        inside = next((n for n in range(1, len(path)) if _is_kernel(path[:n])), None)
        plain = _is_kernel(path) or is_quantised(leaf)
        if inside is not None and not plain and _is_narrow(leaf):
            found.setdefault(path_parts(path[:inside]), f"{'.'.join(parts)} {short_array(leaf)}")
    return found


def _is_kernel(path: Sequence[Any]) -> bool:
    return path_parts(path)[-1] in KERNEL_LEAVES


def _is_narrow(x: object) -> bool:
    dtype, ndim = getattr(x, "dtype", None), getattr(x, "ndim", 0)
    return (
        dtype is not None
        and ndim > 1
        and not jnp.issubdtype(dtype, jax.dtypes.extended)
        and (jnp.issubdtype(dtype, jnp.integer) or jnp.dtype(dtype).itemsize == 1)
    )
