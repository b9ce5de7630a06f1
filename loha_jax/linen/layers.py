"""Flax Linen layers with a LoHa adapter of their own, for authors of models.

A model that is there already is adapted by `loha_jax.inject`, without changing it. Each layer here is a subclass of the
Flax layer with its arguments and, for the same key, the same initial `kernel` (`embedding`) and `bias`. The factors
`hada_w1_a`, … stand beside the kernel in the params dict, in PEFT's shapes. The kernel is frozen: it gets no gradient.
Train the factors alone with a mask:

    mask = linen.trainable_mask(params)
    tx = optax.transforms.selective_transform(optax.adamw(1e-3), freeze_mask=jax.tree.map(operator.not_, mask))

Pretrained parameters of the plain Flax model go under the factors by
`unflatten_dict({**flatten_dict(params), **flatten_dict(pretrained)})` (`flax.traverse_util`). `to_adapted` and
`from_adapted` lead to `loha_jax`'s trees, and so to PEFT's files, `merge` and `explain`, and back.

With `fedpara=True` there is no kernel: the weight itself is the Hadamard product, as in FedPara.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from opt_einsum.parser import parse_einsum_input

from loha_jax.linen.layer_trees import (
    Described,
    describing,
    from_adapted,
    loha_weight,
    make_target,
    product,
    to_adapted,
)
from loha_jax.lowrank.initial_values import FACTOR_NAMES, init_factors
from loha_jax.lowrank.layout import Layout, einsum_layout
from loha_jax.targets.config import LoHaConfig
from loha_jax.targets.module_names import module_name, path_parts
from loha_jax.transform.adapt import adapt
from loha_jax.tree.dropout import dropout
from loha_jax.tree.inject import factor_dtype
from loha_jax.tree.placement import factor_axes
from loha_jax.tree.plan import Target

__all__ = [
    "LoHaConv",
    "LoHaDense",
    "LoHaDenseGeneral",
    "LoHaEinsum",
    "LoHaEmbed",
    "LoHaLayer",
    "from_adapted",
    "to_adapted",
    "trainable_mask",
]


class LoHaLayer(nn.Module):
    """What the layers of this module add to the Flax layers.

    Attributes:
        r: rank of each of the two factor pairs.
        alpha: the update is scaled by alpha/r. None is `LoHaConfig`'s 8; with `fedpara` no scaling.
        rank_dropout, module_dropout: as in `LoHaConfig`, in each call that is not deterministic; every call draws anew,
            one mask for the whole batch.
        init_weights: as in `LoHaConfig`: True, False or "lycoris".
        strategy: as for `loha_jax.adapt`: "auto", "factored", "fused" or "dense".
        forward_mode: plain products that `jax.jvp` can differentiate.
        deterministic: whether dropout is off; here or as an argument of the call, as for `nn.Dropout`. Needed where a
            dropout is set.
        rng_collection: the rng that dropout draws from.
        fedpara: no kernel; the weight is (w1_a @ w1_b) ⊙ (w2_a @ w2_b), or its form with cores, trained as a whole.
        variance_scale: with `fedpara`, the weight's initial variance is `variance_scale / fan_in`, where fan_in counts
            the in and spatial axes: 1 is LeCun's (Flax's default), 2 He's.
    """

    r: int = 8
    alpha: float | None = None
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    init_weights: bool | str = True
    strategy: str = "auto"
    forward_mode: bool = False
    deterministic: bool | None = None
    rng_collection: str = "dropout"
    fedpara: bool = False
    variance_scale: float = 1.0


class LoHaDense(LoHaLayer, nn.Dense):
    """`flax.linen.Dense` with a LoHa adapter, which is computed without building ΔW.

    Args:
        features, …: as for `nn.Dense`.
        r, alpha, …: see `LoHaLayer`.

    Parameters: `kernel` `[in, features]` (frozen), `bias`, `hada_w1_a`, `hada_w2_a` `[features, r]`, `hada_w1_b`,
    `hada_w2_b` `[r, in]`; factors are float32, or float64 beside such a kernel.

    Where `kernel_init` is wrapped by `nn.with_partitioning` or `nn.with_logical_partitioning`, the factors are boxed
    too: the out axis of w*_a and the in axis of w*_b take the name of the kernel's (first) such axis, r takes None.

    Raises:
        ValueError: a field that no adapter can be made from, or that `fedpara` has no use for.

    With `fedpara`: Hyeon-Woo et al., "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated
    Learning", ICLR 2022 (arXiv:2108.06098), Proposition 1.

    Example:
        >>> layer = LoHaDense(4, r=2)
        >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 3)))
        >>> sorted((name, value.shape) for name, value in variables["params"].items())[:4]
        [('bias', (4,)), ('hada_w1_a', (4, 2)), ('hada_w1_b', (2, 3)), ('hada_w2_a', (4, 2))]
        >>> LoHaDense(4, r=2, fedpara=True).init(jax.random.key(0), jnp.ones((1, 3)))["params"].keys()
        dict_keys(['bias', 'hada_w1_a', 'hada_w1_b', 'hada_w2_a', 'hada_w2_b'])
    """

    @nn.compact
    def __call__(self, inputs: Any, deterministic: bool | None = None) -> jax.Array:
        """`nn.Dense`'s result for the adapted kernel: `[..., in]` to `[..., features]`."""
        weight, others = _declare(self, nn.Dense, "kernel", (inputs,), lambda shape: Layout("io"))
        return _compute(self, nn.Dense, "kernel", weight, others, (inputs,), deterministic)


