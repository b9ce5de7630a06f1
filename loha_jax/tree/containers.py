"""Lets the functions from tree to tree take a Flax NNX model, or a tree with Linen's metadata boxes, as well."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, overload

import jax

from loha_jax.tree.boxes import box_of, boxes_among, boxes_inside, boxes_outside, put_in_boxes, unbox
from loha_jax.tree.leaves import is_adapted

if TYPE_CHECKING:
    from flax import nnx

F = TypeVar("F", bound=Callable[..., Any])


def is_model(tree: Any) -> TypeGuard[nnx.Module]:
    """Whether `tree` is an NNX module. Flax is not imported for it: who has a model has done so."""
    flax_nnx = sys.modules.get("flax.nnx")
    return flax_nnx is not None and isinstance(tree, flax_nnx.Module)


@overload
def takes_model(function: F) -> F: ...
@overload
def takes_model(*, argument: str = "params", changes: bool = True) -> Callable[[F], F]: ...
def takes_model(function: Any = None, *, argument: str = "params", changes: bool = True) -> Any:
    """Decorates a function of a tree of parameters so that an NNX model may stand for the tree.

    The function gets the tree of the model's variables. What it returns is written into the model (`changes`), which
    is returned, as NNX users expect; or returned as it is. A `layouts` argument is completed with what the model's own
    layers say. A tree with boxes (`loha_jax.tree.boxes`) is unboxed and its result boxed again.
    """
    if function is None:
        return functools.partial(takes_model, argument=argument, changes=changes)
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        model = bound.arguments.get(argument)
        if boxes := boxes_among(model):
            bound.arguments[argument] = unbox(model)
            result = function(*bound.args, **bound.kwargs)
            return put_in_boxes(result, boxes) if changes else result
        if not is_model(model):
            return function(*args, **kwargs)
        from loha_jax.nnx import model_tree as nnx_model  # imports Flax

        bound.arguments[argument] = nnx_model.tree_of(model)
        if "layouts" in signature.parameters:
            bound.arguments["layouts"] = nnx_model.layouts_of(model, bound.arguments.get("layouts"))
        result = function(*bound.args, **bound.kwargs)
        return nnx_model.write_back(model, result) if changes else result

    return wrapper


def on_trees(
    run: Callable[[Callable[..., Any], tuple, dict[str, Any]], Any],
    fn: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
    *,
    changes: bool = True,
) -> Any:
    """`run(fn, args, kwargs)`, with trees in place of the adapted NNX models among the arguments (`nnx_calls.call`),
    and with Linen's boxes around adapted leaves.
    """
    if any(box_of(leaf) is not None for leaf in adapted_leaves((args, kwargs))):
        args, kwargs = boxes_outside((args, kwargs))
        return boxes_inside(on_trees(run, fn, args, kwargs, changes=changes))
    nnx_calls = sys.modules.get("loha_jax.nnx.calls")  # not imported: no model is adapted
    if nnx_calls is None or not nnx_calls.nodes_among((args, kwargs)):
        return run(fn, args, kwargs)
    return nnx_calls.call(run, fn, args, kwargs, changes=changes)


def adapted_leaves(tree: Any) -> list[Any]:
    """The adapted leaves of a tree, those of the NNX models in it too."""
    nnx_calls = sys.modules.get("loha_jax.nnx.calls")
    inside = [node.leaf() for node in nnx_calls.nodes_among(tree).values()] if nnx_calls is not None else []
    return inside + [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_adapted) if is_adapted(leaf)]


def is_model_part(x: Any) -> bool:
    """Whether `x` is a module or variable of Flax NNX."""
    nnx_calls = sys.modules.get("loha_jax.nnx.calls")
    return nnx_calls is not None and nnx_calls.is_node(x)


def refuse_model(tree: Any, advice: str) -> None:
    """Raises TypeError where a function of trees is given an NNX model."""
    if is_model(tree):
        raise TypeError(f"This takes a tree of parameters, not a model ({type(tree).__name__}). {advice}")
