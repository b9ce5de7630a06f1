"""Agreement between several processes.

All of them call each function. With one process, nothing is sent.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from loha_jax.runtime.untrusted import FileError


def gathered(array: np.ndarray) -> np.ndarray:
    """Return the arrays of all processes, stacked in their order.

    They have the same shape and elements of at most 32 bits.

    Example:
        >>> gathered(np.ones(3)).shape
        (1, 3)
    """
    return array[None] if jax.process_count() == 1 else np.asarray(multihost_utils.process_allgather(array))


def same_everywhere(value: Any) -> bool:
    """Say whether all processes give the same JSON.

    Example:
        >>> same_everywhere({"batch": 3})
        True
    """
    own = np.frombuffer(hashlib.sha256(json.dumps(value).encode()).digest(), np.uint32)
    return bool((gathered(own) == own).all())


def of_first_process(numbers: Sequence[int]) -> list[int]:
    """Return the numbers that the first process gives, each below 2^31.

    Example:
        >>> of_first_process([3, 1])
        [3, 1]
    """
    count = gathered(np.array(len(numbers), np.int32))
    padded = np.zeros(int(count.max()), np.int32)
    padded[: len(numbers)] = numbers
    return [int(n) for n in gathered(padded)[0, : count[0]]]


def agreed(read: Callable[[], Any], failed: str) -> Any:
    """Return what `read` returns; if it fails in one process, raise FileError in all.

    Args:
        read: may raise anything, as libraries do on a corrupted file. Must not wait for another
            process.
        failed: how the message begins.

    Example:
        >>> agreed(lambda: 3, "The file is broken")
        3
    """
    result, problem = None, ""
    try:
        result = read()
    except Exception as error:
        text = " ".join(str(error).split())
        problem = text if isinstance(error, FileError) else f"{type(error).__name__}: {text}"
    where = np.flatnonzero(gathered(np.array(bool(problem))))
    if len(where):
        problem = problem or f"process {where[0]} cannot read it"
        raise FileError(f"{failed}: {problem:.1000}")
    return result


def on_host(array: Any) -> np.ndarray:
    """Return an array as numpy holds it, in every process.

    Parts that other processes hold are sent around.

    Example:
        >>> on_host(jax.numpy.ones(3)).shape
        (3,)
    """
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    assert isinstance(array.sharding, NamedSharding), "no other one spans processes"
    whole = NamedSharding(array.sharding.mesh, PartitionSpec())
    return np.asarray(jax.jit(lambda x: x, out_shardings=whole)(array))


def in_first_process(write: Callable[[], Any], failed: str) -> None:
    """Write in the first process while the others wait; if it fails, raise FileError in all.

    JAX is not started for it.

    Args:
        write: writes.
        failed: how the message begins.

    Example:
        >>> in_first_process(lambda: print("written"), "Nothing was written")
        written
    """
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        write()
    else:
        agreed(lambda: write() if jax.process_index() == 0 else None, failed)
