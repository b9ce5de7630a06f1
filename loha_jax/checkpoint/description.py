"""A training state by name: the leaves that a checkpoint holds, and a description of all.

A checkpoint holds the adapters' arrays, the copies of `modules_to_save`, the optimizer state and
the random key. Its description, as JSON, has the shapes and dtypes of these, the adapters' configs
and a fingerprint of the base. `differences` compares a description with that of another state.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from loha_jax.tree.containers import refuse_loose_factors
from loha_jax.tree.factors import Factors
from loha_jax.tree.grouped_lines import one_line_each
from loha_jax.tree.leaves import LoHaWeight, SavedWeight, is_adapted

KEY = "key"

PROVENANCE = (
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"),
    *("task_type", "target_modules", "exclude_modules", "modules_to_save", "init_weights"),
    *("layers_to_transform", "layers_pattern", "metadata"),
)
"""Fields of a config that are not compared: origins, and choices of modules, compared by name."""

_SCALARS = {bool: "bool", int: "int", float: "float"}
_CONTAINERS = (dict, list, tuple, type(None), LoHaWeight, SavedWeight, Factors)


@dataclasses.dataclass(frozen=True)
class State:
    """A training state as leaves by name.

    Attributes:
        saved: the leaves that a checkpoint holds: `params…`, `opt_state…` and `key`.
        base: the other leaves of `params`.
        adapters: the description of each adapted leaf.
        optimizer: the types in the optimizer state, in order, or None without one.
    """

    saved: dict[str, Any]
    base: dict[str, Any]
    adapters: dict[str, Any]
    optimizer: list[str] | None
    _flat: tuple[Any, list[bool], list[Any], Any]

    def with_values(self, values: Mapping[str, Any]) -> tuple[Any, Any]:
        """Return `(params, opt_state)` with other values of the saved leaves."""
        params, is_saved, leaves, opt_state = self._flat
        names = iter(self.saved)
        new = params.unflatten(
            [values[next(names)] if saved else x for x, saved in zip(leaves, is_saved, strict=True)]
        )
        if opt_state is None:
            return new, None
        return new, opt_state.unflatten([values[next(names)] for _ in range(opt_state.num_leaves)])


def take_apart(params: PyTree, opt_state: PyTree = None, key: jax.Array | None = None) -> State:
    """Take a training state apart; arrays may be `jax.ShapeDtypeStruct`.

    Raises:
        TypeError: a leaf to save is neither an array nor a number, or `opt_state` is an optimizer.
        ValueError: `params` has no adapter, or is one half of `partition`.
    """
    refuse_loose_factors(params)
    _refuse_optimizer(opt_state)
    adapters: dict[str, Any] = {}

    def mark(path: tuple[Any, ...], leaf: object) -> object:
        if not is_adapted(leaf):
            return False
        adapters[_name("params", path)] = _describe_adapted(leaf)
        return jax.tree_util.tree_map_with_path(
            lambda inside, _: inside[0].name in ("adapters", "copies"), leaf
        )

    is_saved = jax.tree.leaves(jax.tree_util.tree_map_with_path(mark, params, is_leaf=is_adapted))
    if not any(is_saved):
        raise ValueError(
            "This tree holds no adapter, so there is nothing to save or restore. Call "
            "`loha_jax.inject(params, config, key=...)` first."
        )
    paths, structure = jax.tree_util.tree_flatten_with_path(params)
    named = [(_name("params", path), leaf) for path, leaf in paths]
    saved = {name: leaf for (name, leaf), held in zip(named, is_saved, strict=True) if held}
    base = {name: leaf for (name, leaf), held in zip(named, is_saved, strict=True) if not held}
    optimizer = None
    if opt_state is not None:
        optimizer = jax.tree.structure(opt_state)
        leaves = jax.tree_util.tree_flatten_with_path(opt_state)[0]
        saved.update((_name("opt_state", path), leaf) for path, leaf in leaves)
    if key is not None:
        saved[KEY] = key
    for name, leaf in saved.items():
        if type(leaf) not in _SCALARS and not is_array(leaf):
            raise TypeError(
                f"{name} is of type {type(leaf).__name__}; a checkpoint holds arrays and numbers"
            )
    flat = (structure, is_saved, [leaf for _, leaf in paths], optimizer)
    return State(saved, base, adapters, None if optimizer is None else _types(optimizer), flat)


def _refuse_optimizer(opt_state: PyTree) -> None:
    """Raise TypeError for an optimizer in the place of its state."""
    nnx = sys.modules.get("flax.nnx")  # whoever has such an optimizer has imported it

    def is_nnx(node: object) -> bool:
        return nnx is not None and isinstance(node, nnx.Optimizer)

    if any(map(is_nnx, jax.tree.leaves(opt_state, is_leaf=is_nnx))):
        raise TypeError("opt_state is an nnx.Optimizer; pass its state: nnx.state(optimizer)")
    if any(map(_is_optimizer, jax.tree.leaves(opt_state, is_leaf=_has_functions))):
        raise TypeError(
            "opt_state is an optimizer; pass its state, which optimizer.init(trainable) makes"
        )


def _has_functions(node: object) -> bool:
    """Return whether a node holds the functions init and update, as optimizers of Optax do.

    Methods of its class do not count: a state may have some.
    """
    names = getattr(node, "_fields", ()) if isinstance(node, tuple) else ()
    fields = {name: getattr(node, name) for name in names} or getattr(node, "__dict__", {})
    return all(callable(fields.get(name)) for name in ("init", "update"))


def _is_optimizer(leaf: object) -> bool:
    """Return whether a leaf, or a node with functions, is an optimizer."""
    methods = (getattr(leaf, name, None) for name in ("init", "update"))
    return not is_array(leaf) and all(map(callable, methods))


def is_array(leaf: object) -> bool:
    """Return whether a leaf is an array, or the shape of one."""
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.dtype == np.bool_ or bool(jnp.issubdtype(leaf.dtype, np.number))
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)


def describe_leaf(leaf: Any) -> dict[str, Any]:
    """Describe a saved leaf as JSON."""
    if (kind := _SCALARS.get(type(leaf))) is not None:
        return {"kind": kind, "value": leaf}
    shape = list(leaf.shape)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        impl = str(jax.random.key_impl(leaf))
        return {"kind": "key", "shape": shape, "dtype": str(leaf.dtype), "impl": impl}
    kind = "numpy" if isinstance(leaf, np.ndarray | np.generic) else "array"
    weak = {"weak_type": True} if getattr(leaf, "weak_type", False) else {}
    return {"kind": kind, "shape": shape, "dtype": str(leaf.dtype), **weak}


def plain_json(value: object, where: str) -> Any:
    """Return the value as JSON gives it back; ValueError, with the place, if JSON cannot hold it.

    Example:
        >>> plain_json({"position": (1, 2)}, "data")
        {'position': [1, 2]}
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [plain_json(x, f"{where}[{n}]") for n, x in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {name: plain_json(x, f"{where}[{name!r}]") for name, x in value.items()}
    raise ValueError(
        f"{where} should be what JSON holds (dicts with strings as keys, lists, strings, numbers, "
        f"None) and is a {type(value).__name__}: {value!r:.100}"
    )


def plain_numbers(values: Mapping[str, float | jax.Array], where: str) -> dict[str, float]:
    """Return numbers, or arrays of one element, as floats by name; ValueError for anything else.

    Example:
        >>> plain_numbers({"loss": np.float32(0.5)}, "metrics")
        {'loss': 0.5}
    """
    numbers = {}
    for name, value in values.items():
        try:
            numbers[str(name)] = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"{where}[{name!r}] should be a number, got {value!r:.100}") from None
    return numbers


