"""The devices on which a run's arrays and batches live."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import PyTree

from loha_jax.tree.placement import chosen_sharding, place

T = TypeVar("T")


def placed_batches(
    batches: Iterable[PyTree] | Callable[[int], Iterable[PyTree]],
    used: int,
    steps: int | None,
    sharding: PyTree,
) -> Iterator[PyTree]:
    """Yield the batches after the first `used` ones, up to step `steps`, sharded as asked for."""
    rest = batches(used) if callable(batches) else itertools.islice(batches, used, None)
    for batch in itertools.islice(rest, None if steps is None else max(steps - used, 0)):
        if sharding is not None:
            batch = jax.tree.map(_put, batch, jax.tree.broadcast(sharding, batch))
        yield batch


def _put(x: jax.Array | np.ndarray, sharding: Sharding) -> jax.Array:
    if isinstance(x, jax.Array):
        return jax.device_put(x, sharding)
    return jax.make_array_from_process_local_data(sharding, x)


def default_sharding(tree: PyTree) -> Sharding:
    """Return where uncommitted arrays go: to all devices of the first committed one in `tree`."""
    for x in jax.tree.leaves(tree):
        sharding = x if isinstance(x, jax.sharding.Sharding) else chosen_sharding(x)
        if sharding is not None:
            if isinstance(sharding, NamedSharding):
                return NamedSharding(sharding.mesh, PartitionSpec())
            return sharding
    return jnp.zeros(()).sharding  # the default device


def commit(tree: T, default: Sharding, *, may_alias: bool | None = None) -> T:
    """Commit each array to its device, or to `default`.

    So no step moves an array, or is compiled again for another place.
    """
    return jax.tree.map(
        lambda x: place(x, chosen_sharding(x) or default, may_alias=may_alias), tree
    )
