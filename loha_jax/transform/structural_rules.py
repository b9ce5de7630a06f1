"""Rules for structural operations on an adapted kernel: each returns another view."""

# JAX's own functions are only partly typed.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

from loha_jax.runtime._compat import bind_equation
from loha_jax.transform.interpreter import Context, Outputs, register
from loha_jax.transform.kernel_view import KernelView, Value
from loha_jax.transform.operation import NoRule
from loha_jax.transform.packed_kernel import PackedKernel, plain
from loha_jax.transform.typed_jax import map_arrays

Follower = Callable[[JaxprEqn, KernelView], KernelView | None]
"""Takes an equation and its only operand; returns its only output, or None if it cannot follow."""


SAME_ARRAY = (
    *("sharding_constraint", "reshard", "pvary"),
    *("copy", "copy_p", "optimization_barrier", "name"),
)
"""Primitives whose result is their operand, to a reader of its values and its shape."""


def _follow(*primitives: str, fails: str = "") -> Callable[[Follower], Follower]:
    """Decorate a rule for primitives with one operand.

    Args:
        primitives: their names in a jaxpr.
        fails: what the equation does where the rule returns None.
    """

    def add(follow: Follower) -> Follower:
        def rule(eqn: JaxprEqn, values: list[Value], _: Context) -> Outputs:
            view = values[0]
            if len(values) != 1 or not isinstance(view, KernelView):
                return NoRule(f"a {eqn.primitive.name} of several values, or of dynamic size")
            result = follow(eqn, view)
            return NoRule(fails) if result is None else [result]

        register(*primitives)(rule)
        return follow

    return add


@_follow("transpose")
def _transpose(eqn: JaxprEqn, view: KernelView) -> KernelView:
    return view.transpose(eqn.params["permutation"])


@_follow("reshape", fails="the reshape mixes in, out or stack axes")
def _reshape(eqn: JaxprEqn, view: KernelView) -> KernelView | None:
    permutation = eqn.params.get("dimensions")
    if permutation is not None:
        view = view.transpose(permutation)
    return view.reshape(eqn.params["new_sizes"])


@_follow("squeeze")
def _squeeze(eqn: JaxprEqn, view: KernelView) -> KernelView:
    return view.squeeze(eqn.params["dimensions"])


@_follow("broadcast_in_dim", fails="a broadcast to a size that is not known")
def _broadcast_in_dim(eqn: JaxprEqn, view: KernelView) -> KernelView | None:
    return view.broadcast_in_dim(eqn.params["shape"], eqn.params["broadcast_dimensions"])


@_follow("convert_element_type", fails="a cast to a dtype that is not floating")
def _convert_element_type(eqn: JaxprEqn, view: KernelView) -> KernelView | None:
    return view.convert(eqn.params["new_dtype"])


@_follow("rev")
def _rev(eqn: JaxprEqn, view: KernelView) -> KernelView:
    return view.rev(eqn.params["dimensions"])


@_follow("slice", fails="a slice of an axis that joins several")
def _slice(eqn: JaxprEqn, view: KernelView) -> KernelView | None:
    p = eqn.params
    return view.slice(p["start_indices"], p["limit_indices"], p["strides"])


@_follow(*SAME_ARRAY)
def _unchanged(eqn: JaxprEqn, view: KernelView) -> KernelView:
    if isinstance(view.kernel, PackedKernel) and eqn.primitive.name in ("copy", "copy_p"):
        return view
    return dataclasses.replace(view, kernel=bind_equation(eqn, [plain(view.kernel)])[0])


@_follow("all_gather", fails="a gather into a new axis, or of a part of an in or out axis")
def _all_gather(eqn: JaxprEqn, view: KernelView) -> KernelView | None:
    p = eqn.params
    groups, name = p["axis_index_groups"], p["axis_name"]

    def gather(x: jax.Array, axis: int) -> jax.Array:
        return cast(
            jax.Array, lax.all_gather(x, name, axis=axis, tiled=True, axis_index_groups=groups)
        )

    # The factors are sharded like the kernel: `control_flow_rules.shard`.
    return view.cut(p["all_gather_dimension"], gather) if p["tiled"] else None


@_follow("stop_gradient")
def _stop_gradient(eqn: JaxprEqn, view: KernelView) -> KernelView:
    return map_arrays(lax.stop_gradient, view)


@register("dynamic_slice")
def _dynamic_slice(eqn: JaxprEqn, values: list[Value], _: Context) -> Outputs:
    sizes, (view, *given) = eqn.params["slice_sizes"], values
    starts = [start for start in given if not isinstance(start, KernelView)]
    if not isinstance(view, KernelView) or len(starts) != len(sizes):
        return NoRule("a slice of dynamic size")
    result = view.dynamic_slice(starts, sizes)
    return NoRule("a slice of an axis that joins several") if result is None else [result]


@register("split")
def _split(eqn: JaxprEqn, values: list[Value], _: Context) -> Outputs:
    (view,), axis, start = values, eqn.params["axis"], 0
    assert isinstance(view, KernelView)
    parts: list[KernelView] = []
    for size in eqn.params["sizes"]:
        starts = [start if n == axis else 0 for n in range(len(view.shape))]
        limits = [start + size if n == axis else have for n, have in enumerate(view.shape)]
        part = view.slice(starts, limits, None)
        if part is None:
            return NoRule("a split of an axis that joins several")
        parts.append(part)
        start += size
    return parts


@register("mul", "div")
def _scale(eqn: JaxprEqn, values: list[Value], _: Context) -> Outputs:
    view, factor = values if isinstance(values[0], KernelView) else values[::-1]
    divided = eqn.primitive.name == "div"
    if (
        not isinstance(view, KernelView)
        or isinstance(factor, KernelView)
        or jnp.ndim(factor)
        or (divided and view is not values[0])
    ):
        return NoRule("arithmetic with the weight")
    return [view.scaled(factor, jnp.divide if divided else jnp.multiply)]
