"""Conversion of the parameters of LoHa layers to `loha_jax`'s trees, and back.

The model's `init` is evaluated abstractly. Each layer then boxes one of its factors with its layout
and settings, and Flax's own `add_axis` tells the box which axes `nn.scan` and `nn.vmap` add.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict

from loha_jax.lowrank.initial_values import FACTOR_NAMES
from loha_jax.lowrank.layout import Layout
from loha_jax.targets.config import LoHaConfig
from loha_jax.targets.module_names import Names, module_name, stack_names
from loha_jax.tree.factors import EXTRA_NAMES, Factors
from loha_jax.tree.leaves import LoHaWeight, SavedWeight
from loha_jax.tree.plan import Target

describing = jax.make_user_context(False)  # part of jit's cache key: a jitted init is traced again


def make_target(
    path: tuple[str, ...],
    name: str,
    layout: Layout,
    kernel: Any,
    config: LoHaConfig,
    names: Names | None,
) -> Target:
    """Return what a layer adapts, with its module names in the model."""
    module_names = stack_names(name, layout.sizes("s", kernel.shape), names)
    return Target(
        path=path,
        names=module_names,
        layout=layout,
        shape=tuple(kernel.shape),
        dtype=jnp.dtype(kernel.dtype),
        ranks=(config.r,) * len(module_names),
        alphas=(config.alpha,) * len(module_names),
        cp=config.use_effective_conv2d
        and any(size != 1 for size in layout.sizes("k", kernel.shape)),
    )


def loha_weight(
    target: Target, config: LoHaConfig, kernel: Any, tensors: Mapping[str, Any], adapter_name: str
) -> LoHaWeight:
    """Return the kernel with its factors as a leaf of a tree."""
    return LoHaWeight(
        kernel,
        {adapter_name: _factors(target, config, tensors)},
        target.layout,
        target.names,
        (adapter_name,),
    )


def _factors(target: Target, config: LoHaConfig, tensors: Mapping[str, Any]) -> Factors:
    w1_a, w1_b, w2_a, w2_b, t1, t2 = (tensors.get(name) for name in FACTOR_NAMES)
    return Factors(
        hada_w1_a=w1_a,
        hada_w1_b=w1_b,
        hada_w2_a=w2_a,
        hada_w2_b=w2_b,
        hada_t1=t1,
        hada_t2=t2,
        ranks=target.ranks,
        alphas=target.alphas,
        config=config,
    )


def product(
    target: Target, config: LoHaConfig, tensors: Mapping[str, Any], forward_mode: bool = False
) -> jax.Array:
    """Return FedPara's weight, in the kernel's shape and dtype."""
    delta = _factors(target, config, tensors).delta(forward_mode=forward_mode)
    return target.layout.fold(delta, target.shape).astype(target.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Described(meta.AxisMetadata):
    """A box around a layer's `hada_w1_a`: what the layer adapts, and the axes that transforms add.

    Only while `describing`.
    """

    value: Any
    kernel_name: str = dataclasses.field(metadata={"static": True})
    target: Target = dataclasses.field(metadata={"static": True})
    config: LoHaConfig = dataclasses.field(metadata={"static": True})
    fedpara: bool = dataclasses.field(metadata={"static": True})
    added: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def unbox(self) -> Any:
        """Return the factor itself."""
        return self.value

    def replace_boxed(self, val: Any) -> Any:
        """Return the same description of another array."""
        return dataclasses.replace(self, value=val)

    def add_axis(self, index: int, params: Any) -> Any:
        """Note the position of an axis that `nn.scan` or `nn.vmap` adds."""
        return dataclasses.replace(self, added=(*self.added, index))

    def remove_axis(self, index: int, params: Any) -> Any:
        """Forget the last axis that was noted."""
        return dataclasses.replace(self, added=self.added[:-1])

    def _axes(self, axes: Sequence[Any]) -> list[Any]:
        """Return an array's axes: its own, and between them "+0", "+1", … added by transforms."""
        axes = list(axes)
        for n, index in enumerate(self.added):
            axes.insert(index if index >= 0 else len(axes) + 1 + index, f"+{n}")
        return axes

    @property
    def kernel_axes(self) -> list[Any]:
        """The kernel's axes: its own by number, and those added."""
        return self._axes(range(self.target.layout.ndim))

    @property
    def layout(self) -> Layout:
        """The layout of the whole kernel."""
        tokens = re.findall(r"[a-z]\d*", self.target.layout.word)
        return Layout(
            " ".join("s" if isinstance(axis, str) else tokens[axis] for axis in self.kernel_axes)
        )

    def order(self, ndim: int) -> tuple[int, ...]:
        """Return a factor's axes in the order of `Factors`: the kernel's stack axes, then the rest."""
        own_stack = self.target.layout.axes("s")
        rest = [f".{n}" for n in range(ndim - len(own_stack) - len(self.added))]
        axes = self._axes([*own_stack, *rest])
        kernel_axes = self.kernel_axes
        stack = [kernel_axes[axis] for axis in self.layout.axes("s")]
        return tuple(axes.index(axis) for axis in (*stack, *rest))


