"""The part of an array's type that concerns devices.

On a mesh with explicit axes it says how the array is split, and products have to give the sharding
of their result. Inside a `shard_map` it holds the mesh axes over which the array varies, and both
branches of a choice have to agree.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

T = TypeVar("T")

Typed = ArrayLike | jax.ShapeDtypeStruct
"""An array, or a shape with the type of one."""


def _type_of(x: Typed) -> object:
    return x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)


def explicit_sharding(x: Typed) -> NamedSharding | None:
    """Return the sharding in the type of an array or a shape; None without explicit axes."""
    sharding = getattr(_type_of(x), "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    return sharding if mesh is not None and not mesh.empty and mesh.explicit_axes else None


def result_sharding(
    labels: Iterable[str], sources: Iterable[tuple[Typed, Iterable[str]]]
) -> NamedSharding | None:
    """Return the sharding of a product's result; None without explicit axes.

    Args:
        labels: of the result's axes.
        sources: arrays and the labels of their axes; the first one that splits an axis decides.
    """
    mesh, split = None, {}
    for array, own in sources:
        sharding = explicit_sharding(array)
        if sharding is None:
            continue
        mesh = sharding.mesh
        for label, axes in zip(own, sharding.spec, strict=True):
            if axes is not None:
                split.setdefault(label, axes if isinstance(axes, tuple) else (axes,))
    if mesh is None:
        return None
    spec, used = [], set()
    for label in labels:
        free = tuple(axis for axis in split.get(label, ()) if axis not in used)
        used.update(free)
        spec.append(free or None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def split_as(array: jax.Array, other: Typed) -> jax.Array:
    """Split an array over explicit mesh axes like another array, or a shape, of its shape."""
    sharding = explicit_sharding(other)
    return array if sharding is None else jax.sharding.reshard(array, sharding)


def varying(x: Typed) -> frozenset[str]:
    """Return the mesh axes over which an array or a shape varies inside a `shard_map`."""
    kind = getattr(_type_of(x), "manual_axis_type", None)
    return frozenset() if kind is None else kind.varying


def vary_over(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """Return an array typed as varying over some more mesh axes."""
    missing = tuple(sorted(axes - varying(x), key=str))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def vary_alike(tree: T) -> T:
    """Type each array of a tree as varying over all mesh axes that one of them varies over.

    A `custom_vjp` inside a `shard_map` requires it. An array that is equal everywhere then gets the
    sum of all cotangents.
    """
    union = frozenset().union(*map(varying, jax.tree.leaves(tree)))
    return jax.tree.map(lambda x: vary_over(x, union), tree) if union else tree


def zeros_of_type(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Return zeros of a shape of `jax.eval_shape`: split and varying over the same axes."""
    return vary_over(split_as(jnp.zeros(shape.shape, shape.dtype), shape), varying(shape))
