"""Evaluates a jaxpr in which some values are `KernelView`s.

Equations without a view are evaluated by JAX as they are. For the others there is a rule per primitive: structural
operations give another view, products are computed factored or fused, control flow is rebuilt around an evaluated body.
What has no rule gets the dense weight: slower, never wrong.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from loha_jax.lowrank.hadamard import float32_or_wider
from loha_jax.runtime._compat import Literal, bind_equation, open_jaxpr, scan_counts
from loha_jax.runtime.device_types import vary_alike
from loha_jax.runtime.promotion import standard_promotion
from loha_jax.runtime.sizes import is_empty, nominal
from loha_jax.transform.convolution import Convolution
from loha_jax.transform.input_recomputation import Kept, find_recipe
from loha_jax.transform.kernel_view import KernelView
from loha_jax.transform.operation import Operation
from loha_jax.transform.product import Product


class Observer(Protocol):
    """Told of every use of a kernel (`explain`, `infer_layouts`); an observed evaluation shares no traces."""

    def used(self, view: KernelView, eqn: Any, operand: int) -> None:
        """An equation that is no structural operation reads the view."""

    def scanned(self, view: KernelView, atom: int | None) -> None:
        """A scan takes the leading axis apart: this atom, or None for an axis of size 1."""

    def computed(self, view: KernelView, operation: Operation, strategy: str, times: int) -> None:
        """A product or convolution is computed by this strategy, `times` times (the scans around it)."""

    def rows(self, view: KernelView, count: int, times: int) -> None:
        """Single positions of an axis are read (an embedding lookup)."""

    def dense(self, name: str, shape: tuple[int, ...], primitive: str, reason: str, times: int) -> None:
        """The weight is formed for an operation that has no other form."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How adapted products are evaluated; hashable, so that equal inner functions share traces.

    Attributes:
        strategy: "auto", "factored", "fused", "dense", or `((regex, strategy), …)` by module name.
        training: whether costs count the backward pass.
        forward_mode: plain products that `jax.jvp` can differentiate, instead of `custom_vjp`.
        observer: told of every use, or None.
        times: trip count of the scans around the current equation, for the observer.
    """

    strategy: Any = "auto"
    training: bool = True
    forward_mode: bool = False
    observer: Observer | None = None
    times: int = 1

    def repeated(self, times: int) -> Options:
        """The options inside a loop."""
        return self if self.observer is None else dataclasses.replace(self, times=self.times * times)


def evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], options: Options) -> list[Any]:
    """The outputs of a jaxpr for arguments some of which are views; an output that is a view stays one."""
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(var: Any) -> Any:
        return var.val if isinstance(var, Literal) else env[var]

    def kept(var: Any) -> Kept:
        recipe = None if isinstance(var, Literal) else find_recipe(var, producers)
        if recipe is None:
            return Kept.whole(read(var))
        return Kept(tuple(map(read, recipe.anchors)), recipe.build, True)

    producers: dict[Any, Any] = {}  # equations without a view, by their only output
    for eqn in jaxpr.eqns:
        values = [read(var) for var in eqn.invars]
        if any(isinstance(value, KernelView) for value in values):
            outputs = _evaluate_equation(eqn, values, options, kept)
        else:
            outputs = bind_equation(eqn, values)
            if len(eqn.outvars) == 1:
                producers[eqn.outvars[0]] = eqn
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(var) for var in jaxpr.outvars]


def densify(value: Any, options: Options, primitive: str, reason: str) -> Any:
    """A plain array for a view; other values as they are."""
    if not isinstance(value, KernelView):
        return value
    if options.observer is not None:
        options.observer.dense(value.name, value.shape, primitive, reason, options.times)
    return value.dense(forward_mode=options.forward_mode)


Rule = Callable[[Any, list[Any], Options], "list[Any] | _Computation | str"]
_RULES: dict[str, Rule] = {}


def _rule(*primitives: str) -> Callable[[Rule], Rule]:
    def register(fn: Rule) -> Rule:
        _RULES.update(dict.fromkeys(primitives, fn))
        return fn

    return register


def _evaluate_equation(eqn: Any, values: list[Any], options: Options, kept: Callable[[Any], Kept]) -> list[Any]:
    name = eqn.primitive.name
    rule = _RULES.get(name)
    if options.observer is not None and (rule is None or name in _READERS):
        for operand, value in enumerate(values):
            if isinstance(value, KernelView):
                options.observer.used(value, eqn, operand)
    reason = "no rule for this primitive"
    if rule is not None:
        result = rule(eqn, values, options)
        if isinstance(result, _Computation):
            result = [result.run(kept, options)]
        if not isinstance(result, str):
            return result
        reason = result
    return bind_equation(eqn, [densify(value, options, name, reason) for value in values])


# --- structural operations --------------------------------------------------------------------------------------------


def _view_or(view: KernelView | None, reason: str) -> list[Any] | str:
    return reason if view is None else [view]


@_rule("transpose")
def _transpose(eqn, values, options):
    return [values[0].transpose(eqn.params["permutation"])]


@_rule("reshape")
def _reshape(eqn, values, options):
    if len(values) != 1:
        return "a reshape of dynamic shape"
    view, permutation = values[0], eqn.params.get("dimensions")
    if permutation is not None:
        view = view.transpose(permutation)
    return _view_or(view.reshape(eqn.params["new_sizes"]), "the reshape mixes in, out or stack axes")


@_rule("squeeze")
def _squeeze(eqn, values, options):
    return [values[0].squeeze(eqn.params["dimensions"])]


@_rule("broadcast_in_dim")
def _broadcast_in_dim(eqn, values, options):
    if len(values) != 1:
        return "a broadcast to a dynamic shape"
    view = values[0].broadcast_in_dim(eqn.params["shape"], eqn.params["broadcast_dimensions"])
    return _view_or(view, "a broadcast to a size that is not known")


@_rule("convert_element_type")
def _convert_element_type(eqn, values, options):
    return _view_or(values[0].convert(eqn.params["new_dtype"]), "a cast to a dtype that is not floating")


@_rule("rev")
def _rev(eqn, values, options):
    return [values[0].rev(eqn.params["dimensions"])]


@_rule("slice")
def _slice(eqn, values, options):
    p = eqn.params
    view = values[0].slice(p["start_indices"], p["limit_indices"], p["strides"])
    return _view_or(view, "a slice of an axis that joins several")


@_rule("dynamic_slice")
def _dynamic_slice(eqn, values, options):
    sizes = eqn.params["slice_sizes"]
    if not isinstance(values[0], KernelView) or len(values) != 1 + len(sizes):
        return "a slice of dynamic size"
    return _view_or(values[0].dynamic_slice(values[1:], sizes), "a slice of an axis that joins several")


@_rule("split")
def _split(eqn, values, options):
    view, axis, start, parts = values[0], eqn.params["axis"], 0, []
    for size in eqn.params["sizes"]:
        starts = [start if n == axis else 0 for n in range(len(view.shape))]
        limits = [start + size if n == axis else have for n, have in enumerate(view.shape)]
        part = view.slice(starts, limits, None)
        if part is None:
            return "a split of an axis that joins several"
        parts.append(part)
        start += size
    return parts


@_rule("sharding_constraint", "reshard", "pvary", "copy", "copy_p", "optimization_barrier")
def _unchanged(eqn, values, options):
    if len(values) != 1:
        return "a barrier over several values"
    return [values[0].map_kernel(lambda kernel: bind_equation(eqn, [kernel])[0])]


@_rule("all_gather")
def _all_gather(eqn, values, options):
    p = eqn.params
    if not p["tiled"]:
        return "a gather into a new axis"

    def gather(x: jax.Array, axis: int) -> jax.Array:
        groups = p["axis_index_groups"]
        return lax.all_gather(x, p["axis_name"], axis=axis, tiled=True, axis_index_groups=groups)

    # The factors are split as the kernel is: `KernelView.split`.
    return _view_or(values[0].cut(p["all_gather_dimension"], gather), "a gather of a part of an in or out axis")


@_rule("stop_gradient")
def _stop_gradient(eqn, values, options):
    return [jax.tree.map(lax.stop_gradient, values[0])]


@_rule("mul", "div")
def _scale(eqn, values, options):
    view, factor = values if isinstance(values[0], KernelView) else values[::-1]
    if isinstance(factor, KernelView) or jnp.ndim(factor) or (eqn.primitive.name == "div" and view is not values[0]):
        return "arithmetic with the weight"
    return [view.scaled(factor, {"mul": jnp.multiply, "div": jnp.divide}[eqn.primitive.name])]


# --- products ---------------------------------------------------------------------------------------------------------


_UNPLACED = "a weight decomposition whose norms go with neither the operand nor the result"

_READERS = ("dot_general", "conv_general_dilated", "gather")


@_rule("dot_general")
def _dot_general(eqn, values, options):
    lhs, rhs = values
    if isinstance(lhs, KernelView) and isinstance(rhs, KernelView):
        return "a product of two adapted weights"
    kernel_first = isinstance(lhs, KernelView)
    view, x = (lhs, rhs) if kernel_first else (rhs, lhs)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return "a product with an operand that is not floating"
    if not view.factors:
        return [bind_equation(eqn, [v.kernel if isinstance(v, KernelView) else v for v in values])[0]]
    product = Product.of(view, x, kernel_first, eqn.params)
    if isinstance(product, str):
        return product
    if product.gain_factors(x, view) is None:
        return _UNPLACED
    return _Computation(product, view, x, eqn.invars[int(kernel_first)])


@_rule("conv_general_dilated")
def _conv_general_dilated(eqn, values, options):
    x, view = values
    if not isinstance(view, KernelView) or isinstance(x, KernelView):
        return "the weight is what a convolution slides over"
    if not view.factors:
        return bind_equation(eqn, [x, view.kernel])
    convolution = Convolution.of(view, x, eqn.outvars[0].aval.shape, eqn.params)
    if isinstance(convolution, str):
        return convolution
    if convolution.gain_factors(x, view) is None:
        return _UNPLACED
    return _Computation(convolution, view, x, eqn.invars[0])


@dataclasses.dataclass(frozen=True)
class _Computation:
    """An operation that a rule has understood, on its operands; `x_var` is the plain one's variable."""

    operation: Operation
    view: KernelView
    x: Any
    x_var: Any

    def run(self, kept: Callable[[Any], Kept], options: Options) -> jax.Array:
        kept_x = kept(self.x_var)
        operation, (view, x, values) = self.operation, vary_alike((self.view, self.x, kept_x.values))
        kept_x = dataclasses.replace(kept_x, values=values)
        strategy = _strategy(options.strategy, view.name)
        if strategy == "auto":
            strategy = operation.choose(view, options.training)
        if strategy == "fused" and options.forward_mode:
            strategy = "dense"  # without a custom_vjp the two are the same
        if options.observer is not None:
            options.observer.computed(view, operation, strategy, options.times)
        if is_empty(x.shape):  # no rows, or nothing is summed: the update is as empty, or zero
            return operation.apply(x, view.kernel)
        if strategy == "factored":
            return operation.factored(x, view, options.forward_mode, kept_x)
        if strategy == "fused":
            return operation.fused(x, view, kept_x)
        return operation.apply(x, view.dense(forward_mode=options.forward_mode))