def _name(root: str, path: tuple[Any, ...]) -> str:
    return root + jax.tree_util.keystr(path)


def _describe_adapted(leaf: LoHaWeight | SavedWeight) -> dict[str, Any]:
    leaf.require_whole()
    if isinstance(leaf, SavedWeight):
        described: dict[str, Any] = {
            "name": leaf.name,
            "copies": sorted(leaf.copies),
            "counters": [list(c) for c in leaf.counters],
        }
    else:
        described = {"names": list(leaf.names)}
        for name, factors in leaf.adapters.items():
            described[f"adapter {name}"] = {
                "ranks": list(factors.ranks),
                "alphas": list(factors.alphas),
                "multiplier": factors.multiplier,
                "config": {"class": type(factors.config).__name__, **factors.config.to_dict()},
            }
    layout = None if leaf.layout is None else leaf.layout.word
    return json.loads(
        json.dumps({"layout": layout, "active": list(leaf.active), **described}, default=str)
    )


def _types(structure: Any) -> list[str]:
    """Return the types of the nodes of a tree except plain containers: ScaleByAdamState, …"""
    found: list[str] = []

    def visit(node: Any) -> None:
        data = node.node_data()
        if data is not None and data[0] not in _CONTAINERS:
            found.append(data[0].__name__)
        for child in node.children():
            visit(child)

    visit(structure)
    return found


