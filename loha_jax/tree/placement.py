"""The places of an adapter's arrays on a mesh: those of the kernel's axes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from loha_jax.lowrank.layout import Layout
from loha_jax.runtime.device_types import explicit_sharding
from loha_jax.tree.factors import Factors
from loha_jax.tree.leaves import LoHaWeight
from loha_jax.tree.quantised import QuantisedArray

MeshAxis = str | tuple[str, ...] | None
"""The mesh axes over which an axis of an array is split, or a logical name for them."""

ArrayOrShape = jax.Array | jax.ShapeDtypeStruct


def factor_axes(
    layout: Layout,
    shape: Sequence[int],
    axes: Iterable[MeshAxis],
    arrays: Mapping[str, ArrayOrShape],
    *,
    cp: bool,
) -> dict[str, tuple[MeshAxis, ...]]:
    """Return what each axis of an adapter's arrays is split over, given the kernel's axes.

    Shard each factor like its kernel: `w*_a` along the output axes, `w*_b` along the input axes and
    then the spatial ones. Stack axes are split like the kernel's, r is not split. PEFT's tensors
    flatten several axes into one; it is split over the outermost of them, because splitting it over
    another would move data.

    Instead of mesh axes the kernel's axes may have logical names.

    Args:
        layout, shape: of the kernel.
        axes: per axis of the kernel a mesh axis, a tuple of some, a logical name, or None; missing
            ones are None.
        arrays: of the adapter, by their names in `Factors`.
        cp: whether it has cores.

    Returns:
        A tuple as long as the array has axes, for every array.

    Example:
        >>> import loha_jax
        >>> base = {"q": {"kernel": jax.numpy.ones((6, 2, 4))}}
        >>> config = loha_jax.LoHaConfig(r=2, target_modules=["q"])
        >>> params = loha_jax.inject(base, config, key=jax.random.key(0), layouts={"q": "ioo"})
        >>> leaf = params["q"]["kernel"]
        >>> arrays = leaf.adapters["default"].tensors
        >>> axes = factor_axes(leaf.layout, leaf.shape, ("fsdp", "tensor", None), arrays, cp=False)
        >>> axes["hada_w1_a"], axes["hada_w1_b"]
        (('tensor', None), (None, 'fsdp'))
    """
    axes = tuple(axes)
    axes += (None,) * (len(shape) - len(axes))
    stack = tuple(axes[axis] for axis in layout.axes("s"))
    spatial = tuple(axes[axis] for axis in layout.axes("k"))

    def outermost(kinds: str) -> MeshAxis:
        return next((axes[a] for kind in kinds for a in layout.axes(kind) if shape[a] > 1), None)

    out, in_ = outermost("o"), outermost("i")
    if cp:
        a, b = (*stack, None, out), (*stack, None, in_)
    else:
        a, b = (*stack, out, None), (*stack, None, outermost("ik"))
    core = (*stack, None, None, *spatial)
    known = {
        "hada_w1_a": a,
        "hada_w2_a": a,
        "hada_w1_b": b,
        "hada_w2_b": b,
        "hada_t1": core,
        "hada_t2": core,
        "scalar": stack,
        "module_index": stack,
        "gate": stack,
        "dora_scale": (*stack, out, in_),  # one of the two axes has size 1
    }
    return {
        name: _padded(known[name], tuple(array.shape), len(stack)) for name, array in arrays.items()
    }


def named_axes(
    names: Sequence[MeshAxis] | None, leaf: LoHaWeight, factors: Factors
) -> dict[str, tuple[MeshAxis, ...]]:
    """Return `factor_axes` of an adapter; {} where there is no name for each axis of the kernel."""
    if names is None or leaf.kernel is None or len(names) != leaf.layout.ndim:
        return {}
    return factor_axes(leaf.layout, leaf.shape, names, factors.arrays, cp=factors.is_cp)


def _padded(
    axes: tuple[MeshAxis, ...], shape: tuple[int, ...], stacked: int
) -> tuple[MeshAxis, ...]:
    """Return as many entries as there are axes, None for those of size 1 after the stack."""
    axes = (*axes, *(None,) * (len(shape) - len(axes)))[: len(shape)]
    return tuple(
        axis if size > 1 or n < stacked else None
        for n, (axis, size) in enumerate(zip(axes, shape, strict=True))
    )


def follow_kernel(
    factors: Factors, kernel: ArrayOrShape | QuantisedArray, layout: Layout
) -> Factors:
    """Return the adapter with its arrays placed like the kernel (`factor_axes`).

    Args:
        factors: new arrays, equal in every process; or their shapes.
        kernel: an array with a `NamedSharding`, on one device, or traced with explicit axes; or its
            shape, with or without a sharding. For any other kernel the arrays are not moved.
        layout: of the kernel.
    """
    sharding = _place_of(kernel)
    if not isinstance(sharding, NamedSharding):
        return factors if sharding is None else jax.tree.map(lambda x: place(x, sharding), factors)
    axes = factor_axes(layout, kernel.shape, sharding.spec, factors.arrays, cp=factors.is_cp)
    placed = {
        name: place(x, NamedSharding(sharding.mesh, PartitionSpec(*axes[name])))
        for name, x in factors.arrays.items()
    }
    return dataclasses.replace(factors, **placed)


def place_like(array: ArrayOrShape, other: ArrayOrShape | QuantisedArray) -> Any:
    """Place an array like another one of its shape."""
    sharding = _place_of(other)
    return array if sharding is None else place(array, sharding)


def _place_of(
    x: ArrayOrShape | QuantisedArray | None,
) -> NamedSharding | SingleDeviceSharding | None:
    """Return the sharding of an array or of a shape; None if nobody has chosen one."""
    if isinstance(x, QuantisedArray):
        return _place_of(x.placed)
    if isinstance(x, Tracer):
        return explicit_sharding(x)
    sharding = getattr(x, "sharding", None)
    on_one = isinstance(sharding, SingleDeviceSharding) and getattr(x, "committed", False)
    return sharding if on_one or isinstance(sharding, NamedSharding) else None


def chosen_sharding(x: object) -> Any:
    """Return the sharding of an array or of a shape; None if JAX may move the array."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.sharding
    return x.sharding if isinstance(x, jax.Array) and getattr(x, "committed", False) else None


def place(array: ArrayOrShape, sharding: Sharding, *, may_alias: bool | None = None) -> Any:
    """Place an array as a sharding says.

    The sharding may have devices of other processes, if all processes have the same array.

    Args:
        array: an array, a typed random key, a shape, or a traced array.
        sharding: the place.
        may_alias: False to copy even an array that is in its place already.
    """
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
    if isinstance(array, Tracer):
        if not isinstance(sharding, NamedSharding):
            return jax.device_put(array, sharding)
        explicit = sharding.mesh.explicit_axes
        return (jax.sharding.reshard if explicit else jax.lax.with_sharding_constraint)(
            array, sharding
        )
    here = not isinstance(array, jax.Array) or array.is_fully_addressable
    if sharding.is_fully_addressable or not here:
        return jax.device_put(array, sharding, may_alias=may_alias)
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        data = place(jax.random.key_data(array), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
    values = np.asarray(array)  # each process has all of them and gives its devices their part
    return jax.make_array_from_callback(values.shape, sharding, values.__getitem__)
