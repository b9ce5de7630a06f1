"""The devices on which a run's arrays and batches live."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from loha_jax.tree.placement import place


def placed_batches(batches: Any, used: int, steps: int | None, sharding: Any) -> Iterator[Any]:
    """Yield the batches after the first `used` ones, up to step `steps`, sharded as asked for."""
    rest: Iterable[Any] = (
        batches(used) if callable(batches) else itertools.islice(batches, used, None)
    )  # type: ignore[assignment]
    for batch in itertools.islice(rest, None if steps is None else max(steps - used, 0)):
        yield (
            batch
            if sharding is None
            else jax.tree.map(_put, batch, jax.tree.broadcast(sharding, batch))
        )


def _put(x: Any, sharding: Any) -> jax.Array:
    if isinstance(x, jax.Array):
        return jax.device_put(x, sharding)
    return jax.make_array_from_process_local_data(sharding, x)


def default_sharding(tree: Any) -> Any:
    """Return where uncommitted arrays go: to all devices of the first committed one in `tree`."""
    for x in jax.tree.leaves(tree):
        sharding = x if isinstance(x, jax.sharding.Sharding) else _committed(x)
        if sharding is not None:
            return (
                NamedSharding(sharding.mesh, PartitionSpec())
                if isinstance(sharding, NamedSharding)
                else sharding
            )
    return jnp.zeros(()).sharding  # the default device


def commit(tree: Any, default: Any, *, may_alias: bool | None = None) -> Any:
    """Commit each array to its device, or to `default`.

    So no step moves an array, or is compiled again for another place.
    """
    return jax.tree.map(lambda x: place(x, _committed(x) or default, may_alias=may_alias), tree)


def _committed(x: Any) -> Any:
    return x.sharding if getattr(x, "committed", False) else None