def _describe(
    init: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
) -> dict[tuple[str, ...], Any]:
    """Evaluate `init` abstractly; return its flat params, with `Described` leaves."""
    leaves, treedef = jax.tree.flatten((args, kwargs))
    dynamic = [
        n
        for n, leaf in enumerate(leaves)
        if isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)
    ]

    def run(arrays):
        filled = list(leaves)
        for n, array in zip(dynamic, arrays, strict=True):
            filled[n] = array
        args, kwargs = treedef.unflatten(filled)
        return init(*args, **kwargs)

    with describing(True):
        variables = jax.eval_shape(run, [leaves[n] for n in dynamic])
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise ValueError(
            f"{init!r} is not the init of a Linen model: it gives no dict with 'params'"
        )
    flat = flatten_dict(variables["params"])
    if not any(isinstance(leaf, Described) for leaf in flat.values()):
        raise ValueError(f"The model of {init!r} has no layer of loha_jax.linen")
    return {
        path: leaf if isinstance(leaf, Described) else meta.unbox(leaf)
        for path, leaf in flat.items()
    }


def _layers(described: Mapping[tuple[str, ...], Any]) -> dict[tuple[str, ...], Described]:
    return {path[:-1]: leaf for path, leaf in described.items() if isinstance(leaf, Described)}


def _own_leaves(
    described: Mapping[tuple[str, ...], Any], path: tuple[str, ...], d: Described
) -> dict[str, Any]:
    """Return the shapes of a layer's kernel and factors by leaf name."""
    names = (*FACTOR_NAMES, *(() if d.fedpara else (d.kernel_name,)))
    leaves = {name: described[(*path, name)] for name in names if (*path, name) in described}
    return {name: d.value if isinstance(leaf, Described) else leaf for name, leaf in leaves.items()}


def _flat_params(params: Any) -> tuple[dict[tuple[str, ...], Any], Callable[[dict], Any]]:
    """Return the flat params of `params` or a dict of variables, and a function to rebuild it."""
    if isinstance(params, Mapping) and "params" in params:
        flat = flatten_dict(params["params"], keep_empty_nodes=True)
        return flat, lambda new: {**params, "params": unflatten_dict(new)}
    return flatten_dict(params, keep_empty_nodes=True), unflatten_dict


def _refuse(problems: Sequence[str], what: str) -> None:
    if problems:
        raise ValueError(f"{what}; nothing was converted. " + "; ".join(problems))


def _show(path: Sequence[str]) -> str:
    return "/".join(path)


