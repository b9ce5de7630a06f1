"""The types of quantised arrays that may stand in a tree for a floating kernel.

A type is known by a `QuantisedType`: how its arrays are read, and made again of a changed kernel.
Users add theirs with `register_quantised`. qwix' and AQT's are here. Neither library is imported:
whoever has such an array has imported its library.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Node = Any
"""A quantised array: a registered pytree node of a library's or a user's own type."""


@dataclasses.dataclass(frozen=True)
class QuantisedType:
    """How the quantised arrays of one type are read.

    Attributes:
        dequantise: returns the kernel as a floating array.
        requantise: takes a kernel and the quantised array that it replaces, and returns a new one
            of the same scheme; None where a type has no way back.
        axiswise: whether all arrays in it have the kernel's axes, in order, each as long as the
            kernel's, of length 1, or a divisor of it. A part of a kernel is then dequantised from
            parts of these arrays.
        scheme: returns a word for the numbers that are stored, such as "int4"; by default the dtype
            of the largest array.
    """

    dequantise: Callable[[Node], jax.Array]
    requantise: Callable[[jax.Array, Node], Node] | None = None
    axiswise: bool = False
    scheme: Callable[[Node], str] | None = None


_REGISTERED: dict[type, QuantisedType] = {}


def register_quantised(
    kind: type,
    dequantise: Callable[[Node], jax.Array],
    requantise: Callable[[jax.Array, Node], Node] | None = None,
    *,
    axiswise: bool = False,
) -> None:
    """Let arrays of a type stand for floating kernels in `inject`, `adapt`, `merge`, ….

    Args:
        kind: a class whose objects are pytree nodes (`jax.tree_util.register_dataclass`).
        dequantise: returns the kernel as a floating array; traced by `jax.jit`.
        requantise: for `merge(requantise=True)`: takes the merged kernel and the quantised array
            that it replaces, and returns a new one of the same scheme.
        axiswise: whether all arrays in it have the kernel's axes, in order, each as long as the
            kernel's, of length 1, or a divisor of it. A scan over a stack of layers then
            dequantises one layer at a time; otherwise the whole stack at once.

    Example:
        >>> @jax.tree_util.register_dataclass
        ... @dataclasses.dataclass
        ... class Int8:
        ...     values: jax.Array
        ...     step: jax.Array
        >>> register_quantised(Int8, lambda q: q.values * q.step)
        >>> import loha_jax
        >>> params = {"q": {"kernel": Int8(jnp.ones((3, 4), jnp.int8), jnp.float32(0.1))}}
        >>> config = loha_jax.LoHaConfig(r=2, target_modules=["q"])
        >>> loha_jax.inject(params, config, key=jax.random.key(0))
        {'q': {'kernel': LoHaWeight(f32[3,4] (int8) io, default: r=2 alpha=8)}}
    """
    _REGISTERED[kind] = QuantisedType(dequantise, requantise, axiswise)
    _find.cache_clear()


def quantised_type(node: Node) -> QuantisedType | None:
    """Return how a node is read as a quantised array; None if its type is not known."""
    return _find(type(node))


@functools.lru_cache(maxsize=1 << 12)
def _find(kind: type) -> QuantisedType | None:
    for base in kind.__mro__:
        if base in _REGISTERED:
            return _REGISTERED[base]
        if found := _FOREIGN.get((base.__module__.partition(".")[0], base.__name__)):
            return found
    return None


# --- scales ---------------------------------------------------------------------------------------


def spread(scale: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return a scale in the shape of its values, or with length 1: entries repeated over blocks.

    Example:
        >>> spread(jnp.array([[1.0], [2.0]]), (4, 3)).tolist()
        [[1.0], [1.0], [2.0], [2.0]]
    """
    for axis, size in enumerate(shape):
        if scale.shape[axis] not in (1, size):
            scale = jnp.repeat(scale, size // scale.shape[axis], axis)
    return scale


def rounded(
    kernel: jax.Array, scale: jax.Array, dtype: DTypeLike, largest: float | jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Return values and scale of a kernel that replaces one of this scale.

    An entry of the scale stays if the new values use at least half of their range with it. So
    unchanged values keep their bits.

    Args:
        kernel: the new kernel.
        scale: of the old one, with the kernel's axes.
        dtype: of the values.
        largest: the largest value; by default the dtype's.
    """
    integer = jnp.issubdtype(dtype, jnp.integer)
    if largest is None:
        largest = float((jnp.iinfo if integer else jnp.finfo)(dtype).max)
    wide, old = kernel.astype(jnp.float32), scale.astype(jnp.float32)
    blocks = [n for pair in _blocks(kernel.shape, scale.shape) for n in pair]
    sizes = jnp.abs(wide).reshape(blocks).max(range(1, 2 * kernel.ndim, 2))  # [*scale.shape]
    fits = (sizes <= old * (largest + 0.5 * integer)) & (2 * sizes >= old * largest)
    new = jnp.where(fits | (sizes == 0), old, sizes / largest).astype(scale.dtype)
    divisor = spread(new.astype(jnp.float32), kernel.shape)
    values = wide / jnp.where(divisor == 0, 1, divisor)
    values = jnp.clip(jnp.round(values) if integer else values, -largest, largest)
    return values.astype(dtype), new


def _blocks(shape: tuple[int, ...], scale: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return for each axis the number of blocks and their length."""
    return [(count, size // count) for size, count in zip(shape, scale, strict=True)]


# --- qwix -----------------------------------------------------------------------------------------


def _qwix(node: Node) -> Node:
    """Return the `QArray` of a qwix array: a `WithAux` says in addition how it was made."""
    return getattr(node, "array", node)


def _dequantise_qwix(node: Node) -> jax.Array:
    return sys.modules["qwix"].dequantize(_qwix(node))


def _requantise_qwix(kernel: jax.Array, node: Node) -> Node:
    # The blocks are those of the scale: the axes that a `WithAux` notes are those of one layer of a
    # stack.
    old, how = _qwix(node), getattr(node, "how", None)
    counts = _blocks(old.qvalue.shape, old.scale.shape)
    channels = [axis for axis, (count, size) in enumerate(counts) if size == 1 and count > 1]
    tiles = {axis: size for axis, (count, size) in enumerate(counts) if count > 1 and size > 1}
    method = "absmax" if old.zero_point is None else "minmax"
    if how is not None:
        method = how.calibration_method
    new = sys.modules["qwix"].quantize(
        kernel,
        old.qtype,
        channelwise_axes=channels,
        tiled_axes=tiles,
        calibration_method=method,
        scale_dtype=old.scale.dtype,
    )
    return new if how is None else dataclasses.replace(node, array=new)


def _qwix_scheme(node: Node) -> str:
    qtype = _qwix(node).qtype
    return qtype if isinstance(qtype, str) else jnp.dtype(qtype).name


_QWIX = QuantisedType(_dequantise_qwix, _requantise_qwix, True, _qwix_scheme)


# --- AQT ------------------------------------------------------------------------------------------


def _requantise_aqt(kernel: jax.Array, node: Node) -> Node:
    if len(node.scale) != 1 or node.bias or node.sparsity_mask is not None or node.tiling_state:
        raise ValueError("an AQT QTensor with biases, several scales, tiles or a mask")
    # The array does not say of how many bits its numbers are; calibration makes them use all.
    largest = jnp.abs(node.qvalue.astype(jnp.float32)).max()
    values, scale = rounded(kernel, node.scale[0], node.qvalue.dtype, largest)
    return node.replace(qvalue=values, scale=[scale], scale_t=None)


_FOREIGN = {
    ("qwix", "QArray"): _QWIX,
    ("qwix", "WithAux"): _QWIX,
    ("aqt", "QTensor"): QuantisedType(lambda node: node.dequant(), _requantise_aqt, True),
}
"""Types of other libraries, by the package and the name of their class."""
