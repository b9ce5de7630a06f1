"""Rules for functions and control flow: each is called again with an evaluated body."""

# JAX's own functions are only partly typed.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var
from jax.sharding import PartitionSpec

from loha_jax.runtime._compat import bind_equation, open_jaxpr, scan_counts
from loha_jax.runtime.promotion import standard_promotion
from loha_jax.transform.interpreter import (
    Context,
    Outputs,
    densify,
    densify_all,
    evaluate,
    register,
)
from loha_jax.transform.kernel_view import KernelView, Value
from loha_jax.transform.operation import NoRule
from loha_jax.transform.options import Options
from loha_jax.transform.packed_kernel import before_scan, inside_scan, plain
from loha_jax.transform.typed_jax import Operand, map_arrays, with_vjp
from loha_jax.transform.view_factors import ViewFactors
from loha_jax.tree.placement import MeshAxis


@register("jit", "pjit")
def _jit(eqn: JaxprEqn, values: list[Value], context: Context) -> Outputs:
    jaxpr, consts = open_jaxpr(eqn.params["jaxpr"])
    if context.options.observer is not None:
        return evaluate(jaxpr, consts, values, context.options)
    # jax.jit caches by jaxpr: layers that share a jitted function share its evaluation too.
    return cast(Outputs, _jitted(values, consts, jaxpr=jaxpr, options=context.options))


@functools.partial(jax.jit, static_argnames=("jaxpr", "options"))
def _jitted(
    args: list[Value], consts: list[jax.Array], *, jaxpr: Jaxpr, options: Options
) -> list[Value]:
    return evaluate(jaxpr, consts, args, options)


@register("checkpoint", "remat", "remat2")
def _remat(eqn: JaxprEqn, values: list[Value], context: Context) -> Outputs:
    p, options = eqn.params, context.options

    @functools.partial(jax.checkpoint, policy=p["policy"], prevent_cse=p["prevent_cse"])
    def body(values: list[Value]) -> list[jax.Array]:
        outputs = evaluate(p["jaxpr"], (), values, options)
        return densify_all(
            outputs, options, "remat", "a rematerialised function returns the weight"
        )

    return cast(Outputs, body(values))


class _Carry:
    """The carry of a loop. Parts that the body returns unchanged (weights) may stay views.

    Attributes:
        fixed: for each part, whether the body returns it unchanged.
        values: the parts before the loop; those that change are plain arrays.
    """

    def __init__(
        self,
        values: Sequence[Value],
        inputs: Sequence[Var],
        outputs: Sequence[Operand],
        primitive: str,
    ):
        self.fixed = [new is old for old, new in zip(inputs, outputs, strict=True)]
        self.values = list(values)
        self._primitive = primitive

    def changing(self, values: Sequence[Value], options: Options) -> list[jax.Array]:
        """Return the parts that change, as plain arrays."""
        moving = [value for value, fixed in zip(values, self.fixed, strict=True) if not fixed]
        return densify_all(moving, options, self._primitive, "a loop's carry")

    def whole(self, changing: Sequence[jax.Array]) -> list[Value]:
        """Return all parts, in order."""
        rest = iter(changing)
        return [
            value if fixed else next(rest)
            for value, fixed in zip(self.values, self.fixed, strict=True)
        ]


@register("scan")
def _scan(eqn: JaxprEqn, values: list[Value], context: Context) -> Outputs:
    p, options = eqn.params, context.options
    n_consts, n_carry = scan_counts(p)
    jaxpr, body_consts = open_jaxpr(p["jaxpr"])
    consts, xs = values[:n_consts], values[n_consts + n_carry :]
    carry_inputs = jaxpr.invars[n_consts : n_consts + n_carry]
    carry = _Carry(
        values[n_consts : n_consts + n_carry], carry_inputs, jaxpr.outvars[:n_carry], "scan"
    )
    start = carry.changing(carry.values, options)

    scanned: dict[int, _Scanned] = {}
    for n, x in enumerate(xs):
        if not isinstance(x, KernelView):
            continue
        taken = _take_leading(x)
        if taken is None:
            xs[n] = densify(x, options, "scan", "a scan over an in or out axis")
            continue
        atom, view = taken
        if options.observer is not None:
            options.observer.scanned(x, atom)
        outside = None
        if atom is None or view.atoms[atom].kind != "s":
            outside, view = view.factors, dataclasses.replace(view, factors=())
        xs[n], scanned[n] = view, _Scanned(atom, outside)
    inner = options.repeated(p["length"])

    def body(changing: list[jax.Array], xs: list[Value]) -> tuple[list[jax.Array], list[jax.Array]]:
        items = [_item(x, scanned.get(n)) for n, x in enumerate(xs)]
        outputs = evaluate(jaxpr, body_consts, [*consts, *carry.whole(changing), *items], inner)
        ys = densify_all(outputs[n_carry:], inner, "scan", "a scan returns the weight")
        return carry.changing(outputs[:n_carry], inner), ys

    changed, ys = lax.scan(
        body, start, xs, length=p["length"], reverse=p["reverse"], unroll=p["unroll"]
    )
    return [*carry.whole(changed), *ys]


