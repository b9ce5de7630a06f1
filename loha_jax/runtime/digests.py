"""Digests of arrays that depend only on values, not on shardings or numbers of processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from loha_jax.runtime.processes import gather
from loha_jax.runtime.shards import Array, grid, own_points

IntegerArray = TypeVar("IntegerArray", jax.Array, np.ndarray)

_WORDS = {1: np.uint8, 2: np.uint16}  # by size of an element; larger ones are several uint32
_LANES = ((np.uint32(0x85EBCA6B), np.uint32(1)), (np.uint32(0x27D4EB2F), np.uint32(0x165667B1)))


def digests(arrays: Mapping[str, Array], sample: int | None = None) -> dict[str, str]:
    """Return the digest of each array in hexadecimal.

    With several processes, all of them have to call it.

    Each element is hashed with its index, and the hashes are added up modulo 2^32, twice: a sum
    does not care which device holds which part. Devices hash what they hold; only sums travel.

    Args:
        arrays: by name, jax or numpy. An array that other processes hold parts of counts as one;
            any other one should be the same in all processes, and has the digest "" where it is
            not.
        sample: hash about as many elements of each array, on a grid over all its axes, instead of
            all.

    Example:
        >>> x = np.arange(6.0, dtype=np.float32).reshape(2, 3)
        >>> found = digests({"x": x, "same": jnp.asarray(x), "transposed": x.T})
        >>> found["x"] == found["same"], found["x"] == found["transposed"]
        (True, False)
    """
    if not arrays:
        return {}
    parts = jax.device_get([_parts(array, sample) for array in arrays.values()])
    # [processes, arrays, 2]
    everywhere = gather(np.stack([sum(part, np.zeros(2, np.uint32)) for part in parts]))
    result = {}
    for n, (name, array) in enumerate(arrays.items()):
        sums = everywhere[:, n]
        total = sums.sum(0, dtype=np.uint32) if _is_global(array) else sums[0]
        differ = not _is_global(array) and (sums != total).any()
        result[name] = "" if differ else f"{total[0]:08x}{total[1]:08x}"
    return result


def _is_global(array: Array) -> bool:
    return isinstance(array, jax.Array) and not array.is_fully_addressable


def _parts(array: Array, sample: int | None) -> list[jax.Array]:
    """Return the sums of what this process holds and counts."""
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    chosen = None if sample is None else grid(array.shape, sample)
    return [
        _hash(
            values if isinstance(values, jax.Array) else _host_words(values),
            [index.astype(np.uint32) for index in indices],
        )
        for values, indices in own_points(array, chosen)
    ]


def _host_words(data: np.ndarray | np.generic) -> np.ndarray:
    """Return the bits of an array as unsigned integers `[*shape, words of an element]`."""
    if data.dtype != np.bool_ and _is_narrow(data.dtype):
        data = data.astype(np.float32)
    flat = np.ascontiguousarray(data).reshape(-1)
    return flat.view(_WORDS.get(data.dtype.itemsize, np.uint32)).reshape(*data.shape, -1)


def _device_words(data: jax.Array) -> jax.Array:
    """Return `_host_words` of a traced array."""
    shape = data.shape
    if data.dtype == jnp.bool_:
        return data.astype(jnp.uint8)[..., None]
    if jnp.issubdtype(data.dtype, jnp.complexfloating):
        data = jnp.stack([data.real, data.imag], -1)
    elif _is_narrow(data.dtype):
        data = data.astype(jnp.float32)
    return lax.bitcast_convert_type(data, _WORDS.get(data.dtype.itemsize, np.uint32)).reshape(
        *shape, -1
    )


def _is_narrow(dtype: DTypeLike) -> bool:
    """Return whether elements are smaller than a byte: float32 holds them all."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return False
    return (jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo)(dtype).bits < 8


@jax.jit
def _hash(data: jax.Array | np.ndarray, positions: list[jax.Array]) -> jax.Array:
    """Compute the two sums of an array's shard, or of its words."""
    words = jnp.asarray(data)
    words = (_device_words(words) if data.ndim == len(positions) else words).astype(jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis, position in enumerate([*positions, jnp.arange(words.shape[-1], dtype=jnp.uint32)]):
        table = _mixed(position + np.uint32(0x9E3779B9 * (axis + 1) & 0xFFFFFFFF))
        place = place + table.reshape(-1, *(1,) * (words.ndim - 1 - axis))
    return jnp.stack([jnp.sum(_mixed(words * m + place * n), dtype=jnp.uint32) for m, n in _LANES])


def _mixed(x: IntegerArray) -> IntegerArray:
    """Mix the bits of x: each bit of the result depends on all of them.

    This is the last step of MurmurHash3.
    """
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
