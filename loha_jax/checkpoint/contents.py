"""The contents of one checkpoint: the arrays to save, and reading them again."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
from jaxtyping import PyTree

from loha_jax.checkpoint import description_file
from loha_jax.checkpoint.description import KEY, State, describe_leaf, differences
from loha_jax.checkpoint.orbax_arrays import as_given, read_arrays, storable
from loha_jax.runtime.digests import digests
from loha_jax.runtime.processes import raise_together
from loha_jax.runtime.untrusted import FileError

if TYPE_CHECKING:
    from etils.epath import Path as EPath

STATE = "state"
"""Orbax' name of the item with the arrays."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A restored checkpoint.

    Attributes:
        step: the step of the checkpoint.
        params: the given tree with the checkpoint's adapters. Its base leaves are the given ones.
        opt_state: the optimizer's state, or None if none was given.
        key: the random key, or None if none was saved.
        data: the data position as JSON gives it (a tuple is a list), or None.
        metrics: numbers by name.

    Example:
        >>> Restored(step=3, params={}, opt_state=None, key=None, data=None, metrics={}).step
        3
    """

    step: int
    params: PyTree
    opt_state: PyTree
    key: jax.Array | None
    data: Any
    metrics: dict[str, float]


def read_checkpoint(folder: EPath, step: int, state: State, given: Mapping[str, Any]) -> Restored:
    """Read the checkpoint of a step.

    Args:
        folder: of the run.
        step: of the checkpoint.
        state: the given one, with the shardings to read in.
        given: its description.

    Raises:
        FileError: the checkpoint is corrupted.
        ValueError: it does not match the given state.
    """
    path = folder / str(step)
    origin = f"The checkpoint of step {step} ({path})"
    held = raise_together(
        functools.partial(description_file.read, path, step), f"{origin} is corrupted"
    )
    if lines := differences(given, held):
        listed = "".join(f"\n  - {line}" for line in lines)
        raise ValueError(
            f"{origin} belongs to something else than what was given:{listed}\nGive the base "
            "weights, the config (loha_jax.inject) and the optimizer that it was saved with; "
            "adapters can be activated with loha_jax.set_adapter. To train something else, "
            "choose another folder."
        )
    names = [*state.saved, *([KEY] if KEY in held["leaves"] else [])]
    values = {name: x["value"] for name in names if "value" in (x := held["leaves"][name])}
    wanted = {name: held["leaves"][name] for name in names if name not in values}
    read = functools.partial(read_arrays, path / STATE, wanted, state.saved)
    arrays = raise_together(read, f"{origin} is corrupted")
    found = digests(arrays)
    if changed := [name for name, digest in found.items() if digest != wanted[name]["digest"]]:
        raise FileError(
            f"{origin} is corrupted: the values of {', '.join(changed)} are not those that "
            "were saved"
        )
    for name, array in arrays.items():
        # Not the optimizer state: optax may change a dtype in its first update.
        values[name] = as_given(
            array, state.saved.get(name), wanted[name], cast=name.startswith("params")
        )
    params, opt_state = state.with_values(values)
    return Restored(step, params, opt_state, values.get(KEY), held["data"], held["metrics"])


def arrays_to_save(state: State) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arrays by number, as they are saved, and the description of all leaves by name."""
    if abstract := [
        name for name, leaf in state.saved.items() if isinstance(leaf, jax.ShapeDtypeStruct)
    ]:
        raise ValueError(f"These have a shape, but no values to save: {', '.join(abstract)}")
    arrays = {name: storable(leaf) for name, leaf in state.saved.items() if hasattr(leaf, "dtype")}
    leaves = {name: describe_leaf(leaf) for name, leaf in state.saved.items()}
    found = digests(arrays)
    if differ := [name for name, digest in found.items() if not digest]:
        raise ValueError(
            f"The processes hold different values of {', '.join(differ)}, of which a checkpoint "
            "holds one. Make it the same everywhere (fold jax.process_index() into a key after it "
            "is restored), or one global array."
        )
    for number, (name, digest) in enumerate(found.items()):
        leaves[name] |= {"digest": digest, "item": str(number)}
    # Orbax refuses empty arrays.
    return {leaves[name]["item"]: array for name, array in arrays.items() if array.size}, leaves
