"""Agreement between several processes. All of them call each function; one sends nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from loha_jax.runtime.untrusted import FileError

T = TypeVar("T")


def gather(array: np.ndarray) -> np.ndarray:
    """Return the arrays of all processes, stacked: `[...]` to `[processes, ...]`.

    They have the same shape, and elements of at most 32 bits.

    Example:
        >>> gather(np.ones(3)).shape
        (1, 3)
    """
    return np.asarray(multihost_utils.process_allgather(array))


def same_everywhere(value: object) -> bool:
    """Return whether all processes give the same JSON.

    Example:
        >>> same_everywhere({"batch": 3})
        True
    """
    digest = np.frombuffer(hashlib.sha256(json.dumps(value).encode()).digest(), np.uint32)
    return bool((gather(digest) == digest).all())


def of_first_process(numbers: Sequence[int]) -> list[int]:
    """Return the numbers that the first process gives, each below 2^31.

    Example:
        >>> of_first_process([3, 1])
        [3, 1]
    """
    count = int(multihost_utils.broadcast_one_to_all(np.array(len(numbers), np.int32)))
    own = np.array(numbers[:count], np.int32)  # of another process: only the shape counts
    padded = np.pad(own, (0, count - len(own)))
    return multihost_utils.broadcast_one_to_all(padded).tolist()


def raise_together(read: Callable[[], T], failed: str) -> T:
    """Return the result of `read`; if it fails in one process, raise FileError in all.

    Args:
        read: may raise any exception, as libraries do for a corrupted file. It must not wait for
            another process.
        failed: the start of the message.

    Example:
        >>> raise_together(lambda: 3, "The file is corrupted")
        3
    """
    result, problem = None, ""
    try:
        result = read()
    except Exception as error:
        text = " ".join(str(error).split())
        problem = text if isinstance(error, FileError) else f"{type(error).__name__}: {text}"
    failures = np.flatnonzero(gather(np.array(bool(problem))))
    if len(failures):
        problem = problem or f"process {failures[0]} cannot read it"
        raise FileError(f"{failed}: {problem:.1000}")
    return cast(T, result)


def on_host(array: ArrayLike) -> np.ndarray:
    """Return an array as numpy, in every process; parts that other processes hold are sent.

    Example:
        >>> on_host(jax.numpy.ones(3)).shape
        (3,)
    """
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    assert isinstance(array.sharding, NamedSharding), "no other one spans processes"
    whole = NamedSharding(array.sharding.mesh, PartitionSpec())
    return np.asarray(jax.jit(lambda x: x, out_shardings=whole)(array))


def in_first_process(write: Callable[[], object], failed: str) -> None:
    """Let the first process write to disk while the others wait.

    If it fails, raise FileError in all. It does not start JAX.

    Args:
        write: the function that writes.
        failed: the start of the message.

    Example:
        >>> in_first_process(lambda: print("written"), "Nothing was written")
        written
    """
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        write()
    else:
        raise_together(lambda: write() if jax.process_index() == 0 else None, failed)