class _Scanned(NamedTuple):
    """A view among the arrays that a scan slices.

    Attributes:
        atom: the atom that the scan takes away; None for an axis of size 1, which has no atom.
        outside: factors without an axis to scan (a broadcast kernel, a stack of one), which come
            from outside the loop; or None.
    """

    atom: int | None
    outside: tuple[ViewFactors, ...] | None


def _item(x: Value, scanned: _Scanned | None) -> Value:
    """Return what the body of a scan gets for a slice: of a view, the leading axis is gone."""
    if scanned is None or not isinstance(x, KernelView):
        return x
    atom, outside = scanned
    x = dataclasses.replace(x, kernel=inside_scan(x.kernel))
    factors = x.factors if outside is None else outside
    if atom is None:
        return dataclasses.replace(x, factors=factors, dims=x.dims[1:])
    dims = tuple(tuple(n - (n > atom) for n in axis) for axis in x.dims[1:])
    atoms = x.atoms[:atom] + x.atoms[atom + 1 :]
    return dataclasses.replace(x, factors=factors, atoms=atoms, dims=dims)


def _take_leading(view: KernelView) -> tuple[int | None, KernelView] | None:
    """Prepare a view to be scanned over its leading axis.

    Returns:
        The atom that the scan takes away (None for an axis of size 1, which has no atom) and the
        view with that atom's axis first in every factor; or None where the leading axis is an in or
        out axis.
    """
    scanned = dataclasses.replace(view, kernel=before_scan(view.kernel))
    if not view.dims[0]:
        return None, scanned
    (atom, *more) = view.dims[0]
    if more or view.atoms[atom].kind not in "sb?":
        return None
    view = scanned
    if view.atoms[atom].kind != "s":
        return atom, view
    at = view.of_kind("s").index(atom)
    factors = map_arrays(lambda x: jnp.moveaxis(x, at, 0), view.factors)
    return atom, dataclasses.replace(view, factors=factors)


@register("while")
def _while(eqn: JaxprEqn, values: list[Value], context: Context) -> Outputs:
    p, options = eqn.params, dataclasses.replace(context.options, base_apart=True)
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    cond_jaxpr, cond_consts = open_jaxpr(p["cond_jaxpr"])
    body_jaxpr, body_consts = open_jaxpr(p["body_jaxpr"])
    cond_args, body_args = values[:n_cond], values[n_cond : n_cond + n_body]
    carry = _Carry(
        values[n_cond + n_body :], body_jaxpr.invars[n_body:], body_jaxpr.outvars, "while"
    )

    def cond(changing: list[jax.Array]) -> Value:
        return evaluate(cond_jaxpr, cond_consts, [*cond_args, *carry.whole(changing)], options)[0]

    def body(changing: list[jax.Array]) -> list[jax.Array]:
        outputs = evaluate(body_jaxpr, body_consts, [*body_args, *carry.whole(changing)], options)
        return carry.changing(outputs, options)

    return carry.whole(lax.while_loop(cond, body, carry.changing(carry.values, options)))


@register("cond")
def _cond(eqn: JaxprEqn, values: list[Value], context: Context) -> Outputs:
    options, (index, *operands) = context.options, values
    if isinstance(index, KernelView):
        return NoRule("a branch chosen by the weight")

    def branch(closed: ClosedJaxpr) -> Callable[[list[Value]], list[jax.Array]]:
        jaxpr, consts = open_jaxpr(closed)

        def run(operands: list[Value]) -> list[jax.Array]:
            outputs = evaluate(jaxpr, consts, operands, options)
            return densify_all(outputs, options, "cond", "a branch returns the weight")

        return run

    return cast(Outputs, lax.switch(index, [branch(b) for b in eqn.params["branches"]], operands))


