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
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict
from opt_einsum.parser import parse_einsum_input

from loha_jax.adapt import adapt
from loha_jax.config import LoHaConfig
from loha_jax.dropout import dropout
from loha_jax.init import FACTOR_NAMES, init_factors
from loha_jax.inject import factor_dtype
from loha_jax.layouts import Layout
from loha_jax.naming import Names, module_name, path_parts, stack_names
from loha_jax.plan import Target
from loha_jax.weight import Factors, LoHaWeight, SavedWeight, alpha_over_r

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

_describing = jax.make_user_context(False)  # part of jit's cache key: a jitted init is traced again


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
            if _describing.value and name == FACTOR_NAMES[0]:
                return _Described(meta.unbox(factor), kernel_name, target, config, layer.fedpara, ())
            return factor

        factors[name] = layer.param(name, init)
    # In a lifted transform, and in a shared scope, the count of draws goes on: what Flax draws next must not notice.
    layer.scope.rng_counters.update(draws)
    if layer.fedpara:
        return _product(target, config, factors, layer.forward_mode), others
    return _loha_weight(target, config, others.pop(kernel_name), factors, "default"), others


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
    return _make_target(path, module_name(path), layout, kernel, config, None), config


_NOT_FOR_FEDPARA = ("rank_dropout", "module_dropout", "init_weights", "strategy")


def _make_target(
    path: tuple[str, ...], name: str, layout: Layout, kernel: Any, config: LoHaConfig, names: Names | None
) -> Target:
    module_names = stack_names(name, layout.sizes("s", kernel.shape), names)
    return Target(
        path=path,
        names=module_names,
        layout=layout,
        shape=tuple(kernel.shape),
        dtype=jnp.dtype(kernel.dtype),
        ranks=(config.r,) * len(module_names),
        alphas=(config.alpha,) * len(module_names),
        cp=config.use_effective_conv2d and any(size != 1 for size in layout.sizes("k", kernel.shape)),
    )


def _where(layer: nn.Module) -> str:
    return f"{type(layer).__name__} at {'/'.join(layer.path) or 'the root'}"


def _loha_weight(
    target: Target, config: LoHaConfig, kernel: Any, tensors: Mapping[str, Any], adapter_name: str
) -> LoHaWeight:
    return LoHaWeight(
        kernel, {adapter_name: _factors(target, config, tensors)}, target.layout, target.names, (adapter_name,)
    )


def _factors(target: Target, config: LoHaConfig, tensors: Mapping[str, Any]) -> Factors:
    dtype = factor_dtype(target.dtype)
    return Factors(
        **{name: tensors.get(name) for name in FACTOR_NAMES},
        scaling=alpha_over_r(target.alphas, target.ranks, target.stack, dtype),
        ranks=target.ranks,
        alphas=target.alphas,
        config=config,
    )


def _product(target: Target, config: LoHaConfig, tensors: Mapping[str, Any], forward_mode: bool = False) -> jax.Array:
    """FedPara's weight, in the kernel's shape and dtype."""
    delta = _factors(target, config, tensors).delta(forward_mode=forward_mode)
    return target.layout.fold(delta, target.shape).astype(target.dtype)


def _initial_factor(
    layer: Any, target: Target, config: LoHaConfig, name: str, shape: tuple[int, ...], key: jax.Array
) -> jax.Array:
    """One factor of all modules of the kernel, `[*stack, *shape]`."""
    dtype = factor_dtype(target.dtype)
    if layer.fedpara:
        key = jax.random.fold_in(key, FACTOR_NAMES.index(name))
        return _fedpara_std(layer, target, config) * jax.random.normal(key, (*target.stack, *shape), dtype)
    names = [str(n) for n in range(len(target.names))]
    return init_factors(key, names, {name: shape}, config.init_weights, dtype)[name].reshape(*target.stack, *shape)


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
    names, layout = tuple(box.names), target.layout
    if len(names) != layout.ndim:
        raise ValueError(
            f"The kernel of {target.names[0]} has shape {target.shape}, but its partitioning names {names}: give one "
            "name, or None, per axis."
        )

    def of(kind: str) -> tuple[Any, ...]:
        return tuple(names[axis] for axis in layout.axes(kind))

    # Axes that are joined are cut along the first one: the others vary faster.
    out, in_ = of("o")[:1], of("i")[:1]
    if name.startswith("hada_t"):
        tail = (None, None, *of("k"))
    elif target.cp:
        tail = (None, *(out if name.endswith("_a") else in_))
    else:
        tail = (*out, None) if name.endswith("_a") else (None, *in_)
    own = (*of("s"), *tail)
    return box.replace(value=factor, names=(*own, *(None,) * (factor.ndim - len(own))))


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
    given, letters = operands.split(",")
    kinds = {(True, True): "s", (True, False): "i", (False, True): "o", (False, False): "?"}
    word = "".join(kinds[letter in given, letter in result] for letter in letters)
    if "?" in word or not {"i", "o"} <= set(word) or len(set(letters)) < len(letters):
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


