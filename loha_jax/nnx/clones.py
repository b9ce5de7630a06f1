"""The models among a call's arguments, and their clones on which the call is traced."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from loha_jax.nnx.adapted_classes import base_class, set_class
from loha_jax.nnx.attributes import (
    changed_attributes,
    detach_attributes,
    new_data_attributes,
    set_attribute,
)
from loha_jax.nnx.graph import Path, is_node, is_variable, steps
from loha_jax.nnx.siblings import called_among, called_in
from loha_jax.runtime._compat import in_static


@dataclasses.dataclass(frozen=True)
class Changes:
    """The changes that a call makes to its models; values may be traced.

    Attributes:
        variables: the variables (or arrays) with new values, by path.
        attributes: the original module, the name and the value of attributes set to plain data.
        added: new attributes that hold arrays, by path.
        removed: the paths of variables that are gone.
    """

    variables: dict[Path, PyTree] = dataclasses.field(default_factory=dict)
    attributes: list[tuple[nnx.Pytree, str | int, object]] = dataclasses.field(default_factory=list)
    added: dict[Path, PyTree] = dataclasses.field(default_factory=dict)
    removed: set[Path] = dataclasses.field(default_factory=set)

    def values(self) -> list[PyTree]:
        """The new values, in order."""
        return [_value(variable) for variable in self.variables.values()]


@dataclasses.dataclass(frozen=True)
class Returned:
    """A part of the models in the result of a call."""

    path: Path


class Originals:
    """The models among the arguments of a call.

    Attributes:
        graph: the parts of the models by path. A path begins with the model's number.
        adapted: the adapted variables among them, by the paths of their bases.
        weights: the adapted leaves, with dropout's masks.
        values: the values of the other variables.
        others: the leaves of the arguments that are no models.
    """

    def __init__(self, args: tuple, kwargs: dict[str, PyTree]):
        self._leaves, self._treedef = jax.tree.flatten((args, kwargs), is_leaf=is_node)
        self._are_nodes = [is_node(leaf) for leaf in self._leaves]
        self._nodes = [
            leaf for leaf, node in zip(self._leaves, self._are_nodes, strict=True) if node
        ]
        self.others = [
            leaf for leaf, node in zip(self._leaves, self._are_nodes, strict=True) if not node
        ]
        self.graph: dict[Path, Any] = dict(nnx.iter_graph(self._nodes))
        self.adapted = called_among(self.graph.items())
        self.weights = [adapted.leaf_for_call() for adapted in self.adapted.values()]
        self.graphdef, state = nnx.split(self._nodes)
        self.variables = dict(nnx.to_flat_state(state))
        siblings = {
            id(variable) for adapted in self.adapted.values() for variable in adapted.variables
        }
        # numpy arrays stay what they are: a model may compute shapes with them.
        self.value_paths = [
            path
            for path, variable in self.variables.items()
            if not isinstance(variable, np.ndarray)
            and path not in self.adapted
            and id(self.graph[path]) not in siblings
        ]
        self.values = [_value(self.variables[path]) for path in self.value_paths]

    def arguments(
        self, nodes: Sequence[nnx.Pytree | nnx.Variable], others: Sequence[PyTree]
    ) -> tuple[tuple, dict[str, PyTree]]:
        """Return the arguments of the call with other models, and other leaves."""
        models, rest = iter(nodes), iter(others)
        return self._treedef.unflatten([next(models if node else rest) for node in self._are_nodes])

    def change(self, made: Changes, values: Sequence[PyTree]) -> None:
        """Make the changes of a call, with these values of its variables."""
        traced, computed = jax.tree.leaves(made.values()), jax.tree.leaves(list(values))
        results = {id(old): array for old, array in zip(traced, computed, strict=True)}
        for path, container in made.added.items():
            filled = jax.tree.map(lambda leaf: results.get(id(leaf), leaf), container)
            setattr(self.graph[path[:-1]], str(path[-1]), nnx.data(filled))
        updates: dict[Path, Any] = {}
        for (path, variable), value in zip(made.variables.items(), values, strict=True):
            if path in self.adapted:  # statistics of a BatchNorm in modules_to_save
                self.adapted[path].current_copy().set_value(value)
            elif not any(path[: n + 1] in made.added for n in range(len(path))):
                updates[path] = _with_value(variable, value)
        if updates:
            nnx.update(self._nodes, nnx.from_flat_state(updates))
        if made.removed:
            nnx.pop(self._nodes, lambda path, _: path in made.removed)
        for node, name, value in made.attributes:
            set_attribute(node, name, value)


class Clones:
    """Copies of the models in their original form: original classes, and arrays in their variables.

    Args:
        originals: the models.
        weights, values: the arrays, as in `Originals`.

    Attributes:
        nodes: the copies.
    """

    def __init__(self, originals: Originals, weights: Sequence[PyTree], values: Sequence[PyTree]):
        self._originals = originals
        self._before: dict[Path, Any] = dict(zip(originals.value_paths, values, strict=True))
        inside = {
            path: _with_value(variable, self._before.get(path, _value(variable)))
            for path, variable in originals.variables.items()
        }
        self.nodes: list[Any] = nnx.merge(originals.graphdef, nnx.from_flat_state(inside))
        for _, node in nnx.iter_graph(self.nodes):
            for adapted in called_in(node):
                adapted.remove()
            if isinstance(node, nnx.Pytree):
                set_class(node, base_class(node))
                detach_attributes(node)
        graph: dict[Path, Any] = {p: x for p, x in nnx.iter_graph(self.nodes) if is_node(x)}
        for path, weight in zip(originals.adapted, weights, strict=True):
            graph[path].set_raw_value(weight)
            self._before[path] = weight
        self._paths: dict[int, Path] = {id(node): path for path, node in graph.items()}

    def changes(self) -> Changes:
        """Return the changes made to the copies since."""
        originals = self._originals
        graph = dict(nnx.iter_graph(self.nodes))
        left = {id(node) for node in graph.values()}
        return Changes(
            self._changed_variables(),
            list(changed_attributes(graph, originals.graph)),
            dict(new_data_attributes(graph, originals.graph)),
            {
                path
                for node, path in self._paths.items()
                if node not in left and path in originals.variables
            },
        )

    def _changed_variables(self) -> dict[Path, Any]:
        known, adapted = self._originals.variables, self._originals.adapted
        changed = {}
        for path, variable in nnx.to_flat_state(nnx.split(self.nodes)[1]):
            # nnx.scan writes back all that it scans over; kernels and trained copies never change.
            frozen = path in adapted and not isinstance(adapted[path].base, nnx.BatchStat)
            old = self._before.get(
                path, known[path] if path in known and path not in adapted else None
            )
            if not is_variable(variable) and in_static(steps(self.nodes, path)):
                continue
            if not frozen and not _same(_value(variable), _value(old)):
                changed[path] = variable
        return changed

    def mark(self, result: PyTree) -> PyTree:
        """Return the result of the call with `Returned` in place of parts of the copies."""
        return jax.tree.map(
            lambda x: self._returned(x) if is_node(x) else x, result, is_leaf=is_node
        )

    def _returned(self, node: object) -> Returned:
        if id(node) not in self._paths:
            raise ValueError(
                "A method of an adapted module returns a module or variable that it made or "
                "copied. Return arrays, or the module's own parts."
            )
        return Returned(self._paths[id(node)])


def _value(variable: PyTree) -> PyTree:
    """Return the value of a leaf of an NNX state, which is a variable or an array."""
    return variable.get_raw_value() if isinstance(variable, nnx.Variable) else variable


def _with_value(variable: PyTree, value: PyTree) -> PyTree:
    return variable.replace(value) if isinstance(variable, nnx.Variable) else value


def _same(a: PyTree, b: PyTree) -> bool:
    one, other = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(one) == len(other) and all(x is y for x, y in zip(one, other, strict=True))