def differences(given: Mapping[str, Any], held: Mapping[str, Any]) -> list[str]:
    """Return the differences between two descriptions, one line for all leaves that have it.

    Args:
        given, held: the descriptions of the given state and of the checkpoint:
            `{"adapters": …, "leaves": …, "base": …, "optimizer": …}`. A base leaf without a digest
            has no values to compare. An optimizer state that is not given is not compared.
    """
    found: list[tuple[str, str]] = []
    for name, ours, theirs in _pairs(given["adapters"], held["adapters"]):
        found += [(name, what) for what in _fields("", _structure(ours), _structure(theirs))]
    # Earlier versions saved alpha/r, `scale`'s numbers and norms of unadapted modules as arrays.
    described = [
        x for leaf in held["adapters"].values() for x in leaf.values() if isinstance(x, dict)
    ]
    padded = any(0 in adapter.get("ranks", ()) for adapter in described)
    if padded and any(name.endswith(".multiplier") for name in held["leaves"]):
        found.append(
            (
                "",
                "an earlier version wrote it, with norms of modules that are not adapted; load the "
                "adapter's files",
            )
        )
    arrays = ".scaling", ".multiplier"
    wanted = {
        n: x
        for n, x in held["leaves"].items()
        if n != KEY and not (n.startswith("params") and n.endswith(arrays))
    }
    if given["optimizer"] is None:
        wanted = {n: x for n, x in wanted.items() if not n.startswith("opt_state")}
    elif given["optimizer"] != held["optimizer"]:
        what = f": given {given['optimizer']}, the checkpoint has {held['optimizer']}"
        found.append(("opt_state", what))
    adapted = sorted({*given["adapters"], *held["adapters"]}, key=len, reverse=True)
    other_ranks = {place for place, what in found if ", ranks: " in what}
    for name, ours, theirs in _pairs(given["leaves"], wanted):
        if ours is None or theirs is None or _as_shape(ours) != _as_shape(theirs):
            place = _place(name, adapted)
            if place in other_ranks or (name.startswith("opt_state") and other_ranks):
                continue  # shapes of factors and of their moments follow from the ranks
            what = f": given {_shown(ours)}, the checkpoint has {_shown(theirs)}"
            found.append((place, name.removeprefix(place) + what))
    return [*one_line_each(found), *_base_differences(given["base"], held["base"], adapted)]


def _base_differences(
    given: Mapping[str, Any], held: Mapping[str, Any], adapted: Sequence[str]
) -> list[str]:
    """Return the differences between two fingerprints of a base."""
    found: list[tuple[str, str]] = []
    for name, ours, theirs in _pairs(given, held):
        if ours and theirs and not ("digest" in ours and "digest" in theirs):
            ours, theirs = ({k: v for k, v in x.items() if k != "digest"} for x in (ours, theirs))
        if not _same(ours, theirs):
            same = _shown(ours) == _shown(theirs)
            said = f"given {'other values' if same else _shown(ours)}"
            place = _place(name, adapted)
            what = f"{name.removeprefix(place)} (base): {said}, the checkpoint was made on "
            found.append((place, what + _shown(theirs)))
    return one_line_each(found)


def _place(name: str, adapted: Sequence[str]) -> str:
    """Return the adapted leaf that a name is in, or the name; the longest leaves come first."""
    return next((leaf for leaf in adapted if name.startswith(leaf)), name)


def _structure(described: object) -> Any:
    """Return the part of an adapted leaf's description that must be equal, without `PROVENANCE`."""
    if not isinstance(described, dict):
        return described
    result = {name: value for name, value in described.items() if name != "counters"}
    for name, value in described.items():
        if isinstance(value, dict) and "config" in value:
            config = {field: x for field, x in value["config"].items() if field not in PROVENANCE}
            result[name] = {**value, "multiplier": value.get("multiplier", 1.0), "config": config}
    return result


def _pairs(given: Mapping[str, Any], held: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(name, given.get(name), held.get(name)) for name in {**given, **held}]


def _fields(name: str, given: object, held: object) -> list[str]:
    """Return a line for each field that differs, those of a config too."""
    if _has_fields(given) and _has_fields(held):
        pairs = _pairs(given, held)
        return [line for field, *two in pairs for line in _fields(f"{name}, {field}", *two)]
    if _same(given, held):
        return []
    return [f"{name}: given {_shown(given)}, the checkpoint has {_shown(held)}"]


def _has_fields(described: object) -> TypeGuard[dict[str, object]]:
    """Return whether this describes an adapted leaf, an adapter or a config."""
    return isinstance(described, dict) and bool({"layout", "ranks", "class"} & described.keys())


def _same(given: object, held: object) -> bool:
    """Return whether two JSON values are equal: NaN equals NaN, and the order of keys counts."""
    return json.dumps(given) == json.dumps(held)


def _as_shape(described: Mapping[str, Any]) -> Any:
    """Return what must be equal: the shape, and a dtype that the values can be cast to."""
    if described["kind"] in _SCALARS.values():
        return described["kind"]
    if described["kind"] == "key":
        return "key", described["shape"], described["dtype"]
    floating = jnp.issubdtype(jnp.dtype(described["dtype"]), jnp.floating)
    return described["shape"], "floating" if floating else described["dtype"]


def _shown(described: object) -> str:
    if not isinstance(described, dict):
        return "nothing" if described is None else repr(described)
    if "shape" in described:
        return f"{described['dtype']}[{','.join(map(str, described['shape']))}]"
    if "kind" in described:
        return f"a number ({described['kind']})"
    kinds = {"layout": "an adapted leaf", "ranks": "an adapter"}
    return next((said for field, said in kinds.items() if field in described), repr(described))
