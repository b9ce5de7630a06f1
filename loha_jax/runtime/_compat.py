"""The differences between versions of JAX and Flax, each with the version in a comment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.core
import jax.extend.core as jex
from jax.interpreters.partial_eval import dce_jaxpr

try:
    from jax.extend.core import DebugInfo  # since 0.10
except ImportError:
    from jax._src.core import DebugInfo

Literal = jex.Literal

HAS_MOSAIC_GPU = jax.__version_info__ >= (0, 12)
"""Whether kernels of Pallas for GPUs are written as in 0.12, and have an interpreter."""


def bind_equation(eqn: jex.JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Evaluate one equation of a jaxpr on `values`, with its name stack and context.

    A one-equation jaxpr is evaluated by JAX itself, because what `Primitive.get_bind_params`
    returns has changed (a pair before 0.5, a dict in 0.10, a smaller one in 0.12).
    """
    variables, inputs = [], []
    for var, value in zip(eqn.invars, values, strict=True):
        if not isinstance(var, Literal) and var not in variables:
            variables.append(var)
            inputs.append(value)
    jaxpr = jex.Jaxpr(
        (), variables, eqn.outvars, [eqn], eqn.effects, _debug_info(variables, eqn.outvars)
    )
    return jax.core.eval_jaxpr(jaxpr, (), *inputs)


def _debug_info(inputs: Sequence[object], outputs: Sequence[object]) -> Any:
    return DebugInfo("loha_jax", "loha_jax", ("",) * len(inputs), ("",) * len(outputs))


AXIS_NAMES = ("out_sharding", "sharding_names")
"""Where a variable's metadata names its axes: in Flax 0.12.8, and in 0.12.3."""


def attributes(node: object) -> dict[Any, Any]:
    """Return the attributes of an NNX node without those of Flax' own bookkeeping.

    The elements of an `nnx.List` are among them: by "0", "1", …; by integers before Flax 0.12.8.
    """
    return {name: x for name, x in vars(node).items() if not str(name).startswith("_pytree__")}


def set_attribute(node: Any, name: str | int, value: object) -> None:
    """Set an attribute of an NNX node that has one of the names of `attributes`."""
    if isinstance(name, int):  # an element of a list, before Flax 0.12.8
        node[name] = value
    else:
        setattr(node, name, value)


def delete_attribute(node: Any, name: str) -> None:
    """Delete an attribute of an NNX node.

    Before Flax 0.12.8, `delattr` changes the record of which attributes hold arrays in place, and
    copies of the node share it: they would lose the attribute as a pytree. So it is copied first.
    """
    object.__setattr__(node, "_pytree__nodes", node._pytree__nodes.update({}))
    delattr(node, name)


def in_static(steps: Iterable[tuple[object, Any]]) -> bool:
    """Return whether a path through an NNX graph leads through a static attribute.

    Before Flax 0.12.8, arrays in static attributes are part of a model's state.

    Args:
        steps: the nodes on the path, each with the key that leads on.
    """
    from flax import nnx

    return any(
        isinstance(node, nnx.Pytree)
        and not isinstance(node, nnx.List)
        and not node._pytree__nodes.get(key, False)
        for node, key in steps
    )


def open_jaxpr(jaxpr: Any) -> tuple[jex.Jaxpr, list[Any]]:
    """Return `(jaxpr, consts)` of a ClosedJaxpr (0.10) or a Jaxpr with its constants (0.12)."""
    return jaxpr.jaxpr, list(jaxpr.consts)


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """Return the numbers of constants and carries among the operands of a scan equation."""
    if "num_consts" in params:  # 0.10
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # 0.12: a tree of (consts, carry, xs)
    return len(consts), len(carry)


def without_dead_code(closed: jex.ClosedJaxpr) -> jex.ClosedJaxpr:
    """Remove what the outputs of a closed jaxpr do not need, also in loops; its inputs stay."""
    jaxpr, _ = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    return jex.ClosedJaxpr(jaxpr, closed.consts)
