"""Recomputing an adapted product's input in the backward pass, instead of keeping it.

The gradient of the factors needs the input x, which the frozen model may not keep. Often x is an
elementwise function of arrays that it does keep: gelu(h), silu(gate) · up, or a hidden state over
its norm, times a weight. Then those are kept, at no cost in memory, and x is recomputed from them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Literal, Var

from loha_jax.runtime._compat import bind_equation, open_jaxpr
from loha_jax.runtime.sizes import nominal
from loha_jax.transform.typed_jax import Operand, array_type

_STRUCTURAL = {
    *("reshape", "transpose", "squeeze", "broadcast_in_dim", "convert_element_type", "copy", "neg"),
}
_ELEMENTWISE = _STRUCTURAL | {
    *("add", "sub", "mul", "div", "max", "min", "sign", "abs", "floor", "select_n", "clamp"),
    *("pow", "integer_pow", "square", "exp", "exp2", "expm1", "log", "log1p", "logistic", "tanh"),
    *("erf", "erfc", "sqrt", "rsqrt", "sin", "cos", "eq", "ne", "lt", "le", "gt", "ge"),
    *("and", "or", "not", "is_finite", "stop_gradient"),
}
_SMALL = 8
"""An array of at most 1/8 of the input's size may be kept besides it."""
_UNKNOWN = 1024
"""The size that an unknown batch or length counts as."""


Producers = Mapping[Var, JaxprEqn]
"""Equations by their only output."""


@dataclasses.dataclass(frozen=True)
class KeptInput:
    """Arrays held until the backward pass, and how the input comes from them.

    Attributes:
        arrays: what is held.
        restore: returns the input for those arrays.
        recomputed: whether `restore` computes anything.
    """

    arrays: tuple[jax.Array, ...]
    restore: Callable[[tuple[jax.Array, ...]], jax.Array]
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

    anchors: tuple[Var, ...]
    equations: tuple[JaxprEqn, ...]
    result: Var

    def recompute(self, values: tuple[jax.Array, ...]) -> jax.Array:
        """Return the array for the values of the anchors."""
        env = dict(zip(self.anchors, values, strict=True))
        for eqn in self.equations:
            inputs = [var.val if isinstance(var, Literal) else env[var] for var in eqn.invars]
            (env[eqn.outvars[0]],) = bind_equation(eqn, inputs)
        return env[self.result]


def find_recipe(var: Var, producers: Producers) -> Recipe | None:
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

    def __init__(self, producers: Producers, budget: int):
        self.producers = producers
        self.budget = budget
        self.anchors: list[Var] = []
        self.equations: list[JaxprEqn] = []

    def walk_back(self, var: Operand) -> bool:
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

    def _source(self, operand: Operand) -> tuple[Operand, list[JaxprEqn]]:
        """Return the array behind structural operations, and those operations, last one first."""
        passed: list[JaxprEqn] = []
        while not isinstance(operand, Literal) and (eqn := self.producers.get(operand)) is not None:
            if eqn.primitive.name not in _STRUCTURAL or len(eqn.invars) != 1:
                break
            passed.append(eqn)
            operand = eqn.invars[0]
        return operand, passed

    def _keep(self, operand: Operand) -> bool:
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

    def _is_small(self, operand: Operand) -> bool:
        """Return whether an operand may be kept besides another: it is narrow, or a mask."""
        origin, _ = self._source(operand)
        return (
            isinstance(origin, Literal) or _size(origin) <= self.budget or not _is_floating(origin)
        )


def _size(var: Operand) -> int:
    return nominal(array_type(var).shape, _UNKNOWN)


def _is_floating(var: Operand) -> bool:
    return jnp.issubdtype(array_type(var).dtype, jnp.floating)


def _activation(eqn: JaxprEqn | None) -> JaxprEqn | None:
    """Return an equation that calls an elementwise function of one array (silu); else None."""
    if eqn is None or eqn.primitive.name not in ("jit", "pjit", "custom_jvp_call"):
        return None
    inputs = [array_type(var) for var in eqn.invars if not isinstance(var, Literal)]
    (result,) = map(array_type, eqn.outvars)
    narrow = [x.shape for x in inputs if x.dtype.itemsize <= result.dtype.itemsize]
    one_to_one = len(inputs) == 1 and narrow == [result.shape]
    return eqn if one_to_one and _is_elementwise(eqn) else None


def _is_elementwise(eqn: JaxprEqn) -> bool:
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    if inner is None:
        return eqn.primitive.name in _ELEMENTWISE
    return all(_is_elementwise(e) for e in open_jaxpr(inner)[0].eqns)
