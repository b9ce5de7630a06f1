"""Recomputing an adapted product's input in the backward pass, instead of keeping it.

The gradient of the factors needs the input x, which the frozen model may not keep. Often x is an
elementwise function of arrays that it does keep: gelu(h), silu(gate) · up, or a hidden state over
its norm, times a weight. Then those are kept, at no cost in memory, and x is recomputed from them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from loha_jax.runtime._compat import Literal, bind_equation, open_jaxpr
from loha_jax.runtime.sizes import nominal

_STRUCTURAL = {
    "reshape",
    "transpose",
    "squeeze",
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "neg",
}
# fmt: off
_ELEMENTWISE = _STRUCTURAL | {
    "add", "sub", "mul", "div", "max", "min", "sign", "abs", "floor", "select_n", "clamp", "pow", "integer_pow",
    "square", "exp", "exp2", "expm1", "log", "log1p", "logistic", "tanh", "erf", "erfc", "sqrt", "rsqrt", "sin", "cos",
    "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "is_finite", "stop_gradient",
}
# fmt: on
_SMALL = 8
"""An array of at most 1/8 of the input's size may be kept besides it."""
_UNKNOWN = 1024
"""The size that an unknown batch or length counts as."""


@dataclasses.dataclass(frozen=True)
class KeptInput:
    """Arrays held until the backward pass, and how the input comes from them.

    Attributes:
        arrays: what is held.
        restore: returns the input for those arrays.
        recomputed: whether `restore` computes anything.
    """

    arrays: tuple[Any, ...]
    restore: Callable[[tuple[Any, ...]], jax.Array]
    recomputed: bool

    @classmethod
    def whole(cls, x: jax.Array) -> KeptInput:
        """Keep the input itself."""
        return cls((x,), lambda arrays: arrays[0], False)


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """How an array is recomputed.

    Attributes:
        anchors: variables to keep.
        equations: from the anchors to the array, in order.
        result: the array's variable.
    """

    anchors: tuple[Any, ...]
    equations: tuple[Any, ...]
    result: Any

    def recompute(self, values: tuple[Any, ...]) -> jax.Array:
        """Return the array for the values of the anchors."""
        env = dict(zip(self.anchors, values, strict=True))
        for eqn in self.equations:
            inputs = [var.val if isinstance(var, Literal) else env[var] for var in eqn.invars]
            (env[eqn.outvars[0]],) = bind_equation(eqn, inputs)
        return env[self.result]


def find_recipe(var: Any, producers: Mapping[Any, Any]) -> Recipe | None:
    """Return a recipe for `var` whose anchors the derivative of the model keeps anyway, or None.

    A product or quotient of two computed arrays keeps both for its own derivative, an activation
    function its argument: these are the anchors. Operations linear in one array, such as adding a
    bias or casting, may lie between them and `var`.

    Args:
        var: a variable of a jaxpr.
        producers: the equations of that jaxpr with one output, by output variable.
    """
    search = _Search(producers, _size(var) // _SMALL)
    if not search.walk_back(var):
        return None
    anchors = tuple(dict.fromkeys(search.anchors))
    if any(anchor is var for anchor in anchors):
        return None
    steps = [
        eqn for eqn in dict.fromkeys(reversed(search.equations)) if eqn.outvars[0] not in anchors
    ]
    return Recipe(anchors, tuple(steps), var)


class _Search:
    """A walk from an array back to the anchors it can be recomputed from.

    Attributes:
        producers: equations by their only output variable.
        budget: the size of arrays that may be kept besides the large one.
        anchors: variables to keep.
        equations: those passed, last one first.
    """

    def __init__(self, producers: Mapping[Any, Any], budget: int):
        self.producers = producers
        self.budget = budget
        self.anchors: list[Any] = []
        self.equations: list[Any] = []

    def walk_back(self, var: Any) -> bool:
        """Follow the large operand of each equation; return whether the walk ends at anchors."""
        while True:
            var, passed = self._source(var)
            self.equations.extend(passed)
            eqn = None if isinstance(var, Literal) else self.producers.get(var)
            if _activation(eqn) is not None:
                self._keep(var)
                return True
            if eqn is None or eqn.primitive.name not in ("mul", "div", "add", "sub"):
                return False
            self.equations.append(eqn)
            large = [operand for operand in eqn.invars if not self._is_small(operand)]
            keeps_operands = eqn.primitive.name in ("mul", "div")
            if len(large) != 1:
                if not keeps_operands or not large:
                    return False
                for operand in eqn.invars:
                    self._keep(operand)
                return True
            computed = [self._keep(operand) for operand in eqn.invars if operand is not large[0]]
            if keeps_operands and any(computed):
                self._keep(large[0])
                return True
            var = large[0]

    def _source(self, operand: Any) -> tuple[Any, list[Any]]:
        """Return the array behind structural operations, and those operations, last one first."""
        passed: list[Any] = []
        while not isinstance(operand, Literal) and (eqn := self.producers.get(operand)) is not None:
            if eqn.primitive.name not in _STRUCTURAL or len(eqn.invars) != 1:
                break
            passed.append(eqn)
            operand = eqn.invars[0]
        return operand, passed

    def _keep(self, operand: Any) -> bool:
        """Make an operand, as it was before structural operations, an anchor.

        Returns:
            Whether it is a computed array of floating-point numbers.
        """
        origin, passed = self._source(operand)
        self.equations.extend(passed)
        if isinstance(origin, Literal):
            return False
        if (activation := _activation(self.producers.get(origin))) is not None:
            self.equations.append(activation)
            self.anchors.extend(var for var in activation.invars if not isinstance(var, Literal))
        else:
            self.anchors.append(origin)
        return origin in self.producers and _is_floating(origin)

    def _is_small(self, operand: Any) -> bool:
        """Return whether an operand may be kept besides another: it is narrow, or a mask."""
        origin, _ = self._source(operand)
        return (
            isinstance(origin, Literal) or _size(origin) <= self.budget or not _is_floating(origin)
        )


def _size(var: Any) -> int:
    return nominal(var.aval.shape, _UNKNOWN)


def _is_floating(var: Any) -> bool:
    return jnp.issubdtype(var.aval.dtype, jnp.floating)


def _activation(eqn: Any) -> Any:
    """Return an equation that calls an elementwise function of one array (silu); else None."""
    if eqn is None or eqn.primitive.name not in ("jit", "pjit", "custom_jvp_call"):
        return None
    inputs = [var.aval for var in eqn.invars if not isinstance(var, Literal)]
    (result,) = (var.aval for var in eqn.outvars)
    one_to_one = [aval.shape for aval in inputs] == [result.shape] and inputs[
        0
    ].dtype.itemsize <= result.dtype.itemsize
    return eqn if one_to_one and _is_elementwise(eqn) else None


def _is_elementwise(eqn: Any) -> bool:
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    if inner is None:
        return eqn.primitive.name in _ELEMENTWISE
    return all(_is_elementwise(e) for e in open_jaxpr(inner)[0].eqns)
