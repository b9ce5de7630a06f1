"""Conversion of the parameters of LoHa layers to `loha_jax`'s trees, and back.

`linen.described` finds the layers of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from loha_jax.linen.common_config import Path, common_config
from loha_jax.linen.described import Described, describe
from loha_jax.linen.layer_adapter import loha_weight, product
from loha_jax.lowrank.initial_values import FACTOR_NAMES
from loha_jax.targets.module_names import Names, module_name, stack_names
from loha_jax.targets.row_transforms import row_transform
from loha_jax.targets.used_names import check_used
from loha_jax.tree.factors import EXTRA_NAMES
from loha_jax.tree.leaves import LoHaWeight, SavedWeight
from loha_jax.tree.plan import Target, make_target


def _layers(described: Mapping[Path, object]) -> dict[Path, Described]:
    return {path[:-1]: leaf for path, leaf in described.items() if isinstance(leaf, Described)}


def _own_leaves(described: Mapping[Path, Any], path: Path, d: Described) -> dict[str, Any]:
    """Return the shapes of a layer's kernel and factors by leaf name."""
    names = (*FACTOR_NAMES, *(() if d.fedpara else (d.kernel_name,)))
    leaves = {name: described[(*path, name)] for name in names if (*path, name) in described}
    return {name: d.value if isinstance(leaf, Described) else leaf for name, leaf in leaves.items()}


def _flat_params(params: PyTree) -> tuple[dict[Path, Any], Callable[[dict[Path, Any]], Any]]:
    """Return the flat params of `params` or a dict of variables, and a function to rebuild it."""
    if isinstance(params, Mapping) and "params" in params:
        flat = flatten_dict(params["params"], keep_empty_nodes=True)
        return flat, lambda new: {**params, "params": unflatten_dict(new)}
    return flatten_dict(params, keep_empty_nodes=True), unflatten_dict


def _misshapen(
    path: Path, wanted: Mapping[str, jax.ShapeDtypeStruct], held: Mapping[str, Any]
) -> list[str]:
    """Return a line for each array of a layer that is missing or has another shape."""
    problems = []
    for name, want in wanted.items():
        place, shape = _show((*path, name)), np.shape(held[name])
        if held[name] is None:
            problems.append(f"{place} is missing")
        elif shape != want.shape:
            problems.append(f"{place} has shape {shape}, in the model {want.shape}")
    return problems


def _refuse(problems: Sequence[str], what: str) -> None:
    if problems:
        raise ValueError(f"{what}; nothing was converted. " + "; ".join(problems))


def _show(path: Sequence[str]) -> str:
    return "/".join(path)


def to_adapted(
    params: PyTree,
    init: Callable[..., PyTree],
    *args: object,
    adapter_name: str = "default",
    names: Names | None = None,
    **kwargs: object,
) -> PyTree:
    """Convert the params of a model with LoHa layers to a tree as made by `loha_jax.inject`.

    Each `kernel` becomes one `LoHaWeight` with its `hada_*`. `interop.save_peft` writes such a
    tree, `loha_jax.merge` returns the plain Flax model's params, and
    `loha_jax.adapt(plain_model.apply)` runs it. To load an adapter of PEFT's:

        tree = linen.to_adapted(params, model.init, key, x)
        tree = interop.load_peft(folder, tree, adapter_name="loaded")
        params = linen.from_adapted(tree, model.init, key, x)

    Args:
        params: the model's params or variables (`{"params": …}`). Boxes of partitioning metadata
            are removed.
        init, args, kwargs: the model's `init` and its arguments, with which `params` were, or could
            have been, made. It is evaluated abstractly to learn each layer's layout, rank and
            alpha, and the axes that `nn.scan` and `nn.vmap` add; arrays may be
            `jax.ShapeDtypeStruct`s.
        adapter_name: the name of the adapter in the tree.
        names: torch module names if they differ from the tree's, as for `loha_jax.inject`.

    Returns:
        The tree as dicts. A FedPara layer adapts no frozen kernel: it becomes a plain `kernel`, its
        product. The config targets the layers by name; ranks and alphas other than the most common
        ones are in `rank_pattern` and `alpha_pattern`.

    Raises:
        ValueError: `params` and the model do not match (all problems in one error), two layers have
            the same name, or layers differ in a field that a config holds once: dropouts,
            `init_weights`, `use_effective_conv2d` (of kernels larger than 1).

    Example:
        >>> import loha_jax
        >>> from loha_jax.linen import LoHaDense
        >>> layer, key, x = LoHaDense(4, r=2), jax.random.key(0), jnp.ones((1, 3))
        >>> adapted = to_adapted(layer.init(key, x), layer.init, key, x)
        >>> type(adapted["params"]["kernel"]).__name__
        'LoHaWeight'
        >>> loha_jax.merge(adapted)["params"]["kernel"].shape
        (3, 4)
    """
    described = describe(init, args, kwargs)
    flat, rebuild = _flat_params(meta.unbox(params))
    check_used(names, {module_name(path) for path in flat})
    layers, problems = _layers(described), []
    for path, d in layers.items():
        wanted = _own_leaves(described, path, d)
        problems += _misshapen(path, wanted, {name: flat.get((*path, name)) for name in wanted})
    problems += [
        f"{_show(path)}: the model has no LoHa layer there"
        for path in flat
        if path and path[-1] in FACTOR_NAMES and path not in described
    ]
    _refuse(problems, "The params and the model do not fit")
    targets = {
        path: _target(path, d, flat[(*path, FACTOR_NAMES[0])].shape, names)
        for path, d in layers.items()
    }
    adapted = {path: target for path, target in targets.items() if not layers[path].fedpara}
    config = common_config(adapted, {path: layers[path].config for path in adapted})
    result = {path: leaf for path, leaf in flat.items() if path[-1] not in FACTOR_NAMES}
    for path, d in layers.items():
        tensors = {n: flat[(*path, n)] for n in FACTOR_NAMES if (*path, n) in flat}
        tensors = {n: jnp.transpose(tensor, d.order(tensor.ndim)) for n, tensor in tensors.items()}
        position = (*path, d.kernel_name)
        result[position] = (
            product(targets[path], d.config, tensors)
            if d.fedpara
            else loha_weight(targets[path], config, flat[position], tensors, adapter_name)
        )
    return rebuild(result)