class LoHaDenseGeneral(LoHaLayer, nn.DenseGeneral):
    """`flax.linen.DenseGeneral` with a LoHa adapter, which is computed without building ΔW.

    The contracted axes flatten to the in side of the factors, the features to the out side. `batch_dims` are stack
    axes: one adapter per index, the factors stacked in front.

    Args:
        features, axis, batch_dims, …: as for `nn.DenseGeneral`.
        r, alpha, …: see `LoHaLayer`; parameters, partitioning and errors as in `LoHaDense`.

    Example:
        >>> layer = LoHaDenseGeneral((2, 5), axis=(-2, -1), r=3)
        >>> params = layer.init(jax.random.key(0), jnp.ones((7, 4, 6)))["params"]
        >>> params["kernel"].shape, params["hada_w1_a"].shape, params["hada_w1_b"].shape
        ((4, 6, 2, 5), (10, 3), (3, 24))
    """

    @nn.compact
    def __call__(self, inputs: Any, deterministic: bool | None = None) -> jax.Array:
        """`nn.DenseGeneral`'s result for the adapted kernel."""

        def layout(shape: Sequence[int]) -> Layout:
            stack, out = np.size(self.batch_dims), np.size(self.features)
            return Layout("s" * stack + "i" * (len(shape) - stack - out) + "o" * out)

        weight, others = _declare(self, nn.DenseGeneral, "kernel", (inputs,), layout)
        return _compute(self, nn.DenseGeneral, "kernel", weight, others, (inputs,), deterministic)


class LoHaConv(LoHaLayer, nn.Conv):
    """`flax.linen.Conv` (any number of spatial axes, grouped or not) with a LoHa adapter, computed without building ΔW.

    A `mask` covers the update too; such a convolution forms its weight.

    Args:
        features, kernel_size, …: as for `nn.Conv`.
        use_effective_conv2d: kernels larger than 1 get cores `hada_t1`, `hada_t2` (`[r, r, *spatial]`; for one spatial
            axis `[r, r, k, 1]`), and w*_a is `[r, features]`, w*_b `[r, in/groups]`. Flat otherwise: `[features, r]`
            and `[r, in/groups·prod(spatial)]`.
        r, alpha, …: see `LoHaLayer`; partitioning and errors as in `LoHaDense`. With `fedpara`, the flat form is the
            paper's Proposition 1 on the reshaped kernel, the one with cores its Proposition 3.

    Example:
        >>> layer = LoHaConv(8, (3, 3), r=2, use_effective_conv2d=True)
        >>> params = layer.init(jax.random.key(0), jnp.ones((1, 6, 6, 4)))["params"]
        >>> params["hada_t1"].shape, params["hada_w1_a"].shape, params["hada_w1_b"].shape
        ((2, 2, 3, 3), (2, 8), (2, 4))
    """

    use_effective_conv2d: bool = False

    @nn.compact
    def __call__(self, inputs: Any, deterministic: bool | None = None) -> jax.Array:
        """`nn.Conv`'s result for the adapted kernel."""
        weight, others = _declare(
            self, nn.Conv, "kernel", (inputs,), lambda shape: Layout("k" * (len(shape) - 2) + "io")
        )
        return _compute(self, nn.Conv, "kernel", weight, others, (inputs,), deterministic)


