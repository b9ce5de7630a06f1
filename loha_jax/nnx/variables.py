"""The variables of a base: a parameter, or the tree of variables of a quantised kernel."""

from __future__ import annotations

import jax
from flax import nnx
from jaxtyping import PyTree

from loha_jax.nnx.graph import is_variable
from loha_jax.runtime._compat import AXIS_NAMES
from loha_jax.tree.placement import MeshAxis


def variables_of(base: PyTree[nnx.Variable]) -> list[nnx.Variable]:
    """Return the variables of a base: the base itself, or those of a quantised kernel."""
    return [x for x in jax.tree.leaves(base, is_leaf=is_variable) if is_variable(x)]


def values_of(base: PyTree[nnx.Variable]) -> PyTree[jax.Array]:
    """Return the value of a variable, or a tree of the values of its variables."""
    return jax.tree.map(lambda x: x.get_value() if is_variable(x) else x, base, is_leaf=is_variable)


def set_values(base: PyTree[nnx.Variable], values: PyTree[jax.Array]) -> None:
    """Set the values of a variable, or of a tree of variables, where they have changed."""
    parts, treedef = jax.tree.flatten(base, is_leaf=is_variable)
    for part, value in zip(parts, treedef.flatten_up_to(values), strict=True):
        if is_variable(part) and part.get_value() is not value:
            part.set_value(value)


def scanned_axis(base: PyTree[nnx.Variable]) -> int | None:
    """Return the axis that a scan over layers has added to a variable, if its metadata says so.

    MaxText writes it there. It stays while the scan runs, and has taken the axis away.
    """
    return variables_of(base)[0].get_metadata().get("param_scan_axis")


def axis_names(base: PyTree[nnx.Variable]) -> tuple[MeshAxis, ...] | None:
    """Return what each axis of a base is split over, or its logical name, as the metadata says."""
    metadata = variables_of(base)[0].get_metadata()
    return next((metadata[name] for name in AXIS_NAMES if name in metadata), None)


def variable_beside(
    base: PyTree[nnx.Variable], kind: type[nnx.Variable], array: jax.Array, axes: object
) -> nnx.Variable:
    """Return a new variable with the metadata of the base that it is beside, but its own axes."""
    variable = kind(array)
    own = (*AXIS_NAMES, "sharding", *nnx.Variable.required_metadata)
    metadata = variables_of(base)[0].get_metadata()
    for key, value in metadata.items():
        if key not in own and not key.startswith("on_"):  # hooks
            variable.set_metadata(key, value)
    if axes is not None:
        named = next((name for name in AXIS_NAMES if name in metadata), AXIS_NAMES[0])
        variable.set_metadata(named, axes)
    return variable