@register("custom_jvp_call", "custom_vjp_call")
def _custom_derivative(eqn: JaxprEqn, values: list[Value], context: Context) -> Outputs:
    """Evaluate the function itself factored, and its own derivative rule on the dense weight.

    The user's rule is a function of the weight as an array, and its result for the weight is an
    array of that shape.
    """
    jaxpr, consts = open_jaxpr(eqn.params["call_jaxpr"])
    name, options = eqn.primitive.name, context.options

    @standard_promotion()  # also where the derivative is taken later
    def factored(values: list[Value]) -> list[jax.Array]:
        outputs = evaluate(jaxpr, consts, values, options)
        return densify_all(
            outputs, options, name, "a function with its own derivative returns the weight"
        )

    @standard_promotion()
    def dense(values: list[Value]) -> list[jax.Array]:
        # JAX differentiates a custom_jvp forwards, whatever the user asked for.
        quiet = dataclasses.replace(options, observer=None, forward_mode=name == "custom_jvp_call")
        return bind_equation(eqn, densify_all(values, quiet, name, "its derivative"))

    if name == "custom_jvp_call":
        by_jvp = jax.custom_jvp(factored)
        by_jvp.defjvp(functools.partial(jax.jvp, dense))
        return by_jvp(values)
    forward = cast(Callable[..., Any], functools.partial(jax.vjp, dense))
    return with_vjp(factored, forward, operator.call)(values)


@register("shard_map")
def _shard_map(eqn: JaxprEqn, values: list[Value], context: Context) -> Outputs:
    p, options = eqn.params, context.options
    specs = list(p["in_specs"])
    local: dict[int, KernelView] = {}
    for n, value in enumerate(values):
        if isinstance(value, KernelView):
            values[n] = value = dataclasses.replace(value, kernel=plain(value.kernel))
            sharded = shard(value, specs[n], p["mesh"].shape)
            if sharded is None:
                values[n] = densify(
                    value, options, "shard_map", "a shard is no block of the factors"
                )
            else:
                specs[n], local[n] = sharded

    def body(*values: Value) -> list[jax.Array]:
        shards = list(values)
        for n, view in local.items():
            arrays = values[n]
            assert isinstance(arrays, KernelView)
            shards[n] = dataclasses.replace(view, kernel=arrays.kernel, factors=arrays.factors)
        outputs = evaluate(p["jaxpr"], (), shards, options)
        return densify_all(outputs, options, "shard_map", "a shard_map returns the weight")

    mapped = jax.shard_map(
        body,
        mesh=p["mesh"],
        in_specs=tuple(specs),
        out_specs=list(p["out_specs"]),
        check_vma=p["check_vma"],
        axis_names=set(p["newly_manual_axes"]),
    )
    return mapped(*values)


def shard(
    view: KernelView, spec: Sequence[MeshAxis], mesh_shape: Mapping[str, int]
) -> tuple[KernelView, KernelView] | None:
    """Shard a view over the devices of a `shard_map`.

    Args:
        view: the whole kernel.
        spec: per axis of the kernel the mesh axes that it is sharded over; missing ones are None.
        mesh_shape: sizes of the mesh axes.

    Returns:
        The view with a `PartitionSpec` for every array, and the view of one shard, whose arrays are
        still to be filled in; or None where a shard of the kernel is not made from blocks of the
        factors.
    """
    atoms = list(view.atoms)
    split: dict[int, MeshAxis] = {}  # mesh axes by atom
    for dims, axes in zip(view.dims, spec, strict=False):  # axes that the spec leaves out are whole
        count = math.prod(
            mesh_shape[name] for name in (axes if isinstance(axes, tuple) else (axes,)) if name
        )
        if count == 1:
            continue
        if not dims or atoms[dims[0]].size % count:
            return None
        split[dims[0]] = axes
        atoms[dims[0]] = dataclasses.replace(atoms[dims[0]], size=atoms[dims[0]].size // count)
    sides = {side: [n for n in view.of_side(side) if view.atoms[n].size > 1] for side in "oi"}
    if any(n in split for side in sides.values() for n in side[1:]):
        return None
    # Only the outermost atom of an in or out axis is split: a shard is a block of the factors.
    stack = tuple(split.get(n) for n in view.of_kind("s"))
    out, in_ = (split.get(sides[side][0]) if sides[side] else None for side in "oi")
    by_name = {
        **dict.fromkeys(("w1_a", "w2_a", "out_gain"), (*stack, out, None)),
        **dict.fromkeys(("w1_b", "w2_b", "in_gain"), (*stack, None, in_)),
        **dict.fromkeys(("t1", "t2", "scaling"), stack),
    }

    def specs(f: ViewFactors) -> ViewFactors:
        held = {
            name: PartitionSpec(*axes)
            for name, axes in by_name.items()
            if getattr(f, name) is not None
        }
        return dataclasses.replace(f, **held)

    dims = tuple(tuple(n for n in axis if atoms[n].size > 1) for axis in view.dims)
    of_arrays = dataclasses.replace(
        view, kernel=PartitionSpec(*spec), factors=tuple(map(specs, view.factors))
    )
    return of_arrays, dataclasses.replace(view, atoms=tuple(atoms), dims=dims)
