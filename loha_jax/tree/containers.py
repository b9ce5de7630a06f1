"""Models and trees with metadata boxes, as arguments of functions that take a plain tree.

This file knows no framework. `PROVIDERS` names the module that handles each kind of model. It is
imported when the first model of that kind is passed, so that nothing unused is imported.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar, cast, overload

import jax
from jaxtyping import PyTree

from loha_jax.lowrank.initial_values import FACTOR_NAMES
from loha_jax.targets.model_layouts import Layouts
from loha_jax.targets.module_names import path_parts
from loha_jax.tree.boxes import (
    box_of,
    boxes_among,
    boxes_inside,
    boxes_outside,
    put_in_boxes,
)
from loha_jax.tree.leaves import LoHaWeight, flatten_whole, is_adapted
from loha_jax.tree.unbox import unbox

PROVIDERS = {
    ("keras", "Model"): "loha_jax.keras.model_tree",
    ("flax.nnx", "Module"): "loha_jax.nnx.model_tree",
}
"""The `Container` of the models that are instances of a class, given by its module and its name."""

_FIRST, *_OTHERS = FACTOR_NAMES[:4]

F = TypeVar("F", bound=Callable[..., Any])


Run = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""A function that calls its first argument with the others, as `(fn, args, kwargs)`."""


class Container(Protocol):
    """The interface of the module that handles one kind of model.

    An adapted node of a model stands where a parameter was; its `leaf()` is the adapted leaf of a
    tree.
    """

    def tree_of(self, model: Any) -> dict[Any, Any]:
        """Return the model's parameters as nested dicts, with adapted leaves."""
        ...

    def write_back(self, model: Any, tree: PyTree) -> Any:
        """Put a changed tree into its model, and return the model."""
        ...

    def layouts_of(self, model: Any, given: Layouts | None) -> Layouts:
        """Return the given layouts, completed with those of the model's layers."""
        ...

    def is_node(self, x: object) -> bool:
        """Return whether `x` is a model, a part of one, or a variable in it."""
        ...

    def nodes_among(self, args: PyTree) -> Iterator[Any]:
        """Yield the adapted nodes of the models among the leaves of `args`."""
        ...

    def provided_among(self, args: PyTree) -> Iterator[tuple[str, LoHaWeight]]:
        """Yield the adapted kernels that a provider adds to, with their modules' names."""
        ...

    def call(
        self,
        run: Run,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        changes: bool = True,
    ) -> Any:
        """Call `run(fn, args, kwargs)` with trees in place of the models among the arguments."""
        ...


def container_of(tree: object) -> Container | None:
    """Return the container of a model; None for a tree.

    Whoever has a model has imported its framework.
    """
    for (module, name), provider in PROVIDERS.items():
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and isinstance(tree, kind):
            return cast(Container, importlib.import_module(provider))
    return None


def _used_containers() -> list[Container]:
    """Return the containers that have been imported.

    No model of another kind can be adapted.
    """
    return [cast(Container, sys.modules[p]) for p in PROVIDERS.values() if p in sys.modules]


@overload
def takes_model(function: F) -> F: ...
@overload
def takes_model(*, argument: str = "params", changes: bool = True) -> Callable[[F], F]: ...
def takes_model(
    function: Callable[..., Any] | None = None, *, argument: str = "params", changes: bool = True
) -> Any:
    """Decorate a function of a tree of parameters so that a model may stand for the tree.

    The function gets the tree of the model's variables. With `changes`, its result is written into
    the model, which is returned, as users of such models expect. Otherwise its result is returned.
    A `layouts` argument is completed with what the model's own layers say. A tree with boxes
    (`loha_jax.tree.boxes`) is unboxed and its result boxed again.

    A tree of models, and one in which factors are leaves beside their kernels, are refused.
    """
    if function is None:
        return functools.partial(takes_model, argument=argument, changes=changes)
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args: object, **kwargs: object) -> object:
        bound = signature.bind(*args, **kwargs)
        model = bound.arguments.get(argument)
        refuse_loose_factors(model)
        if boxes := boxes_among(model):
            bound.arguments[argument] = unbox(model)
            result = function(*bound.args, **bound.kwargs)
            return put_in_boxes(result, boxes) if changes else result
        container = container_of(model)
        if container is None:
            return function(*args, **kwargs)
        bound.arguments[argument] = container.tree_of(model)
        if "layouts" in signature.parameters:
            bound.arguments["layouts"] = container.layouts_of(model, bound.arguments.get("layouts"))
        result = function(*bound.args, **bound.kwargs)
        return container.write_back(model, result) if changes else result

    return wrapper


