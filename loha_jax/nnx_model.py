"""An NNX model as a tree of parameters, and back; and how a call of an adapted model is computed.

An adapted `nnx.Param` is replaced, where it stood in its module, by an `AdaptedKernel`: a small module with the Param
itself, untouched, and a `LoHaParam` for every factor. Read as an array it is `W + ΔW`, so code that takes the kernel
out of the model is right, if slow. Calls are fast: the modules that hold adapted kernels get a subclass whose methods
run through `loha_jax.adapt`. Nothing is shared and no array is closed over, so that NNX's own functions (split, merge,
clone, jit, grad, scan, remat, vmap, …) see an ordinary model, in graph mode and in tree mode.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from loha_jax.adapt import adapt
from loha_jax.config import LoHaConfig
from loha_jax.dropout import dropout
from loha_jax.inject import inject
from loha_jax.layouts import Layout
from loha_jax.naming import module_name, stack_names
from loha_jax.plan import Layouts, ModelLayouts
from loha_jax.weight import ArrayLike, Factors, LoHaWeight, SavedWeight

Path = tuple[Any, ...]
M = TypeVar("M", bound=nnx.Module)


class LoHaParam(nnx.Param):
    """A trained array: a factor of an active adapter, or a copy of a module in `modules_to_save`.

    `nnx.Optimizer(model, tx, wrt=LoHaParam)` and `nnx.DiffState(0, LoHaParam)` train these alone.
    """


class InactiveLoHaParam(nnx.Param):
    """The same of an adapter that is not active: kept and saved, but not trained."""


class Scaling(nnx.Variable):
    """alpha/r of an adapter, times the weight that `loha_jax.scale` gave; not trained."""


class AdaptedVariable(ArrayLike, nnx.Module):
    """What stands in a module where an adapted variable stood; read as an array it is the adapted weight.

    Attributes:
        base: the model's own variable.
    """

    base: nnx.Variable

    def leaf(self) -> LoHaWeight | SavedWeight:
        """The same as a leaf of a tree."""
        raise NotImplementedError

    def get_value(self) -> jax.Array:
        """The adapted weight, as an `nnx.Variable` gives its value."""
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

    # A module is a node of a graph, compared by identity; ArrayLike's arithmetic stays.
    __hash__ = object.__hash__


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is not an array of one adapter of one kernel; see `Factors`."""

    adapter: str
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    config: LoHaConfig = dataclasses.field(repr=False)


class AdaptedKernel(AdaptedVariable):
    """A kernel with its adapters: `LoHaWeight` as an NNX module.

    Attributes:
        base: the model's own Param, frozen.
        adapters: by name, the factors (`hada_w1_a`, …: `LoHaParam`) and their `scaling`.
        settings: ranks, alphas and config of each adapter.
        rngs: an `nnx.RngStream` for dropout, or None; `[*stack]` keys for a stacked kernel.
        deterministic: no dropout, as `model.eval()` sets it.
    """

    def __init__(self, base: nnx.Variable, leaf: LoHaWeight, old: AdaptedKernel | None = None):
        self.base = base
        self.layout = leaf.layout
        self.names = leaf.names
        self.active = leaf.active
        self.settings = tuple(Settings(name, f.ranks, f.alphas, f.config) for name, f in leaf.adapters.items())
        self.adapters: dict[str, dict[str, nnx.Variable]] = nnx.data(
            {
                name: {
                    **{n: _trained(t, name in leaf.active) for n, t in factors.tensors.items()},
                    "scaling": Scaling(factors.scaling),
                }
                for name, factors in leaf.adapters.items()
            }
        )
        self.rngs: nnx.RngStream | None = nnx.data(old.rngs if old else None)
        self.deterministic = old.deterministic if old else True

    def leaf(self) -> LoHaWeight:
        """The kernel as a leaf of a tree. Axes that `nnx.vmap` put in front since it was adapted are stack axes."""
        kernel = self.base.get_value()
        stacked = max(kernel.ndim - self.layout.ndim, 0)
        layout = Layout("s" * stacked + self.layout.word) if stacked else self.layout
        copies = math.prod(kernel.shape[:stacked])
        adapters = {}
        for of in self.settings:
            arrays = {n: v.get_value() for n, v in self.adapters[of.adapter].items()}
            cores = {n: arrays.get(n) for n in ("hada_t1", "hada_t2")}
            adapters[of.adapter] = Factors(
                **{**arrays, **cores}, ranks=of.ranks * copies, alphas=of.alphas * copies, config=of.config
            )
        return LoHaWeight(kernel, adapters, layout, self.names * copies, self.active)

    def set_view(self, deterministic: bool | None = None) -> None:
        """Called by `nnx.view(model, deterministic=...)`."""
        if deterministic is not None:
            self.deterministic = deterministic

    @property
    def drops(self) -> bool:
        """Whether an active adapter asks for dropout."""
        configs = [of.config for of in self.settings if of.adapter in self.active]
        return any(config.rank_dropout or config.module_dropout for config in configs)

    def leaf_for_call(self) -> LoHaWeight:
        """The leaf with dropout's masks on it, unless `deterministic`."""
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
        """The variable as a leaf of a tree."""
        copies = {name: copy.get_value() for name, copy in self.copies.items()}
        return SavedWeight(self.base.get_value(), copies, self.layout, self.torch_name, self.active, self.counters)

    leaf_for_call = leaf

    @property
    def current(self) -> nnx.Variable:
        """The variable that counts: the active adapter's copy, or the base's."""
        name = self.leaf().copy_of(self.active)
        return self.base if name is None else self.copies[name]