# --- to loha_jax's trees and back -------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Described(meta.AxisMetadata):
    """Boxes a layer's `hada_w1_a` while `_describing`: what the layer adapts, and the axes that transforms add."""

    value: Any
    kernel_name: str = dataclasses.field(metadata={"static": True})
    target: Target = dataclasses.field(metadata={"static": True})
    config: LoHaConfig = dataclasses.field(metadata={"static": True})
    fedpara: bool = dataclasses.field(metadata={"static": True})
    added: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> Any:
        return dataclasses.replace(self, value=val)

    def add_axis(self, index: int, params: Any) -> Any:
        return dataclasses.replace(self, added=(*self.added, index))

    def remove_axis(self, index: int, params: Any) -> Any:
        return dataclasses.replace(self, added=self.added[:-1])

    def _axes(self, own: Sequence[Any]) -> list[Any]:
        """An array's axes: its own, and "+0", "+1", … that `nn.scan` and `nn.vmap` put between them."""
        axes = list(own)
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
        return Layout(" ".join("s" if isinstance(axis, str) else tokens[axis] for axis in self.kernel_axes))

    def order(self, ndim: int) -> tuple[int, ...]:
        """A factor's axes, of `ndim`, in the order of `Factors`: the stack axes as in the kernel, then its own."""
        own_stack = self.target.layout.axes("s")
        rest = [f".{n}" for n in range(ndim - len(own_stack) - len(self.added))]
        axes = self._axes([*own_stack, *rest])
        kernel_axes = self.kernel_axes
        stack = [kernel_axes[axis] for axis in self.layout.axes("s")]
        return tuple(axes.index(axis) for axis in (*stack, *rest))


def _describe(init: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> dict[tuple[str, ...], Any]:
    """The flat params of an abstract run of `init`, with `_Described` leaves."""
    leaves, treedef = jax.tree.flatten((args, kwargs))
    dynamic = [n for n, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)]

    def run(arrays):
        filled = list(leaves)
        for n, array in zip(dynamic, arrays, strict=True):
            filled[n] = array
        args, kwargs = treedef.unflatten(filled)
        return init(*args, **kwargs)

    with _describing(True):
        variables = jax.eval_shape(run, [leaves[n] for n in dynamic])
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise ValueError(f"{init!r} is not the init of a Linen model: it gives no dict with 'params'")
    flat = flatten_dict(variables["params"])
    if not any(isinstance(leaf, _Described) for leaf in flat.values()):
        raise ValueError(f"The model of {init!r} has no layer of loha_jax.linen")
    return {path: leaf if isinstance(leaf, _Described) else meta.unbox(leaf) for path, leaf in flat.items()}


def _layers(described: Mapping[tuple[str, ...], Any]) -> dict[tuple[str, ...], _Described]:
    return {path[:-1]: leaf for path, leaf in described.items() if isinstance(leaf, _Described)}


def _own_leaves(described: Mapping[tuple[str, ...], Any], path: tuple[str, ...], d: _Described) -> dict[str, Any]:
    """Shapes of a layer's kernel and factors by leaf name."""
    names = (*FACTOR_NAMES, *(() if d.fedpara else (d.kernel_name,)))
    leaves = {name: described[(*path, name)] for name in names if (*path, name) in described}
    return {name: d.value if isinstance(leaf, _Described) else leaf for name, leaf in leaves.items()}