def _strategy(strategy: Any, name: str) -> str:
    if isinstance(strategy, str):
        return strategy
    return next((chosen for pattern, chosen in strategy if pattern.fullmatch(name)), "auto")


@_rule("gather")
def _gather(eqn, values, options):
    view, indices = values
    if not isinstance(view, KernelView) or isinstance(indices, KernelView):
        return "a gather by adapted indices"
    row = _row_axis(eqn.params, view.shape)
    if row is None:
        return "a gather of other than whole rows"
    if not view.factors:
        return bind_equation(eqn, [view.kernel, indices])
    axis, column = row
    positions = indices[..., column : column + 1]

    def gather(table: jax.Array) -> jax.Array:
        return lax.gather(
            table,
            positions,
            lax.GatherDimensionNumbers(
                offset_dims=(indices.ndim - 1,), collapsed_slice_dims=(0,), start_index_map=(0,)
            ),
            slice_sizes=(1, table.shape[1]),
            mode=eqn.params["mode"],
            fill_value=0,  # the base's rows hold the caller's own value
        )

    delta = view.rows(axis, gather, forward_mode=options.forward_mode)
    if delta is None:
        return "a gather along a stack axis or along one of several in or out axes"
    if options.observer is not None:
        options.observer.rows(view, nominal(delta.shape[:-1]), options.times)
    base = bind_equation(eqn, [view.kernel, indices])[0]
    numbers = eqn.params["dimension_numbers"]
    count = len(numbers.offset_dims)
    if not numbers.collapsed_slice_dims:
        delta = jnp.expand_dims(delta, delta.ndim - count + 1 + axis)
    delta = jnp.moveaxis(delta, tuple(range(delta.ndim - count, delta.ndim)), numbers.offset_dims)
    return [(base.astype(float32_or_wider(base.dtype, delta.dtype)) + delta).astype(base.dtype)]