class LoHaEinsum(LoHaLayer, nn.Einsum):
    """`flax.linen.Einsum` with a LoHa adapter, which is computed without building ΔW.

    The einsum says what the kernel's axes are: those it shares with the input alone are in axes, with the result alone
    out axes, with both stack axes (one adapter per index).

    Args:
        shape, einsum_str, …: as for `nn.Einsum`.
        layout: what the kernel's axes are, e.g. "io"; needed where the einsum string comes with the call, because it
            must not differ between calls.
        r, alpha, …: see `LoHaLayer`; parameters, partitioning and errors as in `LoHaDense`.

    Raises:
        ValueError: no layout can be told, or the kernel's axes are not of these kinds.

    Example:
        >>> layer = LoHaEinsum((5, 2, 7), "btd,dnh->btnh", r=2)
        >>> params = layer.init(jax.random.key(0), jnp.ones((3, 4, 5)))["params"]
        >>> params["hada_w1_a"].shape, params["hada_w1_b"].shape
        ((14, 2), (2, 5))
    """

    layout: str | None = None

    @nn.compact
    def __call__(self, inputs: Any, einsum_str: str | None = None, deterministic: bool | None = None) -> jax.Array:
        """`nn.Einsum`'s result for the adapted kernel."""
        args = (inputs, einsum_str)
        layout = functools.partial(_einsum_layout, self, inputs)
        weight, others = _declare(self, nn.Einsum, "kernel", args, layout)
        return _compute(self, nn.Einsum, "kernel", weight, others, args, deterministic)


class LoHaEmbed(LoHaLayer, nn.Embed):
    """`flax.linen.Embed` with a LoHa adapter: a lookup forms the rows of ΔW that it reads, `attend` none of it.

    Out is the vocabulary, in the features: the orientation of an output head that is tied to the embedding. The
    attribute `embedding` is the adapted weight without dropout (an array-like; with `fedpara`, the whole table, which
    is formed for a lookup too).

    Args:
        num_embeddings, features, …: as for `nn.Embed`.
        r, alpha, …: see `LoHaLayer`; `hada_w1_a` is `[num_embeddings, r]`, `hada_w1_b` `[r, features]`.

    Example:
        >>> layer = LoHaEmbed(10, 4, r=2)
        >>> variables = layer.init(jax.random.key(0), jnp.array([1, 2]))
        >>> layer.apply(variables, jnp.ones((3, 4)), method="attend").shape
        (3, 10)
    """

    def setup(self) -> None:
        """Declares the table and its factors."""
        index = np.zeros((1,), np.int32)
        weight, _ = _declare(self, nn.Embed, "embedding", (index,), lambda shape: Layout("oi"))
        self.embedding = weight

    def __call__(self, inputs: Any, deterministic: bool | None = None) -> jax.Array:
        """The rows of the adapted table at these indices: `[...]` integers to `[..., features]`."""
        return _compute(self, nn.Embed, "embedding", self.embedding, {}, (inputs,), deterministic)

    def attend(self, query: Any, deterministic: bool | None = None) -> jax.Array:
        """`query @ embeddingᵀ` for the adapted table: `[..., features]` to `[..., num_embeddings]`."""
        return _compute(self, nn.Embed, "embedding", self.embedding, {}, (query,), deterministic, "attend")


# --- what the layers do -----------------------------------------------------------------------------------------------


class _Declarations(nn.Module):
    """Mixed into a Flax layer: its parameters are told to `record` instead of being made."""

    record: Callable[..., None] | None = None

    @nn.nowrap
    def param(self, name: str, init_fn: Callable[..., Any], *init_args, unbox: bool = True, **init_kwargs) -> Any:
        init = functools.partial(_init, init_fn, init_args, init_kwargs)
        box = jax.eval_shape(init, jax.random.key(0))
        assert self.record is not None
        self.record(name, init, box)
        (array,) = jax.tree.leaves(box)
        return jnp.zeros(array.shape, array.dtype)


def _init(init_fn: Callable[..., Any], args: tuple, kwargs: dict[str, Any], key: jax.Array) -> Any:
    return init_fn(key, *args, **kwargs)


@functools.cache
def _declaring(base: type[nn.Module]) -> Any:
    return type(base.__name__, (_Declarations, base), {"__module__": __name__})


def _fields(layer: nn.Module, base: type[nn.Module]) -> dict[str, Any]:
    """The arguments of the plain Flax layer."""
    own = (f.name for f in dataclasses.fields(base) if f.init)
    return {"parent": None, **{name: getattr(layer, name) for name in own if name not in ("parent", "name")}}


