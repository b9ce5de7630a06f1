"""The modules that replace adapted variables in an NNX model, and functions of its graph."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

import jax
from flax import nnx

from loha_jax.lowrank.layout import Layout
from loha_jax.targets.config import LoHaConfig
from loha_jax.tree.array_like import ArrayLike
from loha_jax.tree.dropout import dropout
from loha_jax.tree.factors import Factors
from loha_jax.tree.leaves import LoHaWeight, SavedWeight
from loha_jax.tree.placement import factor_axes
from loha_jax.tree.provenance import Origin

Path = tuple[Any, ...]


class LoHaParam(nnx.Param):
    """A trained array: a factor of an active adapter, or a copy of a module in `modules_to_save`.

    `nnx.Optimizer(model, tx, wrt=LoHaParam)` and `nnx.DiffState(0, LoHaParam)` train only these.
    """


class InactiveLoHaParam(nnx.Param):
    """An array of an adapter that is not active: kept and saved, but not trained."""


class Untrained(nnx.Variable):
    """An array of an adapter that is not trained (`Factors.untrained`)."""


class AdaptedVariable(ArrayLike, nnx.Module):
    """A module in place of an adapted variable; read as an array it is the adapted weight.

    Attributes:
        base: the model's own variable.
    """

    base: nnx.Variable

    def leaf(self) -> LoHaWeight | SavedWeight:
        """Return the variable as a leaf of a tree."""
        raise NotImplementedError

    def get_value(self) -> jax.Array:
        """Return the adapted weight, as an `nnx.Variable` returns its value."""
        return self.__jax_array__()

    @property
    def value(self) -> jax.Array:
        """The adapted weight."""
        return self.__jax_array__()

    def __jax_array__(self) -> jax.Array:
        return self.leaf().__jax_array__()

    @property
    def _frozen(self) -> jax.Array:
        return self.base.get_value()

    def _arrays(self) -> list[jax.Array]:
        return jax.tree.leaves(self.leaf())

    # A module is a node of a graph, found by its identity.
    __hash__ = object.__hash__


@dataclasses.dataclass(frozen=True)
class Settings:
    """The fields of one adapter of one kernel that are no arrays; see `Factors`."""

    adapter: str
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    multiplier: float
    origin: Origin = dataclasses.field(repr=False)

    @property
    def config(self) -> LoHaConfig:
        """The adapter's config. Comparisons of graphs see only the fields that computing needs."""
        return self.origin.config


class AdaptedKernel(AdaptedVariable):
    """A kernel with its adapters: `LoHaWeight` as an NNX module.

    Attributes:
        base: the model's own Param, frozen.
        adapters: by name, the factors (`hada_w1_a`, …: `LoHaParam`); see `Factors`.
        settings: ranks, alphas, multiplier and config of each adapter.
        rngs: an `nnx.RngStream` for dropout, or None; `[*stack]` keys for a stacked kernel.
        deterministic: no dropout, as `model.eval()` sets it.
    """

    def __init__(self, base: nnx.Variable, leaf: LoHaWeight, old: AdaptedKernel | None = None):
        self.base = base
        self.layout = leaf.layout
        self.names = leaf.names
        self.active = leaf.active
        self.settings = tuple(
            Settings(name, f.ranks, f.alphas, f.multiplier, Origin(f.config, f.base))
            for name, f in leaf.adapters.items()
        )
        self.adapters: dict[str, dict[str, nnx.Variable]] = nnx.data(
            {
                name: {
                    **{n: _trained(t, name in leaf.active) for n, t in factors.trained.items()},
                    **{n: Untrained(t) for n, t in factors.untrained.items()},
                }
                for name, factors in leaf.adapters.items()
            }
        )
        for name, factors in leaf.adapters.items():
            _name_axes(self.adapters[name], base, leaf, factors.is_cp)
        self.rngs: nnx.RngStream | None = nnx.data(None if old is None else old.rngs)
        self.deterministic = True if old is None else old.deterministic

    def leaf(self) -> LoHaWeight:
        """Return the kernel as a leaf of a tree.

        Axes that `nnx.vmap` has added in front since it was adapted are stack axes.
        """
        kernel = self.base.get_value()
        stacked = max(kernel.ndim - self.layout.ndim, 0)
        layout = Layout("s" * stacked + self.layout.word) if stacked else self.layout
        copies = math.prod(kernel.shape[:stacked])
        adapters = {}
        for of in self.settings:
            arrays = {n: v.get_value() for n, v in self.adapters[of.adapter].items()}
            cores = {n: arrays.get(n) for n in ("hada_t1", "hada_t2")}
            adapters[of.adapter] = Factors(
                **{**arrays, **cores},
                ranks=of.ranks * copies,
                alphas=of.alphas * copies,
                multiplier=of.multiplier,
                config=of.config,
                base=of.origin.base if copies == 1 else None,
            )
        return LoHaWeight(kernel, adapters, layout, self.names * copies, self.active)

    def set_view(self, deterministic: bool | None = None) -> None:
        """Set `deterministic`; `nnx.view(model, deterministic=...)` calls this."""
        if deterministic is not None:
            self.deterministic = deterministic

    @property
    def drops(self) -> bool:
        """True if an active adapter has a dropout."""
        configs = [of.config for of in self.settings if of.adapter in self.active]
        return any(config.rank_dropout or config.module_dropout for config in configs)

    def leaf_for_call(self) -> LoHaWeight:
        """Return the leaf, with dropout's masks unless `deterministic`."""
        leaf = self.leaf()
        if self.deterministic or not self.drops:
            return leaf
        if self.rngs is None:
            raise ValueError(
                f"The adapter of {leaf.label} drops out in training and has no random stream. Give it one with "
                "loha_jax.nnx.set_dropout(model, rngs), or call model.eval()."
            )
        return dropout(leaf, _next_key(self.rngs))


