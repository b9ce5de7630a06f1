"""How a call of an adapted NNX model is computed: through `adapt`, on clones with its own classes and variables."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

from loha_jax.nnx.attributes import changed_attributes, detach_attributes, new_data_attributes, set_attribute
from loha_jax.nnx.variables import (
    AdaptedCopy,
    AdaptedKernel,
    AdaptedVariable,
    Path,
    adapted_nodes,
    below,
    replace_nodes,
    slots,
)
from loha_jax.transform.adapt import adapt

M = TypeVar("M", bound=nnx.Module)

_NOT_CALLS = (
    "set_view",
    "set_mode",
    "init_cache",
)  # NNX's own names of methods that change a module instead of computing


def adapted_class(cls: type[M], owner: bool) -> type[M]:
    """A subclass whose calls run through `adapt`: `__call__`, and for the owner of a kernel its public methods too."""
    return _adapted_class(cls, owner)


@functools.cache  # one class per original one: two models of one structure have equal graph definitions
def _adapted_class(cls: type[Any], owner: bool) -> type[Any]:
    names = {"__call__"} & set(dir(cls))
    if owner:
        for base in cls.__mro__:
            if base in nnx.Module.__mro__:
                break
            names |= {
                name
                for name, value in vars(base).items()
                if not name.startswith("_") and name not in _NOT_CALLS and _is_method(value)
            }
    methods: dict[str, Any] = {name: _through_adapt(cls, name) for name in names}
    methods["__module__"] = cls.__module__
    methods["__doc__"] = cls.__doc__
    methods["_loha_base"] = cls
    methods["__reduce__"] = lambda self: (_rebuild, (cls, owner), self.__getstate__())
    metaclass: Any = type(cls)
    return metaclass(f"LoHa{cls.__name__}", (cls,), methods)


def _rebuild(cls: type[nnx.Module], owner: bool) -> nnx.Module:
    return object.__new__(adapted_class(cls, owner))


def _is_method(value: Any) -> bool:
    return callable(value) and not isinstance(value, type | staticmethod | classmethod)


def _through_adapt(cls: type[nnx.Module], name: str) -> Callable[..., Any]:
    method = getattr(cls, name)

    @functools.wraps(method)
    def call(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        return adapt(lambda self, *args, **kwargs: method(self, *args, **kwargs))(self, *args, **kwargs)

    return call


def dress(model: nnx.Module) -> None:
    """Gives each module of a model the class that its adapted variables, or the lack of them, ask for."""
    known: dict[int, bool] = {}

    def holds(node: Any) -> bool:
        if isinstance(node, AdaptedVariable):
            return True
        if id(node) not in known:
            known[id(node)] = False  # for cycles
            known[id(node)] = any(holds(value) for _, value in slots(node))
        return known[id(node)]

    for _, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Module) and not isinstance(node, AdaptedVariable):
            base = _base_class(node)
            owner = any(isinstance(value, AdaptedVariable) for _, value in slots(node))
            if not holds(node):
                _set_class(node, base)
            elif type(node) is base and (owner or "__call__" in dir(base)):
                _set_class(node, adapted_class(base, owner))


def _base_class(node: Any) -> type:
    return getattr(type(node), "_loha_base", type(node))


def _set_class(node: Any, cls: type) -> None:
    if type(node) is not cls:
        object.__setattr__(node, "__class__", cls)


def is_node(x: Any) -> bool:
    """Whether x is a part of an NNX graph."""
    return isinstance(x, nnx.Pytree | nnx.Variable)


def nodes_among(args: Any) -> dict[Path, AdaptedKernel | AdaptedCopy]:
    """The adapted variables of all models among the leaves of `args`."""
    nodes = [leaf for leaf in jax.tree.leaves(args, is_leaf=is_node) if is_node(leaf)]
    return adapted_nodes(nodes) if nodes else {}


def call(
    run: Callable[[Callable[..., Any], tuple, dict[str, Any]], Any],
    fn: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
    *,
    changes: bool = True,
) -> Any:
    """Calls `fn` with the models among its arguments in their original form, through `run(fn, args, kwargs)`.

    `run` gets a function of trees, in which adapted kernels are leaves. What `fn` changes in the models (BatchNorm
    statistics, counts of random streams, `sow`, attributes that hold plain data) is changed in the caller's, unless
    `changes` is False; a module of theirs that `fn` returns is the caller's.
    """
    leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=is_node)
    positions = [n for n, leaf in enumerate(leaves) if is_node(leaf)]
    nodes = [leaves[n] for n in positions]
    adapted = adapted_nodes(nodes)
    weights = [node.leaf_for_call() for node in adapted.values()]
    graphdef, state = nnx.split(nodes)
    variables = dict(nnx.to_flat_state(state))
    # numpy arrays stay what they are: a model may compute shapes with them.
    own = [p for p, variable in variables.items() if not isinstance(variable, np.ndarray) and not below(p, adapted)]
    values = [_value(variables[path]) for path in own]
    others = [leaf for leaf in leaves if not is_node(leaf)]
    originals = dict(nnx.iter_graph(nodes))
    changed: dict[Path, Any] = {}
    attributes: list[tuple[Any, str, Any]] = []
    made: dict[Path, Any] = {}
    removed: set[Path] = set()

    def pure(model: tuple[list[Any], list[Any]], others: list[Any]) -> Any:
        weights, values = model
        before: dict[Path, Any] = dict(zip(own, values, strict=True))
        inside = {path: _with_value(v, before.get(path, _value(v))) for path, v in variables.items()}
        clones = nnx.merge(graphdef, nnx.from_flat_state(inside))
        kernels = adapted_nodes(clones)
        for (path, node), array in zip(kernels.items(), weights, strict=True):
            node.base.set_raw_value(array)
            before[path] = array
        replace_nodes(clones, {id(node): node.base for node in kernels.values()})
        paths = {}
        for path, node in nnx.iter_graph(clones):
            if isinstance(node, nnx.Pytree):
                _set_class(node, _base_class(node))
                detach_attributes(node)
            if is_node(node):
                paths[id(node)] = path
        modules, rest = iter(clones), iter(others)
        args, kwargs = treedef.unflatten([next(modules if n in positions else rest) for n in range(len(leaves))])
        result = fn(*args, **kwargs)
        changed.clear()
        attributes.clear()
        made.clear()
        removed.clear()
        if changes:
            for path, variable in nnx.to_flat_state(nnx.split(clones)[1]):
                # nnx.scan writes back whatever it went over; kernels and trained copies are as they were.
                frozen = path in adapted and not isinstance(adapted[path].base, nnx.BatchStat)
                old = before.get(path, variables[path] if path in variables and path not in adapted else None)
                if not frozen and not _same(_value(variable), _value(old)):
                    changed[path] = variable
            attributes.extend(changed_attributes(clones, originals))
            made.update(new_data_attributes(clones, originals))
            left = {id(node) for _, node in nnx.iter_graph(clones)}
            removed.update(path for node, path in paths.items() if node not in left and path in variables)
        result = jax.tree.map(lambda x: _Returned(paths.get(id(x))) if is_node(x) else x, result, is_leaf=is_node)
        return result, [_value(variable) for variable in changed.values()]

    result, new = run(pure, ((weights, values), others), {})
    traced = jax.tree.leaves([_value(variable) for variable in changed.values()])
    computed = {id(old): array for old, array in zip(traced, jax.tree.leaves(new), strict=True)}
    for path, container in made.items():
        own = jax.tree.map(lambda leaf: computed.get(id(leaf), leaf), container)
        setattr(originals[path[:-1]], path[-1], nnx.data(own))
    updates: dict[Path, Any] = {}
    for (path, variable), value in zip(changed.items(), new, strict=True):
        if isinstance(node := adapted.get(path), AdaptedCopy):
            node.current.set_value(value)
        elif not any(path[: len(start)] == start for start in made):
            updates[path] = _with_value(variable, value)
    if updates:
        nnx.update(nodes, nnx.from_flat_state(updates))
    if removed:
        nnx.pop(nodes, lambda path, _: path in removed)
    for node, name, value in attributes:
        set_attribute(node, name, value)
    return jax.tree.map(lambda x: originals[x.path or ()] if isinstance(x, _Returned) else x, result)


@dataclasses.dataclass(frozen=True)
class _Returned:
    """Stands for a part of the model in what a call returns."""

    path: Path | None

    def __post_init__(self) -> None:
        if self.path is None:
            raise ValueError(
                "A method of an adapted module returns a module or variable that it made or copied. Return arrays, or "
                "the module's own parts."
            )


def _value(variable: Any) -> Any:
    """The value of a leaf of an NNX state: of a variable, or the array that it is."""
    return variable.get_raw_value() if isinstance(variable, nnx.Variable) else variable


def _with_value(variable: Any, value: Any) -> Any:
    return variable.replace(value) if isinstance(variable, nnx.Variable) else value


def _same(a: Any, b: Any) -> bool:
    one, other = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(one) == len(other) and all(x is y for x, y in zip(one, other, strict=True))
