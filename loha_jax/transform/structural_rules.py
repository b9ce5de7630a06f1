"""Rules for structural operations on an adapted kernel: each returns another view."""

# JAX's own functions are only partly typed.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax

from loha_jax.runtime._compat import bind_equation
from loha_jax.transform.interpreter import Context, register
from loha_jax.transform.kernel_view import KernelView
from loha_jax.transform.operation import NoRule
from loha_jax.transform.packed_kernel import PackedKernel, plain

Outputs = list[Any] | NoRule


def _view_or(view: KernelView | None, reason: str) -> Outputs:
    return NoRule(reason) if view is None else [view]


@register("transpose")
def _transpose(eqn: Any, values: list[Any], _: Context) -> Outputs:
    return [values[0].transpose(eqn.params["permutation"])]


@register("reshape")
def _reshape(eqn: Any, values: list[Any], _: Context) -> Outputs:
    if len(values) != 1:
        return NoRule("a reshape of dynamic shape")
    view, permutation = values[0], eqn.params.get("dimensions")
    if permutation is not None:
        view = view.transpose(permutation)
    return _view_or(
        view.reshape(eqn.params["new_sizes"]), "the reshape mixes in, out or stack axes"
    )


@register("squeeze")
def _squeeze(eqn: Any, values: list[Any], _: Context) -> Outputs:
    return [values[0].squeeze(eqn.params["dimensions"])]


@register("broadcast_in_dim")
def _broadcast_in_dim(eqn: Any, values: list[Any], _: Context) -> Outputs:
    if len(values) != 1:
        return NoRule("a broadcast to a dynamic shape")
    view = values[0].broadcast_in_dim(eqn.params["shape"], eqn.params["broadcast_dimensions"])
    return _view_or(view, "a broadcast to a size that is not known")


@register("convert_element_type")
def _convert_element_type(eqn: Any, values: list[Any], _: Context) -> Outputs:
    return _view_or(
        values[0].convert(eqn.params["new_dtype"]), "a cast to a dtype that is not floating"
    )


@register("rev")
def _rev(eqn: Any, values: list[Any], _: Context) -> Outputs:
    return [values[0].rev(eqn.params["dimensions"])]


@register("slice")
def _slice(eqn: Any, values: list[Any], _: Context) -> Outputs:
    p = eqn.params
    view = values[0].slice(p["start_indices"], p["limit_indices"], p["strides"])
    return _view_or(view, "a slice of an axis that joins several")


@register("dynamic_slice")
def _dynamic_slice(eqn: Any, values: list[Any], _: Context) -> Outputs:
    sizes = eqn.params["slice_sizes"]
    if not isinstance(values[0], KernelView) or len(values) != 1 + len(sizes):
        return NoRule("a slice of dynamic size")
    return _view_or(
        values[0].dynamic_slice(values[1:], sizes), "a slice of an axis that joins several"
    )


@register("split")
def _split(eqn: Any, values: list[Any], _: Context) -> Outputs:
    view, axis, start = values[0], eqn.params["axis"], 0
    parts: list[Any] = []
    for size in eqn.params["sizes"]:
        starts = [start if n == axis else 0 for n in range(len(view.shape))]
        limits = [start + size if n == axis else have for n, have in enumerate(view.shape)]
        part = view.slice(starts, limits, None)
        if part is None:
            return NoRule("a split of an axis that joins several")
        parts.append(part)
        start += size
    return parts


@register("sharding_constraint", "reshard", "pvary", "copy", "copy_p", "optimization_barrier")
def _unchanged(eqn: Any, values: list[Any], _: Context) -> Outputs:
    if len(values) != 1:
        return NoRule("a barrier over several values")
    (view,) = values
    if isinstance(view.kernel, PackedKernel) and eqn.primitive.name in ("copy", "copy_p"):
        return [view]
    return [dataclasses.replace(view, kernel=bind_equation(eqn, [plain(view.kernel)])[0])]


@register("all_gather")
def _all_gather(eqn: Any, values: list[Any], _: Context) -> Outputs:
    p = eqn.params
    if not p["tiled"]:
        return NoRule("a gather into a new axis")

    def gather(x: jax.Array, axis: int) -> jax.Array:
        groups = p["axis_index_groups"]
        name = p["axis_name"]
        return cast(
            jax.Array, lax.all_gather(x, name, axis=axis, tiled=True, axis_index_groups=groups)
        )

    # The factors are sharded like the kernel: `control_flow_rules.shard`.
    return _view_or(
        values[0].cut(p["all_gather_dimension"], gather), "a gather of a part of an in or out axis"
    )


@register("stop_gradient")
def _stop_gradient(eqn: Any, values: list[Any], _: Context) -> Outputs:
    return [jax.tree.map(lax.stop_gradient, values[0])]


@register("mul", "div")
def _scale(eqn: Any, values: list[Any], _: Context) -> Outputs:
    view, factor = values if isinstance(values[0], KernelView) else values[::-1]
    divided = eqn.primitive.name == "div"
    if isinstance(factor, KernelView) or jnp.ndim(factor) or (divided and view is not values[0]):
        return NoRule("arithmetic with the weight")
    return [view.scaled(factor, jnp.divide if divided else jnp.multiply)]