def _row_axis(params: Mapping[str, Any], shape: Sequence[int]) -> tuple[int, int] | None:
    """For a gather of single positions along one axis: the axis, and where among the indices its positions stand.

    None for any other gather. A vmap of `table[i]` has indices for the other axes too, which are read whole: they are
    clipped to 0.
    """
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    axes = [axis for axis, (size, have) in enumerate(zip(sizes, shape, strict=True)) if size != have]
    if len(axes) != 1 or sizes[axes[0]] != 1 or tuple(numbers.collapsed_slice_dims) not in ((), tuple(axes)):
        return None
    if numbers.operand_batching_dims or numbers.start_indices_batching_dims or axes[0] not in numbers.start_index_map:
        return None
    if len(numbers.start_index_map) > 1 and params["mode"] != lax.GatherScatterMode.CLIP:
        return None
    return axes[0], numbers.start_index_map.index(axes[0])


# --- functions and control flow ---------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("jaxpr", "options"))
def _jitted(args: list[Any], consts: list[Any], *, jaxpr: Any, options: Options) -> list[Any]:
    return evaluate(jaxpr, consts, args, options)


@_rule("jit", "pjit")
def _jit(eqn, values, options):
    jaxpr, consts = open_jaxpr(eqn.params["jaxpr"])
    if options.observer is not None:
        return evaluate(jaxpr, consts, values, options)
    # jax.jit caches by jaxpr: layers that share a jitted function share its evaluation too.
    return _jitted(values, consts, jaxpr=jaxpr, options=options)