def _trained(array: jax.Array, active: bool) -> nnx.Param:
    return LoHaParam(array) if active else InactiveLoHaParam(array)


def _next_key(stream: nnx.RngStream) -> jax.Array:
    """A new key. A stream of a stack holds one per index, the first of which is used: the masks differ by index."""
    keys, counts = stream.key.get_value(), stream.count.get_value()
    stream.count.set_value(counts + 1)
    return jax.random.fold_in(keys.reshape(-1)[0], counts.reshape(-1)[0])


# ---------------------------------------------------------------------------------------------- model <-> tree


def tree_of(model: nnx.Module) -> dict[Any, Any]:
    """The model's parameters and statistics as nested dicts by attribute: arrays, `LoHaWeight`s, `SavedWeight`s."""
    return unflatten_dict(
        {
            path: _named(node.leaf(), path) if isinstance(node, AdaptedVariable) else node.get_value()
            for path, node in _weights(model).items()
        }
    )


def _named(leaf: LoHaWeight | SavedWeight, path: Path) -> LoHaWeight | SavedWeight:
    """The leaf with its module's name, which a layer that was made alone does not know."""
    if isinstance(leaf, SavedWeight) or leaf.names[0]:
        return leaf
    name = module_name(tuple(map(str, path)))
    return dataclasses.replace(leaf, names=stack_names(name, leaf.layout.sizes("s", leaf.kernel.shape), None))


def write_back(model: nnx.Module, tree: Any) -> nnx.Module:
    """Puts a changed `tree_of(model)` into the model: adapted leaves as `AdaptedVariable`s, arrays as variables."""
    old = _weights(model)
    new = _flat_leaves(tree)
    if old.keys() != new.keys():
        raise ValueError(f"The tree holds other variables than the model: {sorted(map(str, old.keys() ^ new.keys()))}")
    replacements: dict[int, Any] = {}
    values: list[tuple[nnx.Variable, jax.Array]] = []
    for path, node in old.items():
        leaf = new[path]
        base = node.base if isinstance(node, AdaptedVariable) else node
        if isinstance(leaf, LoHaWeight):
            values.append((base, leaf.kernel))
            replacements[id(node)] = AdaptedKernel(base, leaf, node if isinstance(node, AdaptedKernel) else None)
        elif isinstance(leaf, SavedWeight):
            values.append((base, leaf.original))
            replacements[id(node)] = AdaptedCopy(base, leaf)
        else:
            values.append((base, leaf))
            if base is not node:
                replacements[id(node)] = base
    _replace(model, replacements)
    for variable, value in values:
        if variable.get_value() is not value:
            variable.set_value(value)
    _dress(model)
    return model


def _weights(model: nnx.Module) -> dict[Path, nnx.Variable | AdaptedVariable]:
    """The variables that can hold weights, and the adapted ones, by path."""
    found: dict[Path, Any] = {}
    adapted = adapted_nodes(model)
    for path, node in nnx.iter_graph(model):
        if isinstance(node, AdaptedVariable) or (
            isinstance(node, nnx.Variable)
            and not isinstance(node, nnx.RngState | nnx.Intermediate | nnx.Cache)
            and isinstance(node.get_value(), jax.Array | jax.ShapeDtypeStruct)
            and not _below(path, adapted)
        ):
            found[path] = node
    return found


def adapted_nodes(model: Any) -> dict[Path, AdaptedKernel | AdaptedCopy]:
    """The adapted variables of a model (or of a list of nodes), by path."""
    return {path: node for path, node in nnx.iter_graph(model) if isinstance(node, AdaptedKernel | AdaptedCopy)}


def _below(path: Path, nodes: Mapping[Path, Any]) -> bool:
    return any(path[:n] in nodes for n in range(len(path)))


