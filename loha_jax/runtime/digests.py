"""Digests of arrays that depend only on values, not on shardings or numbers of processes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from loha_jax.runtime.processes import gather

_WORDS = {1: np.uint8, 2: np.uint16}  # by size of an element; larger ones are several uint32
_SHORT = 128  # an axis that may be a stack of layers
_LANES = ((np.uint32(0x85EBCA6B), np.uint32(1)), (np.uint32(0x27D4EB2F), np.uint32(0x165667B1)))


def digests(arrays: Mapping[str, Any], sample: int | None = None) -> dict[str, str]:
    """Return the digest of each array in hexadecimal.

    With several processes, all of them have to call it.

    Each element is hashed with its index, and the hashes are added up modulo 2^32, twice: a sum does not care which
    device holds which part. Devices hash what they hold; only sums travel.

    Args:
        arrays: by name, jax or numpy. An array that other processes hold parts of counts as one; any other one should
            be the same in all processes, and has the digest "" where it is not.
        sample: hash about as many elements of each array, on a grid over all its axes, instead of all.

    Example:
        >>> x = np.arange(6.0, dtype=np.float32).reshape(2, 3)
        >>> found = digests({"x": x, "same": jnp.asarray(x), "transposed": x.T})
        >>> found["x"] == found["same"], found["x"] == found["transposed"]
        (True, False)
    """
    if not arrays:
        return {}
    parts = [
        _parts(array, None if sample is None else grid(np.shape(array), sample))
        for array in arrays.values()
    ]
    # [processes, arrays, 2]
    everywhere = gather(
        np.stack([sum(part, np.zeros(2, np.uint32)) for part in jax.device_get(parts)])
    )
    result = {}
    for n, (name, array) in enumerate(arrays.items()):
        sums = everywhere[:, n]
        total = sums.sum(0, dtype=np.uint32) if _is_global(array) else sums[0]
        differ = not _is_global(array) and (sums != total).any()
        result[name] = "" if differ else f"{total[0]:08x}{total[1]:08x}"
    return result


def grid(shape: Sequence[int], elements: int) -> list[np.ndarray]:
    """Return indices along each axis, about `elements` in all.

    The shortest axis (a stack of layers, say) gets all of its indices.

    Example:
        >>> [len(indices) for indices in grid((32, 4096, 4096), 1 << 14)]
        [32, 22, 23]
    """
    result: list[np.ndarray] = [np.zeros(0, np.int64)] * len(shape)
    left = elements
    for done, axis in enumerate(sorted(range(len(shape)), key=lambda axis: shape[axis])):
        size, share = shape[axis], math.floor(left ** (1 / (len(shape) - done)))
        count = min(size, left if not done and size <= _SHORT else share)
        result[axis] = (2 * np.arange(count) + 1) * size // (2 * max(count, 1))
        left //= max(count, 1)
    return result


def _is_global(array: Any) -> bool:
    return isinstance(array, jax.Array) and not array.is_fully_addressable


def _parts(array: Any, chosen: list[np.ndarray] | None) -> list[Any]:
    """Return the sums of what this process holds and counts: one replica of each shard."""
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if not isinstance(array, jax.Array):
        return (
            []
            if not np.size(array)
            else [_part(np.asarray(array), [slice(None)] * np.ndim(array), chosen)]
        )
    shards = [s for s in array.addressable_shards if s.replica_id == 0 and s.data.size]
    parts = [_part(shard.data, shard.index, chosen) for shard in shards]
    return [part for part in parts if part is not None]


def _part(data: Any, index: Sequence[slice], chosen: list[np.ndarray] | None) -> Any:
    starts = [s.start or 0 for s in index]
    if isinstance(data, jax.Array) and next(iter(data.devices())).platform == "cpu":
        data = np.asarray(data)  # no copy; and one program serves all devices
    if chosen is None:
        positions = [
            np.arange(start, start + size) for start, size in zip(starts, data.shape, strict=True)
        ]
    else:
        ranges = [(start, start + size) for start, size in zip(starts, data.shape, strict=True)]
        positions = [
            c[(c >= low) & (c < high)] for c, (low, high) in zip(chosen, ranges, strict=True)
        ]
        if not all(map(len, positions)):
            return None
        data = data[np.ix_(*(p - start for p, start in zip(positions, starts, strict=True)))]
    words = data if isinstance(data, jax.Array) else _host_words(data)
    return _hash(words, [p.astype(np.uint32) for p in positions])


def _host_words(data: np.ndarray) -> np.ndarray:
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


def _is_narrow(dtype: Any) -> bool:
    """Say whether elements are smaller than a byte: float32 holds them all."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return False
    return (jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo)(dtype).bits < 8


@jax.jit
def _hash(data: Any, positions: list[Any]) -> jax.Array:
    """Compute the two sums of an array's shard, or of its words."""
    words = (_device_words(data) if data.ndim == len(positions) else data).astype(jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis, position in enumerate([*positions, jnp.arange(words.shape[-1], dtype=jnp.uint32)]):
        table = _mixed(position + np.uint32(0x9E3779B9 * (axis + 1) & 0xFFFFFFFF))
        place = place + table.reshape(-1, *(1,) * (words.ndim - 1 - axis))
    return jnp.stack([jnp.sum(_mixed(words * m + place * n), dtype=jnp.uint32) for m, n in _LANES])


def _mixed(x: Any) -> Any:
    """Mix the bits of x: each bit of the result depends on all of them.

    This is the last step of MurmurHash3.
    """
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
