"""What an adapted product keeps of its input until the backward pass.

The gradient of the factors needs the input x, which the frozen model may not keep. Often x is made elementwise of what
it does keep: gelu(h), silu(gate) · up, or a hidden state over its norm, times a weight. Then those are kept, at no
cost in memory, and x is built from them again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from loha_jax.runtime._compat import Literal, bind_equation, open_jaxpr
from loha_jax.runtime.sizes import nominal

_STRUCTURAL = ("reshape", "transpose", "squeeze", "broadcast_in_dim", "convert_element_type", "copy", "neg")
_ELEMENTWISE = {
    *_STRUCTURAL,
    *(
        "add",
        "sub",
        "mul",
        "div",
        "max",
        "min",
        "sign",
        "abs",
        "floor",
        "select_n",
        "clamp",
        "pow",
        "integer_pow",
        "square",
    ),
    *("exp", "exp2", "expm1", "log", "log1p", "logistic", "tanh", "erf", "erfc", "sqrt", "rsqrt", "sin", "cos"),
    *("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "is_finite", "stop_gradient"),
}
_SMALL = 8
"""An array of at most 1/8 of the input's size may be kept beside it."""
_UNKNOWN = 1024
"""The size that an unknown batch or length counts as."""


@dataclasses.dataclass(frozen=True)
class Kept:
    """What is held until the backward pass, and how the input comes from it.

    Attributes:
        values: the arrays that are held.
        build: makes the input from them.
        rebuilds: whether that takes any computation.
    """

    values: tuple[Any, ...]
    build: Callable[[tuple[Any, ...]], jax.Array]
    rebuilds: bool

    @classmethod
    def whole(cls, x: jax.Array) -> Kept:
        """The input itself."""
        return cls((x,), lambda values: values[0], False)


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """How to build an array again.

    Attributes:
        anchors: variables to keep.
        equations: from the anchors to the array, in order.
        result: the array's variable.
    """

    anchors: tuple[Any, ...]
    equations: tuple[Any, ...]
    result: Any

    def build(self, values: tuple[Any, ...]) -> jax.Array:
        """The array, from the values of the anchors."""
        env = dict(zip(self.anchors, values, strict=True))
        for eqn in self.equations:
            inputs = [var.val if isinstance(var, Literal) else env[var] for var in eqn.invars]
            (env[eqn.outvars[0]],) = bind_equation(eqn, inputs)
        return env[self.result]


def find_recipe(var: Any, producers: Mapping[Any, Any]) -> Recipe | None:
    """A recipe for `var` whose anchors the derivative of the model keeps anyway, or None.

    A product or quotient of two computed arrays keeps both for its own derivative, an activation function its argument:
    these are the anchors. On the way there lie operations linear in one array, such as adding a bias or casting.

    Args:
        var: a variable of a jaxpr.
        producers: the equations of that jaxpr by output variable, those of one output only.
    """
    equations: list[Any] = []
    anchors: list[Any] = []
    budget = _size(var) // _SMALL

    def source(operand: Any) -> tuple[Any, list[Any]]:
        """The array behind structural operations, and those operations, last one first."""
        passed = []
        while not isinstance(operand, Literal) and (eqn := producers.get(operand)) is not None:
            if eqn.primitive.name not in _STRUCTURAL or len(eqn.invars) != 1:
                break
            passed.append(eqn)
            operand = eqn.invars[0]
        return operand, passed

    def anchor(operand: Any) -> bool:
        """Keeps an operand, as it was before structural operations; says whether it is a computed array."""
        origin, passed = source(operand)
        equations.extend(passed)
        if isinstance(origin, Literal):
            return False
        if (activation := _activation(producers.get(origin))) is not None:
            equations.append(activation)
            anchors.extend(var for var in activation.invars if not isinstance(var, Literal))
        else:
            anchors.append(origin)
        return origin in producers and _is_floating(origin)

    def is_small(operand: Any) -> bool:
        """Whether an operand may be kept beside another: it is narrow, or a mask."""
        origin, _ = source(operand)
        return isinstance(origin, Literal) or _size(origin) <= budget or not _is_floating(origin)

    current = var
    while True:
        current, passed = source(current)
        equations.extend(passed)
        eqn = None if isinstance(current, Literal) else producers.get(current)
        if _activation(eqn) is not None:
            anchor(current)
            break
        if eqn is None or eqn.primitive.name not in ("mul", "div", "add", "sub"):
            return None
        equations.append(eqn)
        big = [operand for operand in eqn.invars if not is_small(operand)]
        keeps = eqn.primitive.name in ("mul", "div")
        if len(big) != 1:
            if not keeps or not big:
                return None
            for operand in eqn.invars:
                anchor(operand)
            break
        computed = [anchor(operand) for operand in eqn.invars if operand is not big[0]]
        if keeps and any(computed):
            anchor(big[0])
            break
        current = big[0]
    unique = tuple(dict.fromkeys(anchors))
    if any(a is var for a in unique):
        return None
    steps = [eqn for eqn in dict.fromkeys(reversed(equations)) if eqn.outvars[0] not in unique]
    return Recipe(unique, tuple(steps), var)


def _size(var: Any) -> int:
    return nominal(var.aval.shape, _UNKNOWN)


def _is_floating(var: Any) -> bool:
    return jnp.issubdtype(var.aval.dtype, jnp.floating)


def _activation(eqn: Any) -> Any:
    """The equation, if it calls an elementwise function of one array (`jax.nn.silu`), or None."""
    if eqn is None or eqn.primitive.name not in ("jit", "pjit", "custom_jvp_call"):
        return None
    inputs = [var.aval for var in eqn.invars if not isinstance(var, Literal)]
    (result,) = (var.aval for var in eqn.outvars)
    one_to_one = [aval.shape for aval in inputs] == [result.shape] and inputs[0].dtype.itemsize <= result.dtype.itemsize
    return eqn if one_to_one and _is_elementwise(eqn) else None


def _is_elementwise(eqn: Any) -> bool:
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    if inner is None:
        return eqn.primitive.name in _ELEMENTWISE
    return all(_is_elementwise(e) for e in open_jaxpr(inner)[0].eqns)