@_rule("checkpoint", "remat", "remat2")
def _remat(eqn, values, options):
    p = eqn.params

    @functools.partial(jax.checkpoint, policy=p["policy"], prevent_cse=p["prevent_cse"])
    def body(values):
        outputs = evaluate(p["jaxpr"], (), values, options)
        return [densify(o, options, "remat", "a rematerialised function returns the weight") for o in outputs]

    return body(values)


@_rule("scan")
def _scan(eqn, values, options):
    p = eqn.params
    n_consts, n_carry = scan_counts(p)
    jaxpr, body_consts = open_jaxpr(p["jaxpr"])
    consts, carry, xs = values[:n_consts], values[n_consts : n_consts + n_carry], values[n_consts + n_carry :]
    # A carry that the body hands on unchanged is a constant: the weight need not be formed for it.
    fixed = [jaxpr.outvars[n] is jaxpr.invars[n_consts + n] for n in range(n_carry)]
    carry = [c if keep else densify(c, options, "scan", "a loop's carry") for c, keep in zip(carry, fixed, strict=True)]

    leading: dict[int, int | None] = {}
    for n, x in enumerate(xs):
        if isinstance(x, KernelView):
            taken = x.take_leading()
            if taken is None:
                xs[n] = densify(x, options, "scan", "a scan over an in or out axis")
            else:
                leading[n], xs[n] = taken
                if options.observer is not None:
                    options.observer.scanned(x, leading[n])
    # Factors that have no axis for the scan to take (a broadcast kernel, a stack of one) come from outside.
    broadcast = {n: xs[n].factors for n, atom in leading.items() if atom is None or xs[n].atoms[atom].kind != "s"}
    sliced = [dataclasses.replace(x, factors=()) if n in broadcast else x for n, x in enumerate(xs)]
    leaves, treedef = jax.tree.flatten(sliced)
    moving = [c for c, keep in zip(carry, fixed, strict=True) if not keep]
    inner = options.repeated(p["length"])

    def body(moving, leaves):
        rest = iter(moving)
        carried = [c if keep else next(rest) for c, keep in zip(carry, fixed, strict=True)]
        items = list(treedef.unflatten(leaves))
        for n, atom in leading.items():
            items[n] = items[n].without_leading(atom)
            if n in broadcast:
                items[n] = dataclasses.replace(items[n], factors=broadcast[n])
        outputs = evaluate(jaxpr, body_consts, [*consts, *carried, *items], inner)
        new = [o for o, keep in zip(outputs[:n_carry], fixed, strict=True) if not keep]
        ys = [densify(o, inner, "scan", "a scan returns the weight") for o in outputs[n_carry:]]
        return [densify(o, inner, "scan", "a loop's carry") for o in new], ys

    moving, ys = lax.scan(body, moving, leaves, length=p["length"], reverse=p["reverse"], unroll=p["unroll"])
    rest = iter(moving)
    return [*(c if keep else next(rest) for c, keep in zip(carry, fixed, strict=True)), *ys]