def _declare(
    layer: Any, base: type[nn.Module], kernel_name: str, args: tuple, layout_of: Callable[[Sequence[int]], Layout]
) -> tuple[Any, dict[str, Any]]:
    """The layer's weight and its other parameters, declared as the Flax layer declares them, then the factors."""
    declared: dict[str, tuple[Callable[..., Any], Any]] = {}

    def record(name: str, init: Callable[..., Any], box: Any) -> None:
        declared[name] = (init, box)

    recording = _declaring(base)(**_fields(layer, base), record=record)
    jax.eval_shape(lambda: recording.apply({}, *args))
    box = declared[kernel_name][1]
    (kernel,) = jax.tree.leaves(box)
    target, config = _target(layer, kernel_name, kernel, layout_of(kernel.shape))
    if layer.fedpara:
        del declared[kernel_name]
    others = {name: layer.param(name, init) for name, (init, _) in declared.items()}
    boxed = functools.partial(_boxed_factor, box, target)
    factors, draws = {}, dict(layer.scope.rng_counters)
    for name, shape in target.shapes(config.r).items():

        def init(key, name=name, shape=shape):
            factor = boxed(name, _initial_factor(layer, target, config, name, shape, key))
            if describing.value and name == FACTOR_NAMES[0]:
                return Described(meta.unbox(factor), kernel_name, target, config, layer.fedpara, ())
            return factor

        factors[name] = layer.param(name, init)
    # In a lifted transform, and in a shared scope, the count of draws goes on: what Flax draws next must not notice.
    layer.scope.rng_counters.update(draws)
    if layer.fedpara:
        return product(target, config, factors, layer.forward_mode), others
    return loha_weight(target, config, others.pop(kernel_name), factors, "default"), others


def _compute(
    layer: Any,
    base: type[nn.Module],
    kernel_name: str,
    weight: Any,
    others: dict[str, Any],
    args: tuple,
    deterministic: bool | None,
    method: str | None = None,
) -> jax.Array:
    """The Flax layer's own result with the adapted weight."""
    if layer.rank_dropout or layer.module_dropout:
        deterministic = nn.merge_param("deterministic", layer.deterministic, deterministic)
        if not deterministic:
            weight = dropout(weight, layer.make_rng(layer.rng_collection))
    plain = base(**_fields(layer, base))

    def run(weight, others, args) -> Any:
        return plain.apply({"params": {**others, kernel_name: weight}}, *args, method=method)

    return adapt(run, strategy=layer.strategy, forward_mode=layer.forward_mode)(weight, others, args)


def _target(layer: Any, kernel_name: str, kernel: Any, layout: Layout) -> tuple[Target, LoHaConfig]:
    """What the layer adapts, and its settings as a config; ValueError where they are no such."""
    if len(kernel.shape) != layout.ndim:
        raise ValueError(
            f"{_where(layer)}: layout={layout.word!r} is for {layout.ndim} axes, the kernel has {kernel.shape}"
        )
    alpha = layer.alpha
    if layer.fedpara:
        alpha = layer.r if alpha is None else alpha
        wrong = [name for name in _NOT_FOR_FEDPARA if getattr(layer, name) != getattr(LoHaLayer, name)]
        wrong += ["alpha"] * (alpha == 0) + ["variance_scale"] * (not layer.variance_scale > 0)
        if wrong:
            raise ValueError(
                f"{_where(layer)}: with fedpara=True there is no kernel, and the weight is the product of the factors. "
                f"Got {', '.join(f'{name}={getattr(layer, name)!r}' for name in wrong)}: leave out "
                f"{', '.join(_NOT_FOR_FEDPARA)}; alpha is not 0, and variance_scale positive."
            )
    try:
        config = LoHaConfig(
            r=layer.r,
            alpha=LoHaConfig.alpha if alpha is None else alpha,
            rank_dropout=layer.rank_dropout,
            module_dropout=layer.module_dropout,
            use_effective_conv2d=getattr(layer, "use_effective_conv2d", False),
            init_weights=layer.init_weights,
        )
    except ValueError as error:
        raise ValueError(f"{_where(layer)}: {error}") from None
    path = (*layer.path, kernel_name)
    return make_target(path, module_name(path), layout, kernel, config, None), config


_NOT_FOR_FEDPARA = ("rank_dropout", "module_dropout", "init_weights", "strategy")


def _where(layer: nn.Module) -> str:
    return f"{type(layer).__name__} at {'/'.join(layer.path) or 'the root'}"