def on_trees(
    run: Run,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    changes: bool = True,
) -> Any:
    """Call `run(fn, args, kwargs)` with trees in place of the adapted models among the arguments.

    Linen's boxes around adapted leaves are taken off for it.
    """
    leaves = jax.tree.leaves((args, kwargs), is_leaf=lambda x: is_adapted(x) or is_model_part(x))
    if any(is_adapted(leaf) and box_of(leaf) is not None for leaf in leaves):
        args, kwargs = boxes_outside((args, kwargs))
        return boxes_inside(on_trees(run, fn, args, kwargs, changes=changes))
    for container in _used_containers():
        if any(True for _ in container.nodes_among((args, kwargs))):
            return container.call(run, fn, args, kwargs, changes=changes)
    return run(fn, args, kwargs)


def adapted_leaves(tree: object) -> list[Any]:
    """Return the adapted leaves of a tree and of the models in it."""
    inside = [
        node.leaf() for container in _used_containers() for node in container.nodes_among(tree)
    ]
    return inside + [leaf for leaf in flatten_whole(tree)[0] if is_adapted(leaf)]


def provided_leaves(tree: object) -> dict[str, LoHaWeight]:
    """Return the adapted kernels of the models in a tree that a provider adds to, by module."""
    return dict(item for container in _used_containers() for item in container.provided_among(tree))


def is_model_part(x: object) -> bool:
    """Return whether `x` is a part of a model, or a variable in it."""
    return any(container.is_node(x) for container in _used_containers())


def refuse_model(tree: object, advice: str) -> None:
    """Raise TypeError where a function of trees is given a model."""
    if container_of(tree) is not None:
        raise TypeError(
            f"This takes a tree of parameters, not a model ({type(tree).__name__}). {advice}"
        )
    refuse_inner_models(tree)


def refuse_inner_models(tree: object) -> None:
    """Raise TypeError for a tree with models in it."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_model)[0]:
        if is_model(leaf):
            raise TypeError(
                f"{jax.tree_util.keystr(path)} in the tree is a model ({type(leaf).__name__}). "
                "Call the function for each model by itself."
            )


def is_model(x: object) -> bool:
    """Return whether `x` is a model (for `is_leaf=`)."""
    return container_of(x) is not None


def tree_of(params: PyTree) -> PyTree:
    """Return the tree of a model; a tree as it is."""
    container = container_of(params)
    return params if container is None else container.tree_of(params)


def written_back(params: PyTree, tree: PyTree) -> PyTree:
    """Return a changed `tree_of(params)`; for a model the model, changed in place."""
    container = container_of(params)
    return tree if container is None else container.write_back(params, tree)


def refuse_loose_factors(tree: object) -> None:
    """Refuse a tree in which an adapter's arrays are leaves beside the kernel.

    Raises:
        ValueError: there are such arrays.
        TypeError: there is a model in the tree.
    """
    if is_model(tree):
        return
    refuse_inner_models(tree)
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_adapted)[0]
    paths = {path_parts(path) for path, _ in leaves}
    for parts in sorted(path for path in paths if path and path[-1].endswith(_FIRST)):
        start = parts[-1].removesuffix(_FIRST)
        if "_lora_" in start and all((*parts[:-1], start + name) in paths for name in _OTHERS):
            raise ValueError(
                f"{'.'.join(parts)} is an array of an adapter beside its kernel, without its rank "
                "and alpha. Pass the NNX model instead of its state. Of a Linen model that a "
                "loha_jax.qwix.LoHaProvider adapts, pass loha_jax.qwix.linen_tree(provider, "
                "params); an optimizer knows its factors by '_lora_' in their names."
            )
