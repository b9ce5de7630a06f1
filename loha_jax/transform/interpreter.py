"""Evaluates a jaxpr in which some values are `KernelView`s.

JAX evaluates equations without a view as they are. For the others there is a rule per primitive:
structural operations return another view (`structural_rules`), products are computed by their
strategy (`product_rules`), control flow is called again with an evaluated body
(`control_flow_rules`). An equation without a rule gets the dense weight: slower, never wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from loha_jax.runtime._compat import bind_equation
from loha_jax.transform.input_recomputation import KeptInput, find_recipe
from loha_jax.transform.kernel_view import KernelView, Value
from loha_jax.transform.materialised import dense_kernel
from loha_jax.transform.operation import NoRule
from loha_jax.transform.options import Options
from loha_jax.transform.typed_jax import Operand


def evaluate(
    jaxpr: Jaxpr, consts: Sequence[jax.Array], args: Sequence[Value], options: Options
) -> list[Value]:
    """Return the outputs of a jaxpr for arguments some of which are views.

    An output that is a view stays one.
    """
    env: dict[Var, Value] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    producers: dict[Var, JaxprEqn] = {}  # equations without a view, by their only output

    def read(var: Operand) -> Value:
        return var.val if isinstance(var, Literal) else env[var]

    def read_plain(var: Operand) -> jax.Array:
        value = read(var)
        assert not isinstance(value, KernelView)
        return value

    def keep(var: Operand) -> KeptInput:
        recipe = None if isinstance(var, Literal) else find_recipe(var, producers)
        if recipe is None:
            return KeptInput.whole(read_plain(var))
        return KeptInput(tuple(map(read_plain, recipe.anchors)), recipe.recompute, True)

    for eqn in jaxpr.eqns:
        values = [read(var) for var in eqn.invars]
        if any(isinstance(value, KernelView) for value in values):
            outputs = _evaluate_equation(eqn, values, Context(options, keep))
        else:
            outputs = bind_equation(eqn, values)
            if len(eqn.outvars) == 1:
                producers[eqn.outvars[0]] = eqn
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(var) for var in jaxpr.outvars]


class Context(NamedTuple):
    """The arguments of a rule besides the equation and its operands.

    Attributes:
        options: of the evaluation.
        keep: returns the arrays to keep so that the backward pass can use a variable without a
            view. They may be inputs that recompute it.
    """

    options: Options
    keep: Callable[[Operand], KeptInput]


Outputs = Sequence[Value] | NoRule
Rule = Callable[[JaxprEqn, list[Value], Context], Outputs]
"""Takes an equation, its operands (at least one is a view) and the context; returns its outputs."""

_RULES: dict[str, Rule] = {}
_READERS: set[str] = set()


def register(*primitives: str, reads: bool = False) -> Callable[[Rule], Rule]:
    """Decorate a rule for these primitives.

    Args:
        primitives: their names in a jaxpr.
        reads: True if they compute with the kernel. The observer (`explain`) is told of the use.

    The file with the rule is imported in `adapt.py`.
    """

    def add(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(primitives, rule))
        if reads:
            _READERS.update(primitives)
        return rule

    return add


def _evaluate_equation(eqn: JaxprEqn, values: list[Value], context: Context) -> Sequence[Value]:
    """Return the outputs of an equation that reads a view: by its rule, else with dense weights."""
    name, options = eqn.primitive.name, context.options
    rule = _RULES.get(name)
    if options.observer is not None and (rule is None or name in _READERS):
        for operand, value in enumerate(values):
            if isinstance(value, KernelView):
                options.observer.used(value, eqn, operand)
    result = NoRule("no rule for this primitive") if rule is None else rule(eqn, values, context)
    if isinstance(result, NoRule):
        return bind_equation(eqn, densify_all(values, options, name, result.reason))
    return result


def densify(value: Value, options: Options, primitive: str, reason: str) -> jax.Array:
    """Return a plain array for a view; other values as they are.

    Args:
        value: a view, or anything else.
        options: of the evaluation.
        primitive: the primitive that needs the array.
        reason: why it does.
    """
    if not isinstance(value, KernelView):
        return value
    if options.observer is not None and value.factors:
        options.observer.dense(value.name, value.shape, primitive, reason, options.times)
    return dense_kernel(value, forward_mode=options.forward_mode)


def densify_all(
    values: Sequence[Value], options: Options, primitive: str, reason: str
) -> list[jax.Array]:
    """Return `densify` of each value."""
    return [densify(value, options, primitive, reason) for value in values]
