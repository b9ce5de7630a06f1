"""Operands of a product that are parameters of the running module, and their layouts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.core import Tracer

from loha_jax.qwix._qwix_internals import is_quantised
from loha_jax.transform.structural_rules import SAME_ARRAY

if TYPE_CHECKING:
    from loha_jax.qwix._qwix_internals import WithAux

_SAME_AXES = {*SAME_ARRAY, "convert_element_type", "reshape", "device_put"}
"""Primitives after which an array has the values of its operand, in the same order."""


def holds(operand: jax.Array | WithAux, parameter: jax.Array | WithAux) -> bool:
    """Return whether an operand has the values of a parameter, in the same order.

    It may have been cast or reshaped. A traced operand is followed back to what it was made of; the
    values of a concrete one are compared.
    """
    if is_quantised(operand) or is_quantised(parameter):
        if not (is_quantised(operand) and is_quantised(parameter)):
            return False
        return operand.array.qvalue is parameter.array.qvalue
    if operand is parameter:
        return True
    if operand.size != parameter.size:
        return False
    value, known = _untransformed(operand), _untransformed(parameter)
    if value is None or known is None:
        return operand.shape == parameter.shape
    while isinstance(value, Tracer):
        if value is known:
            return True
        equation = getattr(value, "parent", None)
        if equation is None:
            value = getattr(value, "get_const", lambda: None)()
            return value is not None and _equal(value, known)
        if equation.primitive.name not in _SAME_AXES or len(equation.in_tracers) != 1:
            return False
        value = equation.in_tracers[0]
    return _equal(value, known)


def _untransformed(x: jax.Array) -> jax.Array | None:
    """Return what a derivative's tracer or a batched one stands for; None if that is not known."""
    value: jax.Array | None = x
    while isinstance(value, Tracer) and not hasattr(value, "parent"):
        value = getattr(value, "primal", getattr(value, "val", None))
    return value


def _equal(value: jax.Array, parameter: jax.Array) -> bool:
    if value is parameter:
        return True
    if isinstance(parameter, Tracer) or value.size != parameter.size:
        return False
    cast = parameter.astype(value.dtype).reshape(value.shape)
    with jax.ensure_compile_time_eval():
        return bool(jnp.array_equal(value, cast, equal_nan=True))


def product_word(
    ndim: int, contracted: Sequence[int], batch: Sequence[int], conv_spatial: Sequence[int] = ()
) -> str:
    """Return the layout of a kernel with `ndim` axes by their part in a product.

    Example:
        >>> product_word(3, contracted=(0,), batch=())
        'ioo'
    """
    kinds = {**dict.fromkeys(contracted, "i"), **dict.fromkeys(batch, "s")}
    kinds |= dict.fromkeys(conv_spatial, "k")
    return "".join(kinds.get(axis, "o") for axis in range(ndim))


def stored_word(word: str, shape: Sequence[int], stored: Sequence[int]) -> str | None:
    """Return the layout of a parameter that has the layout `word` once reshaped to `shape`.

    Returns:
        None if an axis of the parameter is made of axes of several kinds.

    Example:
        >>> stored_word("ioo", (8, 2, 4), (8, 8))
        'io'
    """
    if tuple(shape) == tuple(stored):
        return word
    kinds = [(size, kind) for size, kind in zip(shape, word, strict=True) if size > 1]
    found = ""
    for size in stored:
        group: set[str] = set()
        left = size
        while left > 1:
            have, kind = kinds.pop(0)
            group.add(kind)
            common = math.gcd(left, have)
            if common == 1 or (common < left and common < have):
                return None
            left //= common
            if have > common:
                kinds.insert(0, (have // common, kind))
        if len(group) > 1:
            return None
        found += group.pop() if group else "o"
    return found
