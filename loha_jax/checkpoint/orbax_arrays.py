"""The arrays of a checkpoint: as Orbax saves them, and read in the shardings of a given state."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from loha_jax.runtime.untrusted import FileError
from loha_jax.tree.placement import chosen_sharding

if TYPE_CHECKING:
    from etils.epath import Path as EPath

Array = jax.Array | np.ndarray


def storable(leaf: Array | np.generic) -> Array:
    """Return an array as Orbax takes it: no typed key; numpy if only this process holds it."""
    if not isinstance(leaf, jax.Array):
        return np.array(leaf)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf) if jax.process_count() > 1 and leaf.is_fully_addressable else leaf


def read_arrays(
    folder: EPath, wanted: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Read arrays in the dtypes that they were saved in; sharded arrays are read in parts.

    Args:
        folder: Orbax' folder of a PyTree.
        wanted: the descriptions of the arrays, by name.
        given: leaves with the shardings of the arrays, by name.

    Raises:
        FileError: an array has another shape or dtype than its description.
        Exception: any other error of Orbax if files are corrupted.
    """
    import orbax.checkpoint as ocp

    restore_args = {}
    for name, described in wanted.items():
        if 0 in described["shape"]:  # Orbax saves no empty array
            continue
        if (sharding := _sharding_to_read(given.get(name), described)) is None:
            restore_args[described["item"]] = ocp.RestoreArgs(restore_type=np.ndarray)
        else:
            restore_args[described["item"]] = ocp.ArrayRestoreArgs(
                sharding=sharding,
                global_shape=tuple(described["shape"]),
                dtype=jnp.dtype(described["dtype"]),
            )
    # Not by the manager: if one process fails in it, the others wait for that one forever.
    read = ocp.PyTreeCheckpointHandler(type_handler_registry=patient_handlers()).restore(
        folder,
        args=ocp.args.PyTreeRestore(
            item=dict.fromkeys(restore_args, 0), restore_args=restore_args, partial_restore=True
        ),
    )
    arrays = {}
    for name, described in wanted.items():
        item = described["item"]
        shape, dtype = described["shape"], described["dtype"]
        array = arrays[name] = read[item] if item in read else np.zeros(shape, jnp.dtype(dtype))
        if described["kind"] != "key" and (list(array.shape), str(array.dtype)) != (shape, dtype):
            raise FileError(f"{name} has become {array.dtype}{list(array.shape)}")
    return arrays


def as_given(value: Array, given: Any, described: Mapping[str, Any], cast: bool) -> Any:
    """Return a restored array with the sharding of the given leaf, and with its dtype if `cast`.

    `given` is None for the random key.
    """
    if described["kind"] == "key":
        value = jax.random.wrap_key_data(jnp.asarray(value), impl=described["impl"])
    elif cast and value.dtype != given.dtype:
        value = value.astype(given.dtype)
    if isinstance(given, np.ndarray | np.generic):
        return value if isinstance(given, np.ndarray) else value[()]
    if isinstance(value, np.ndarray):
        value = jnp.asarray(value)
    if described.get("weak_type"):  # it determines the dtype of products
        weak = jnp.full(value.shape, value.dtype.type(0).item())
        value = weak.at[...].set(value) if weak.dtype == value.dtype else value
    sharding = chosen_sharding(given)
    return value if sharding is None else jax.device_put(value, sharding)


def _sharding_to_read(given: object, described: Mapping[str, Any]) -> Any:
    """Return the sharding in which Orbax reads an array; None to read it whole, as numpy."""
    sharding = chosen_sharding(given)
    if sharding is None or described["kind"] == "key" or described.get("weak_type"):
        return None
    if jax.dtypes.canonicalize_dtype(described["dtype"]) != described["dtype"]:
        return None  # float64 while it is disabled
    return None if jax.process_count() > 1 and sharding.is_fully_addressable else sharding


@functools.cache
def patient_handlers() -> Any:
    """Return Orbax' readers of arrays; after an error in one array they wait for the others.

    Orbax closes its event loop at the first error, and each read that ends later would log that.
    """
    import orbax.checkpoint as ocp

    def patient(handler: Any) -> Any:
        class Patient(handler):
            async def deserialize(self, infos, args=None):
                before = asyncio.all_tasks()
                try:
                    return await super().deserialize(infos, args)
                except Exception:
                    if others := asyncio.all_tasks() - before:
                        await asyncio.wait(others)
                    raise

        return Patient()

    handlers = ocp.type_handlers
    return handlers.create_type_handler_registry(
        (np.ndarray, patient(handlers.NumpyHandler)), (jax.Array, patient(handlers.ArrayHandler))
    )