def _flat_leaves(tree: Any) -> dict[Path, Any]:
    return dict(flatten_dict(tree, is_leaf=lambda _, x: not isinstance(x, dict)))


def _slots(node: Any) -> Iterator[tuple[Any, Any]]:
    """The attributes, entries or elements of a node of the graph."""
    if isinstance(node, nnx.Pytree):
        yield from list(vars(node).items())  # nnx.List and nnx.Dict keep their elements there too
    elif isinstance(node, Mapping):
        yield from list(node.items())
    elif isinstance(node, list | tuple):
        yield from enumerate(node)


def _replace(model: Any, replacements: Mapping[int, Any]) -> None:
    """Replaces nodes, given by identity, wherever the graph refers to them; all of them or, with an error, none."""
    places = []
    for path, node in nnx.iter_graph(model):
        for key, value in _slots(node):
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


# ---------------------------------------------------------------------------------------------- layouts


def layouts_of(model: nnx.Module, given: Layouts | None) -> ModelLayouts:
    """The `given` layouts with those, by module name, that the layers of the model have by themselves."""
    own: dict[str, Layout] = {}
    owners = {id(value): (node, key) for _, node in nnx.iter_graph(model) for key, value in _slots(node)}
    for path, variable in _weights(model).items():
        if not isinstance(variable, nnx.Variable) or id(variable) not in owners:
            continue
        owner, key = owners[id(variable)]
        if word := _layer_layout(owner, key, variable.get_value().shape):
            own[module_name(tuple(map(str, path)))] = Layout(word)
    return ModelLayouts(given or {}, own)


def _layer_layout(layer: Any, key: str, shape: tuple[int, ...]) -> str | None:
    """The layout that a layer's own fields give its kernel, stack axes in front (`nnx.vmap`ed layers), or None."""
    word, core = "", ()
    if isinstance(layer, nnx.Linear) and key == "kernel":
        word, core = "io", (layer.in_features, layer.out_features)
    elif isinstance(layer, nnx.LinearGeneral) and key == "kernel":
        core = (*layer.in_features, *layer.out_features)
        word = "i" * len(layer.in_features) + "o" * len(layer.out_features)
    elif isinstance(layer, nnx.Conv) and key == "kernel":
        core = tuple(layer.kernel_shape)
        word = "k" * (len(core) - 2) + "io"
    elif isinstance(layer, nnx.ConvTranspose) and key == "kernel":
        core = tuple(layer.kernel_shape)
        word = "k" * (len(core) - 2) + ("oi" if layer.transpose_kernel else "io")
    elif isinstance(layer, nnx.Embed) and key == "embedding" and len(shape) > 2:  # 2-D: the default for this name
        word, core = "oi", (layer.num_embeddings, layer.features)
    elif isinstance(equation := getattr(layer, "einsum_str", None), str):  # nnx.Einsum, tunix's Einsum
        word = _einsum_layout(equation.replace(" ", ""), len(shape)) or ""
        core = shape if len(word) == len(shape) else tuple(getattr(layer, "kernel_shape", ()))
    missing = len(shape) - len(word)
    if not word or missing < 0 or tuple(shape[missing:]) != tuple(core):
        return None
    return "s" * missing + word


def _einsum_layout(equation: str, ndim: int) -> str | None:
    """The layout of the second operand of an einsum of two: contracted letters are in, letters of its own out."""
    found = re.fullmatch(r"([a-zA-Z.]+),([a-zA-Z]+)->([a-zA-Z.]+)", equation)
    if not found:
        return None
    inputs, kernel, outputs = found.groups()
    if len(kernel) > ndim or len(set(kernel)) != len(kernel):
        return None
    kinds = ["o" if c not in inputs else "s" if c in outputs else "i" for c in kernel]
    return "".join(kinds) if {"i", "o"} <= set(kinds) else None


def adapt_layer(layer: nnx.Module, kernel: str, config: LoHaConfig, *, key: jax.Array) -> None:
    """Adapts one kernel of a layer that knows its layout but not yet its name in a model."""
    variable: nnx.Variable = getattr(layer, kernel)
    array = variable.get_value()
    word = _layer_layout(layer, kernel, array.shape) or ("oi" if kernel == "embedding" else None)
    if word is None:
        raise ValueError(
            f"The kernel of shape {array.shape} has no letter that {getattr(layer, 'einsum_str', layer)!r} contracts, "
            "or none that only the kernel and the result have: there is nothing to factor."
        )
    everything = dataclasses.replace(config, target_modules=".*")
    leaf = inject({kernel: array}, everything, key=key, layouts={".*": word})[kernel]
    factors = {n: dataclasses.replace(f, config=config) for n, f in leaf.adapters.items()}
    leaf = dataclasses.replace(leaf, adapters=factors, names=("",) * len(leaf.names))
    setattr(layer, kernel, AdaptedKernel(variable, leaf))