class AdaptedCopy(AdaptedVariable):
    """A variable of a module in `modules_to_save`: `SavedWeight` as an NNX module.

    Attributes:
        base: the model's own variable.
        copies: by adapter name; `LoHaParam`, or for BatchNorm statistics the base's own type.
    """

    def __init__(self, base: nnx.Variable, leaf: SavedWeight):
        self.base = base
        self.layout = leaf.layout
        self.torch_name = leaf.name
        self.active = leaf.active
        self.counters = leaf.counters
        self.copies: dict[str, nnx.Variable] = nnx.data(
            {
                name: type(base)(copy) if leaf.is_buffer else _trained(copy, name in leaf.active)
                for name, copy in leaf.copies.items()
            }
        )

    def leaf(self) -> SavedWeight:
        """Return the variable as a leaf of a tree."""
        copies = {name: copy.get_value() for name, copy in self.copies.items()}
        return SavedWeight(
            self.base.get_value(), copies, self.layout, self.torch_name, self.active, self.counters
        )

    leaf_for_call = leaf

    @property
    def current(self) -> nnx.Variable:
        """The variable in use: the active adapter's copy, or the base's."""
        name = self.leaf().copy_of(self.active)
        return self.base if name is None else self.copies[name]


def _name_axes(
    variables: Mapping[str, nnx.Variable], base: nnx.Variable, leaf: LoHaWeight, cp: bool
) -> None:
    """Set the sharding metadata of an adapter's arrays as the kernel's metadata implies."""
    metadata = base.get_metadata()
    names = metadata.get("out_sharding")
    if names is None or len(names) != leaf.layout.ndim:
        return
    arrays = {name: variable.get_value() for name, variable in variables.items()}
    axes = factor_axes(leaf.layout, leaf.shape, names, arrays, cp=cp)
    shared = {key: metadata[key] for key in ("mesh", "sharding_rules") if key in metadata}
    for name, variable in variables.items():
        variable.set_metadata(out_sharding=axes[name], **shared)


def _trained(array: jax.Array, active: bool) -> nnx.Param:
    return LoHaParam(array) if active else InactiveLoHaParam(array)


def _next_key(stream: nnx.RngStream) -> jax.Array:
    """Return a new key.

    A stream of a stack holds one key per index. The first is used, and the masks differ by index.
    """
    keys, counts = stream.key.get_value(), stream.count.get_value()
    stream.count.set_value(counts + 1)
    return jax.random.fold_in(keys.reshape(-1)[0], counts.reshape(-1)[0])


def is_node(x: Any) -> bool:
    """Return whether x is a part of an NNX graph."""
    return isinstance(x, nnx.Pytree | nnx.Variable)


def adapted_nodes(model: Any) -> dict[Path, AdaptedKernel | AdaptedCopy]:
    """Return the adapted variables of a model, by path."""
    return adapted_among(nnx.iter_graph(model))


def adapted_among(graph: Iterable[tuple[Path, Any]]) -> dict[Path, AdaptedKernel | AdaptedCopy]:
    """Return the adapted variables among the parts of a graph, by path."""
    return {path: node for path, node in graph if isinstance(node, AdaptedKernel | AdaptedCopy)}


def below(path: Path, nodes: Container[Path]) -> bool:
    """Return whether a path leads into one of these nodes."""
    return any(path[:n] in nodes for n in range(len(path)))


def slots(node: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the attributes, entries or elements of a node of the graph."""
    if isinstance(node, nnx.Pytree):
        yield from list(vars(node).items())  # nnx.List and nnx.Dict keep their elements there too
    elif isinstance(node, Mapping):
        yield from list(node.items())
    elif isinstance(node, list | tuple):
        yield from enumerate(node)


def replace_nodes(graph: Iterable[tuple[Path, Any]], replacements: Mapping[int, Any]) -> None:
    """Replace nodes, given by identity, in a whole graph; all, or none on an error."""
    places = []
    for path, node in graph:
        for key, value in slots(node):
            if id(value) not in replacements or isinstance(node, AdaptedVariable):
                continue
            if not isinstance(node, nnx.Pytree | dict | list):
                raise ValueError(
                    f"The variable {'.'.join(map(str, (*path, key)))} sits in a {type(node).__name__}, where nothing "
                    "can be put in its place. Keep it in an attribute, a list or a dict."
                )
            places.append((node, key, replacements[id(value)]))
    for node, key, value in places:
        if isinstance(node, nnx.Pytree):
            setattr(node, key, value)
        else:
            node[key] = value