def _flat_params(params: Any) -> tuple[dict[tuple[str, ...], Any], Callable[[dict], Any]]:
    """The flat params inside `params` or a dict of variables, and what puts new ones in their place."""
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
    """The params of a model with layers of this module as a tree that `loha_jax.inject` could have made.

    Each `kernel` with its `hada_*` becomes one `LoHaWeight`: `interop.save_peft` writes such a tree, `loha_jax.merge`
    makes it the plain Flax model's, and `loha_jax.adapt(plain_model.apply)` runs it. To load an adapter of PEFT's:

        adapted = interop.load_peft(folder, linen.to_adapted(params, model.init, key, x), adapter_name="loaded")
        params = linen.from_adapted(adapted, model.init, key, x)

    Args:
        params: of the model, or its variables (`{"params": …}`); boxes of partitioning metadata are taken off.
        init, args, kwargs: the model's `init` and its arguments, as they made (or could make) `params`. It is evaluated
            abstractly, so that each layer can say its layout, rank and alpha, and `nn.scan` and `nn.vmap` which axes
            they add; arrays may be `jax.ShapeDtypeStruct`s.
        adapter_name: of the adapter in the tree.
        names: torch module names where they differ from the tree's, as for `loha_jax.inject`.

    Returns:
        The tree as dicts. A FedPara layer is no adapter of a frozen kernel: it becomes the plain `kernel` that its
        factors make. The config targets the layers by name; a rank or alpha that is not the most common one is in
        `rank_pattern` and `alpha_pattern`.

    Raises:
        ValueError: `params` and the model do not fit (all problems in one error), two layers have one name, or the
            layers differ in what one config holds once: dropouts, `init_weights`, `use_effective_conv2d` (of kernels
            larger than 1).

    Example:
        >>> import loha_jax
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
                problems.append(f"{_show((*path, name))} has shape {np.shape(have)}, in the model {want.shape}")
    problems += [
        f"{_show(path)}: the model has no LoHa layer there"
        for path in flat
        if path and path[-1] in FACTOR_NAMES and path not in described
    ]
    _refuse(problems, "The params and the model do not fit")
    for path, d in layers.items():
        axes = d.kernel_axes
        first = flat[(*path, FACTOR_NAMES[0])]
        sizes = dict(zip(d._axes([*d.target.layout.axes("s"), ".0", ".1"]), first.shape, strict=True))
        shape = tuple(d.target.shape[axis] if isinstance(axis, int) else sizes[axis] for axis in axes)
        shapes[path] = jax.ShapeDtypeStruct(shape, d.target.dtype)
    targets = {
        path: _make_target(path, module_name((*path, d.kernel_name)), d.layout, shapes[path], d.config, names)
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
            result[position] = _product(targets[path], d.config, tensors)
        else:
            result[position] = _loha_weight(targets[path], config, flat[position], tensors, adapter_name)
    return rebuild(result)


def _common_config(targets: Mapping[Any, Target], configs: Mapping[Any, LoHaConfig]) -> LoHaConfig:
    """One config for all layers, as PEFT has it."""
    if not targets:
        return LoHaConfig()
    counted = Counter(name for target in targets.values() for name in target.names)
    if twice := [name for name, count in counted.items() if count > 1]:
        raise ValueError(f"Two layers have the module name {twice[0]!r}: give names= that tell them apart")

    def common(field: str, paths: Sequence[Any]) -> Any:
        values = {path: getattr(configs[path], field) for path in paths}
        if len(set(values.values())) > 1:
            shown = ", ".join(f"{targets[path].names[0]}: {value!r}" for path, value in values.items())
            raise ValueError(f"The layers differ in {field}, of which an adapter's config holds one: {shown}")
        return next(iter(values.values()), getattr(LoHaConfig, field))

    r, alpha = (Counter(getattr(c, f) for c in configs.values()).most_common(1)[0][0] for f in ("r", "alpha"))
    large = [path for path, t in targets.items() if any(size != 1 for size in t.layout.sizes("k", t.shape))]

    def patterns(field: str, default: Any) -> dict[str, Any]:
        values = {name: getattr(configs[path], field) for path, t in targets.items() for name in t.names}
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
    """The way back from `to_adapted`: an adapted tree as the params of a model with layers of this module.

    Args:
        adapted: a tree that `to_adapted`, `loha_jax.inject` or `interop.load_peft` made, with values; its one active
            adapter is taken.
        init, args, kwargs: as for `to_adapted`.

    Returns:
        Params (or variables) of plain arrays: `kernel` and `hada_*`; a module in `modules_to_save` is its trained copy.

    Raises:
        ValueError: the tree and the model do not fit, all problems in one error: a LoHa layer without a `LoHaWeight` or
            the other way round, no or several active adapters, another layout, rank, alpha, scaling or form (flat, with
            cores); or the model has FedPara layers, which no kernel can be turned into.

    Example:
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
                problems.append(f"{_show((*path, name))} has shape {have[name].shape}, in the model {want.shape}")
        result.update({(*path, name): value for name, value in have.items()})
    _refuse(problems, "The adapted tree and the model do not fit")
    return rebuild(result)


def _misfit(leaf: Any, d: _Described) -> str | None:
    """Why a leaf cannot be the weight of a layer, or None."""
    if d.fedpara:
        return "is the weight of a FedPara layer, which has no kernel"
    if not isinstance(leaf, LoHaWeight):
        return f"is a {type(leaf).__name__}, the model has a LoHa layer there"
    if len(leaf.active_adapters) != 1:
        return f"has the active adapters {list(leaf.active)}, of which it holds {sorted(leaf.adapters)}; one is needed"
    (factors,) = leaf.active_adapters
    if leaf.kernel is None or not factors.tensors:
        return "comes from one half of `partition`: put the halves together with `loha_jax.combine`"
    pairs = {
        "layout": (leaf.layout.word, d.layout.word),
        "r": (sorted({*factors.ranks}), [d.config.r]),
        "alpha": (sorted({*factors.alphas}), [d.config.alpha]),
        "cores": (factors.is_cp, d.target.cp),
    }
    differ = [f"{name}={have} (the layer: {want})" for name, (have, want) in pairs.items() if have != want]
    if not differ:
        own = alpha_over_r(factors.alphas, factors.ranks, factors.scaling.shape, factors.scaling.dtype)
        if not np.array_equal(np.asarray(factors.scaling), np.asarray(own)):
            differ = ["a scaling that `loha_jax.scale` has changed from alpha/r"]
    return f"has {', '.join(differ)}" if differ else None