# ---------------------------------------------------------------------------------------------- calls

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


def _dress(model: nnx.Module) -> None:
    """Gives each module of a model the class that its adapted variables, or the lack of them, ask for."""
    known: dict[int, bool] = {}

    def holds(node: Any) -> bool:
        if isinstance(node, AdaptedVariable):
            return True
        if id(node) not in known:
            known[id(node)] = False  # for cycles
            known[id(node)] = any(holds(value) for _, value in _slots(node))
        return known[id(node)]

    for _, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Module) and not isinstance(node, AdaptedVariable):
            base = _base_class(node)
            owner = any(isinstance(value, AdaptedVariable) for _, value in _slots(node))
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
    statistics, counts of random streams, `sow`, plain attributes) is changed in the caller's, unless `changes` is
    False; a module of theirs that `fn` returns is the caller's.
    """
    leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=is_node)
    positions = [n for n, leaf in enumerate(leaves) if is_node(leaf)]
    nodes = [leaves[n] for n in positions]
    adapted = adapted_nodes(nodes)
    weights = [node.leaf_for_call() for node in adapted.values()]
    graphdef, state = nnx.split(nodes)
    variables = dict(nnx.to_flat_state(state))
    # numpy arrays stay what they are: a model may compute shapes with them.
    own = [p for p, variable in variables.items() if not isinstance(variable, np.ndarray) and not _below(p, adapted)]
    values = [_value(variables[path]) for path in own]
    others = [leaf for leaf in leaves if not is_node(leaf)]
    originals = dict(nnx.iter_graph(nodes))
    changed: dict[Path, Any] = {}
    attributes: list[tuple[Any, str, Any]] = []
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
        _replace(clones, {id(node): node.base for node in kernels.values()})
        paths = {}
        for path, node in nnx.iter_graph(clones):
            if isinstance(node, nnx.Pytree):
                _set_class(node, _base_class(node))
            if is_node(node):
                paths[id(node)] = path
        modules, rest = iter(clones), iter(others)
        args, kwargs = treedef.unflatten([next(modules if n in positions else rest) for n in range(len(leaves))])
        result = fn(*args, **kwargs)
        changed.clear()
        attributes.clear()
        removed.clear()
        if changes:
            for path, variable in nnx.to_flat_state(nnx.split(clones)[1]):
                # nnx.scan writes back whatever it went over; kernels and trained copies are as they were.
                frozen = path in adapted and not isinstance(adapted[path].base, nnx.BatchStat)
                old = before.get(path, variables[path] if path in variables and path not in adapted else None)
                if not frozen and not _same(_value(variable), _value(old)):
                    changed[path] = variable
            attributes.extend(_changed_attributes(clones, originals))
            left = {id(node) for _, node in nnx.iter_graph(clones)}
            removed.update(path for node, path in paths.items() if node not in left and path in variables)
        result = jax.tree.map(lambda x: _Returned(paths.get(id(x))) if is_node(x) else x, result, is_leaf=is_node)
        return result, [_value(variable) for variable in changed.values()]

    result, new = run(pure, ((weights, values), others), {})
    updates: dict[Path, Any] = {}
    for (path, variable), value in zip(changed.items(), new, strict=True):
        if isinstance(node := adapted.get(path), AdaptedCopy):
            node.current.set_value(value)
        else:
            updates[path] = _with_value(variable, value)
    if updates:
        nnx.update(nodes, nnx.from_flat_state(updates))
    if removed:
        nnx.pop(nodes, lambda path, _: path in removed)
    for node, name, value in attributes:
        setattr(node, name, value)
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


def _changed_attributes(clones: Any, originals: Mapping[Path, Any]) -> Iterator[tuple[Any, str, Any]]:
    """Attributes, other than variables and arrays, that a call set in the clones: the original node, name and value."""
    for path, clone in nnx.iter_graph(clones):
        if not isinstance(clone, nnx.Pytree):
            continue
        if path not in originals:
            raise ValueError(
                f"A call of an adapted module adds the module {'.'.join(map(str, path[1:]))}. Make modules in "
                "`__init__`, or before `inject`."
            )
        original = originals[path]
        for name, value in vars(clone).items():
            data = clone._pytree__nodes.get(name, False)
            if not data and not name.startswith("_pytree__") and vars(original).get(name, originals) is not value:
                yield original, name, value


def _same(a: Any, b: Any) -> bool:
    one, other = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(one) == len(other) and all(x is y for x, y in zip(one, other, strict=True))