def _target(path: Path, d: Described, factor: tuple[int, ...], names: Names | None) -> Target:
    """Return what a layer adapts, with the axes that transforms add; `factor` has them too."""
    axes = d.axes_of([*d.target.layout.axes("s"), ".0", ".1"])
    sizes = dict(zip(axes, factor, strict=True))
    shape = tuple(
        d.target.shape[axis] if isinstance(axis, int) else sizes[axis] for axis in d.kernel_axes
    )
    kernel = jax.ShapeDtypeStruct(shape, d.target.dtype)
    name, stack = module_name((*path, d.kernel_name)), d.layout.sizes("s", shape)
    modules, rows = stack_names(name, stack, names), row_transform(name, names)
    return make_target(d.config, path, modules, d.layout, kernel, rows=rows)


def from_adapted(
    adapted: PyTree, init: Callable[..., PyTree], *args: object, **kwargs: object
) -> PyTree:
    """Convert an adapted tree to the params of LoHa layers: the inverse of `to_adapted`.

    Args:
        adapted: a tree made by `to_adapted`, `loha_jax.inject` or `interop.load_peft`, with one
            active adapter.
        init, args, kwargs: as for `to_adapted`.

    Returns:
        Params (or variables) of plain arrays: `kernel` and `hada_*`. A module in `modules_to_save`
        becomes its trained copy.

    Raises:
        ValueError: the tree and the model do not match, all problems in one error: a LoHa layer
            without a `LoHaWeight` or the reverse; no or several active adapters; another layout,
            rank, alpha, scaling or form (with or without cores); FedPara layers, which no kernel
            can be converted to.

    Example:
        >>> from loha_jax.linen import LoHaDense
        >>> layer, key, x = LoHaDense(4, r=2), jax.random.key(0), jnp.ones((1, 3))
        >>> params = layer.init(key, x)["params"]
        >>> back = from_adapted(to_adapted(params, layer.init, key, x), layer.init, key, x)
        >>> all((back[name] == value).all() for name, value in params.items())
        True
    """
    described = describe(init, args, kwargs)
    flat, rebuild = _flat_params(adapted)
    layers, problems, result = _layers(described), [], {}
    expected = {(*path, d.kernel_name): path for path, d in layers.items()}
    for position, leaf in flat.items():
        if isinstance(leaf, LoHaWeight) and position not in expected:
            problems.append(f"{_show(position)} is adapted, the model has no LoHa layer there")
        result[position] = leaf.__jax_array__() if isinstance(leaf, SavedWeight) else leaf
    for position, path in expected.items():
        d, leaf = layers[path], flat.get(position)
        problem = _misfit(leaf, d)
        if problem:
            problems.append(f"{_show(position)} {problem}")
            continue
        assert isinstance(leaf, LoHaWeight)
        tensors = {
            name: jnp.transpose(tensor, np.argsort(d.order(tensor.ndim)).tolist())
            for name, tensor in leaf.active_adapters[0].tensors.items()
        }
        have = {**tensors, d.kernel_name: leaf.kernel}
        problems += _misshapen(path, _own_leaves(described, path, d), have)
        result.update({(*path, name): value for name, value in have.items()})
    _refuse(problems, "The adapted tree and the model do not fit")
    return rebuild(result)


def _misfit(leaf: object, d: Described) -> str | None:
    """Return why a leaf cannot be the weight of a layer, or None."""
    if d.fedpara:
        return "is the weight of a FedPara layer, which has no kernel"
    if not isinstance(leaf, LoHaWeight):
        return f"is a {type(leaf).__name__}, the model has a LoHa layer there"
    if len(leaf.active_adapters) != 1:
        return (
            f"has the active adapters {list(leaf.active)}, of which it holds "
            f"{sorted(leaf.adapters)}; one is needed"
        )
    (factors,) = leaf.active_adapters
    if leaf.kernel is None or not factors.tensors:
        return "comes from one half of `partition`: put the halves together with `loha_jax.combine`"
    if extra := [name for name in EXTRA_NAMES if name in factors.trained]:
        return (
            f"has {' and '.join(extra)} (a LycorisConfig's), which the layer has no parameter for"
        )
    pairs = {
        "layout": (leaf.layout.word, d.layout.word),
        "r": (sorted({*factors.ranks}), [d.config.r]),
        "alpha": (sorted({*factors.alphas}), [d.config.alpha]),
        "cores": (factors.is_cp, d.target.cp),
    }
    differ = [
        f"{name}={have} (the layer: {want})" for name, (have, want) in pairs.items() if have != want
    ]
    if not differ and (factors.multiplier != 1 or factors.gate is not None):
        differ = ["a scaling that `loha_jax.scale` has changed from alpha/r"]
    return f"has {', '.join(differ)}" if differ else None