def to_adapted(
    params: Any,
    init: Callable[..., Any],
    *args: Any,
    adapter_name: str = "default",
    names: Names | None = None,
    **kwargs: Any,
) -> Any:
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
    described = _describe(init, args, kwargs)
    flat, rebuild = _flat_params(meta.unbox(params))
    layers, problems, shapes = _layers(described), [], {}
    for path, d in layers.items():
        for name, want in _own_leaves(described, path, d).items():
            have = flat.get((*path, name))
            if have is None:
                problems.append(f"{_show((*path, name))} is missing")
            elif np.shape(have) != want.shape:
                problems.append(
                    f"{_show((*path, name))} has shape {np.shape(have)}, in the model {want.shape}"
                )
    problems += [
        f"{_show(path)}: the model has no LoHa layer there"
        for path in flat
        if path and path[-1] in FACTOR_NAMES and path not in described
    ]
    _refuse(problems, "The params and the model do not fit")
    for path, d in layers.items():
        axes = d.kernel_axes
        first = flat[(*path, FACTOR_NAMES[0])]
        sizes = dict(
            zip(d._axes([*d.target.layout.axes("s"), ".0", ".1"]), first.shape, strict=True)
        )
        shape = tuple(
            d.target.shape[axis] if isinstance(axis, int) else sizes[axis] for axis in axes
        )
        shapes[path] = jax.ShapeDtypeStruct(shape, d.target.dtype)
    targets = {
        path: make_target(
            path, module_name((*path, d.kernel_name)), d.layout, shapes[path], d.config, names
        )
        for path, d in layers.items()
    }
    adapted = {path: target for path, target in targets.items() if not layers[path].fedpara}
    config = _common_config(adapted, {path: layers[path].config for path in adapted})
    result = {path: leaf for path, leaf in flat.items() if path[-1] not in FACTOR_NAMES}
    for path, d in layers.items():
        tensors = {n: flat[(*path, n)] for n in FACTOR_NAMES if (*path, n) in flat}
        tensors = {n: jnp.transpose(tensor, d.order(tensor.ndim)) for n, tensor in tensors.items()}
        position = (*path, d.kernel_name)
        if d.fedpara:
            result[position] = product(targets[path], d.config, tensors)
        else:
            result[position] = loha_weight(
                targets[path], config, flat[position], tensors, adapter_name
            )
    return rebuild(result)


def _common_config(targets: Mapping[Any, Target], configs: Mapping[Any, LoHaConfig]) -> LoHaConfig:
    """Return one config for all layers, as PEFT has it."""
    if not targets:
        return LoHaConfig()
    counted = Counter(name for target in targets.values() for name in target.names)
    if twice := [name for name, count in counted.items() if count > 1]:
        raise ValueError(
            f"Two layers have the module name {twice[0]!r}: give names= that tell them apart"
        )

    def common(field: str, paths: Sequence[Any]) -> Any:
        values = {path: getattr(configs[path], field) for path in paths}
        if len(set(values.values())) > 1:
            shown = ", ".join(
                f"{targets[path].names[0]}: {value!r}" for path, value in values.items()
            )
            raise ValueError(
                f"The layers differ in {field}, of which an adapter's config holds one: {shown}"
            )
        return next(iter(values.values()), getattr(LoHaConfig, field))

    r, alpha = (
        Counter(getattr(c, f) for c in configs.values()).most_common(1)[0][0]
        for f in ("r", "alpha")
    )
    large = [
        path
        for path, t in targets.items()
        if any(size != 1 for size in t.layout.sizes("k", t.shape))
    ]

    def patterns(field: str, default: Any) -> dict[str, Any]:
        values = {
            name: getattr(configs[path], field) for path, t in targets.items() for name in t.names
        }
        return {f"^{re.escape(name)}": value for name, value in values.items() if value != default}

    return LoHaConfig(
        r=r,
        alpha=alpha,
        rank_pattern=patterns("r", r),
        alpha_pattern=patterns("alpha", alpha),
        rank_dropout=common("rank_dropout", list(targets)),
        module_dropout=common("module_dropout", list(targets)),
        init_weights=common("init_weights", list(targets)),
        use_effective_conv2d=common("use_effective_conv2d", large),
        target_modules=list(counted),
    )


def from_adapted(adapted: Any, init: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
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
    described = _describe(init, args, kwargs)
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
        for name, want in _own_leaves(described, path, d).items():
            if have[name].shape != want.shape:
                problems.append(
                    f"{_show((*path, name))} has shape {have[name].shape}, in the model "
                    f"{want.shape}"
                )
        result.update({(*path, name): value for name, value in have.items()})
    _refuse(problems, "The adapted tree and the model do not fit")
    return rebuild(result)


def _misfit(leaf: Any, d: Described) -> str | None:
    """Return why a leaf cannot be the weight of a layer, or None."""
    if d.fedpara:
        return "is the weight of a FedPara layer, which has no kernel"
    if not isinstance(leaf, LoHaWeight):
        return f"is a {type(leaf).__name__}, the model has a LoHa layer there"
    if len(leaf.active_adapters) != 1:
        return f"has the active adapters {list(leaf.active)}, of which it holds {sorted(leaf.adapters)}; one is needed"
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