def _initial_factor(
    layer: Any, target: Target, config: LoHaConfig, name: str, shape: tuple[int, ...], key: jax.Array
) -> jax.Array:
    """One factor of all modules of the kernel, `[*stack, *shape]`."""
    dtype = factor_dtype(target.dtype)
    if layer.fedpara:
        key = jax.random.fold_in(key, FACTOR_NAMES.index(name))
        return _fedpara_std(layer, target, config) * jax.random.normal(key, (*target.stack, *shape), dtype)
    names = [str(n) for n in range(len(target.names))]
    return init_factors(key, names, {name: shape}, config.init_weights, dtype, target.stack)[name]


def _fedpara_std(layer: Any, target: Target, config: LoHaConfig) -> float:
    """The standard deviation σ of every factor that gives the weight the variance variance_scale / fan_in.

    An element of w1_a @ w1_b is a sum of r products of independent numbers of mean 0: its variance is r·σ⁴. The two
    pairs are independent: the variance of their product is r²·σ⁸. With cores the sums have r² terms of three numbers:
    r⁴·σ¹². The scaling alpha/r enters squared.
    """
    _, in_, *spatial = target.layout.torch_shape(target.shape)[len(target.stack) :]
    variance = layer.variance_scale / (in_ * math.prod(spatial)) / (config.alpha / config.r) ** 2
    terms, numbers = (config.r**4, 12) if target.cp else (config.r**2, 8)
    return (variance / terms) ** (1 / numbers)


def _boxed_factor(box: Any, target: Target, name: str, factor: jax.Array) -> Any:
    """The factor in the kernel's partitioning box, with the names of its axes."""
    if not isinstance(box, nn.Partitioned):
        return factor
    names = tuple(box.names)
    if len(names) != target.layout.ndim:
        raise ValueError(
            f"The kernel of {target.names[0]} has shape {target.shape}, but its partitioning names {names}: give one "
            "name, or None, per axis."
        )
    axes = factor_axes(target.layout, target.shape, names, {name: factor}, cp=target.cp)
    return box.replace(value=factor, names=axes[name])


def _einsum_layout(layer: LoHaEinsum, inputs: Any, shape: Sequence[int]) -> Layout:
    if layer.layout is not None:
        return Layout(layer.layout)
    if layer.einsum_str is None:
        raise ValueError(
            f"{_where(layer)}: the einsum string comes with the call, so it does not settle what the axes of the "
            f"kernel {tuple(shape)} are. Pass layout= to the layer, e.g. layout='io' (s stack, i in, o out)."
        )
    kernel = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
    operands, result, _ = parse_einsum_input((layer.einsum_str.replace(" ", ""), inputs, kernel))
    word = einsum_layout(f"{operands}->{result}")
    if word is None:
        raise ValueError(
            f"{_where(layer)}: {layer.einsum_str!r} is no product that LoHa can adapt: the kernel needs axes that the "
            "input has and the result has not (in), axes the other way round (out), and otherwise only axes that both "
            "have (stack), each once. Use nn.Einsum."
        )
    return Layout(word)


# --- what is trained --------------------------------------------------------------------------------------------------


def trainable_mask(params: Any) -> Any:
    """The tree with True for the factors (leaves called `hada_*`) and False for everything else, for optax.

    `loha_jax.trainable_mask` does the same for trees that `inject` made. Biases and other layers are False: set what
    else is trained yourself.

    Args:
        params: the params (or variables) of a Linen model; boxes of partitioning metadata are looked through.

    Raises:
        ValueError: there is no factor.

    Example:
        >>> import operator, optax
        >>> params = LoHaDense(4, r=2).init(jax.random.key(0), jnp.ones((1, 3)))["params"]
        >>> mask = trainable_mask(params)
        >>> sum(jax.tree.leaves(mask)), len(jax.tree.leaves(mask))
        (4, 6)
        >>> freeze = jax.tree.map(operator.not_, mask)
        >>> state = optax.transforms.selective_transform(optax.adam(1e-3), freeze_mask=freeze).init(params)
    """
    mask = jax.tree_util.tree_map_with_path(lambda path, _: path_parts(path)[-1] in FACTOR_NAMES, params)
    if not any(jax.tree.leaves(mask)):
        raise ValueError(
            "These params hold no leaf called hada_*: no layer of loha_jax.linen made them. Trees that "
            "`loha_jax.inject` made have `loha_jax.trainable_mask`."
        )
    return mask