@_rule("while")
def _while(eqn, values, options):
    p = eqn.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    cond_jaxpr, cond_consts = open_jaxpr(p["cond_jaxpr"])
    body_jaxpr, body_consts = open_jaxpr(p["body_jaxpr"])
    cond_args, body_args, carry = values[:n_cond], values[n_cond : n_cond + n_body], values[n_cond + n_body :]
    fixed = [body_jaxpr.outvars[n] is body_jaxpr.invars[n_body + n] for n in range(len(carry))]
    carry = [
        c if keep else densify(c, options, "while", "a loop's carry") for c, keep in zip(carry, fixed, strict=True)
    ]

    def fill(moving):
        rest = iter(moving)
        return [c if keep else next(rest) for c, keep in zip(carry, fixed, strict=True)]

    def cond(moving):
        return evaluate(cond_jaxpr, cond_consts, [*cond_args, *fill(moving)], options)[0]

    def body(moving):
        outputs = evaluate(body_jaxpr, body_consts, [*body_args, *fill(moving)], options)
        return [
            densify(o, options, "while", "a loop's carry") for o, keep in zip(outputs, fixed, strict=True) if not keep
        ]

    return fill(lax.while_loop(cond, body, [c for c, keep in zip(carry, fixed, strict=True) if not keep]))


@_rule("cond")
def _cond(eqn, values, options):
    index, *operands = values
    if isinstance(index, KernelView):
        return "a branch chosen by the weight"

    def branch(closed):
        jaxpr, consts = open_jaxpr(closed)

        def run(operands):
            outputs = evaluate(jaxpr, consts, operands, options)
            return [densify(o, options, "cond", "a branch returns the weight") for o in outputs]

        return run

    return lax.switch(index, [branch(b) for b in eqn.params["branches"]], operands)


@_rule("shard_map")
def _shard_map(eqn, values, options):
    p = eqn.params
    specs = list(p["in_specs"])
    local: dict[int, KernelView] = {}
    for n, value in enumerate(values):
        if isinstance(value, KernelView):
            split = value.split(specs[n], p["mesh"].shape)
            if split is None:
                values[n] = densify(value, options, "shard_map", "a shard is no block of the factors")
            else:
                specs[n], local[n] = split

    def body(*values):
        shards = list(values)
        for n, view in local.items():
            shards[n] = dataclasses.replace(view, kernel=values[n].kernel, factors=values[n].factors)
        outputs = evaluate(p["jaxpr"], (), shards, options)
        return [densify(o, options, "shard_map", "a shard_map returns the weight") for o in outputs]

    mapped = jax.shard_map(
        body,
        mesh=p["mesh"],
        in_specs=tuple(specs),
        out_specs=list(p["out_specs"]),
        check_vma=p["check_vma"],
        axis_names=set(p["newly_manual_axes"]),
    )
    return mapped(*values)


@_rule("custom_jvp_call", "custom_vjp_call")
def _custom_derivative(eqn, values, options):
    """The function itself is evaluated factored; its own derivative rule, where it is asked for, on the dense weight.

    The user's rule is a function of the weight as an array, and its result for the weight is an array of that shape.
    """
    closed = eqn.params["call_jaxpr"]
    jaxpr, consts = open_jaxpr(closed)
    name = eqn.primitive.name

    @standard_promotion()  # also where the derivative is taken later
    def factored(values):
        outputs = evaluate(jaxpr, consts, values, options)
        return [densify(o, options, name, "a function with its own derivative returns the weight") for o in outputs]

    @standard_promotion()
    def dense(values):
        # JAX differentiates a custom_jvp forwards, whatever the user asked for.
        quiet = dataclasses.replace(options, observer=None, forward_mode=name == "custom_jvp_call")
        return bind_equation(eqn, [densify(v, quiet, name, "its derivative") for v in values])

    if name == "custom_jvp_call":
        fn = jax.custom_jvp(factored)
        fn.defjvp(lambda primals, tangents: jax.jvp(dense, primals, tangents))
    else:
        fn = jax.custom_vjp(factored)
        fn.defvjp(lambda values: jax.vjp(dense, values), lambda pullback, cotangents: pullback(cotangents))
    return fn(values)
