"""The layers: Flax' own with a LoHa adapter."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from opt_einsum.parser import parse_einsum_input

from loha_jax.linen.adapted_layer import LoHaLayer, adapted_call, compute, declare, where
from loha_jax.lowrank.layout import Layout, einsum_layout


class LoHaDense(LoHaLayer, nn.Dense):
    """`flax.linen.Dense` with a LoHa adapter, computed without materialising ΔW.

    Args:
        features, …: as for `nn.Dense`.
        r, alpha, …: see `LoHaLayer`.

    Parameters: `kernel` `[in, features]` (frozen), `bias`, `hada_w1_a` and `hada_w2_a`
    `[features, r]`, `hada_w1_b` and `hada_w2_b` `[r, in]`. Factors are float64 for a float64
    kernel, otherwise float32.

    If `kernel_init` is wrapped by `nn.with_partitioning` or `nn.with_logical_partitioning`, the
    factors are boxed too. The output axis of w*_a and the input axis of w*_b take the name of the
    kernel's first such axis; r takes None.

    Raises:
        ValueError: a field is invalid for an adapter, or has no use with `fedpara`.

    References:
        Hyeon-Woo et al., "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated
        Learning", ICLR 2022 (arXiv:2108.06098), Proposition 1: `fedpara`.

    Example:
        >>> layer, key, x = LoHaDense(4, r=2), jax.random.key(0), jnp.ones((1, 3))
        >>> params = layer.init(key, x)["params"]
        >>> sorted((name, value.shape) for name, value in params.items())[:3]
        [('bias', (4,)), ('hada_w1_a', (4, 2)), ('hada_w1_b', (2, 3))]
        >>> LoHaDense(4, r=2, fedpara=True).init(key, x)["params"].keys()
        dict_keys(['bias', 'hada_w1_a', 'hada_w1_b', 'hada_w2_a', 'hada_w2_b'])
    """

    @nn.compact
    def __call__(self, inputs: ArrayLike, deterministic: bool | None = None) -> jax.Array:
        """Apply the adapted kernel, as `nn.Dense` does: `[..., in]` to `[..., features]`."""
        return adapted_call(self, nn.Dense, (inputs,), lambda shape: Layout("io"), deterministic)


class LoHaDenseGeneral(LoHaLayer, nn.DenseGeneral):
    """`flax.linen.DenseGeneral` with a LoHa adapter, computed without materialising ΔW.

    The contracted axes are flattened to the input features of the factors, the features to their
    output features. `batch_dims` are stack axes: one adapter per index, the factors stacked in
    front.

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
    def __call__(self, inputs: ArrayLike, deterministic: bool | None = None) -> jax.Array:
        """Apply the adapted kernel, as `nn.DenseGeneral` does."""

        def layout(shape: Sequence[int]) -> Layout:
            stack, out = np.size(self.batch_dims), np.size(self.features)
            return Layout("s" * stack + "i" * (len(shape) - stack - out) + "o" * out)

        return adapted_call(self, nn.DenseGeneral, (inputs,), layout, deterministic)


class LoHaConv(LoHaLayer, nn.Conv):
    """`flax.linen.Conv` with a LoHa adapter, computed without materialising ΔW.

    It has any number of spatial axes and groups. A `mask` covers the update too; a convolution with
    one materialises its weight.

    Args:
        features, kernel_size, …: as for `nn.Conv`.
        use_effective_conv2d: kernels larger than 1 get cores `hada_t1`, `hada_t2`
            (`[r, r, *spatial]`; for one spatial axis `[r, r, k, 1]`), w*_a is `[r, features]` and
            w*_b `[r, in/groups]`. Otherwise w*_a is `[features, r]` and w*_b
            `[r, in/groups·prod(spatial)]`.
        r, alpha, …: see `LoHaLayer`; partitioning and errors as in `LoHaDense`. With `fedpara`, the
            form without cores is the paper's Proposition 1 on the reshaped kernel, the form with
            cores its Proposition 3.

    Example:
        >>> layer = LoHaConv(8, (3, 3), r=2, use_effective_conv2d=True)
        >>> params = layer.init(jax.random.key(0), jnp.ones((1, 6, 6, 4)))["params"]
        >>> params["hada_t1"].shape, params["hada_w1_a"].shape, params["hada_w1_b"].shape
        ((2, 2, 3, 3), (2, 8), (2, 4))
    """

    use_effective_conv2d: bool = False

    @nn.compact
    def __call__(self, inputs: ArrayLike, deterministic: bool | None = None) -> jax.Array:
        """Apply the adapted kernel, as `nn.Conv` does."""

        def layout(shape: Sequence[int]) -> Layout:
            return Layout("k" * (len(shape) - 2) + "io")

        return adapted_call(self, nn.Conv, (inputs,), layout, deterministic)


class LoHaEinsum(LoHaLayer, nn.Einsum):
    """`flax.linen.Einsum` with a LoHa adapter, computed without materialising ΔW.

    The equation determines the kernel's axes: those shared only with the input are input axes, only
    with the result output axes, with both stack axes (one adapter per index).

    Args:
        shape, einsum_str, …: as for `nn.Einsum`.
        layout: the kernel's axes, such as "io". Required if the equation is an argument of the
            call, because the layout must be the same in all calls.
        r, alpha, …: see `LoHaLayer`; parameters, partitioning and errors as in `LoHaDense`.

    Raises:
        ValueError: the layout is unknown, or the kernel's axes are not of these kinds.

    Example:
        >>> layer = LoHaEinsum((5, 2, 7), "btd,dnh->btnh", r=2)
        >>> params = layer.init(jax.random.key(0), jnp.ones((3, 4, 5)))["params"]
        >>> params["hada_w1_a"].shape, params["hada_w1_b"].shape
        ((14, 2), (2, 5))
    """

    layout: str | None = None

    @nn.compact
    def __call__(
        self, inputs: ArrayLike, einsum_str: str | None = None, deterministic: bool | None = None
    ) -> jax.Array:
        """Apply the adapted kernel, as `nn.Einsum` does."""
        layout = functools.partial(_einsum_layout, self, inputs)
        return adapted_call(self, nn.Einsum, (inputs, einsum_str), layout, deterministic)


class LoHaEmbed(LoHaLayer, nn.Embed):
    """`flax.linen.Embed` with a LoHa adapter.

    A lookup materialises only the rows of ΔW that it reads, `attend` none. The output features are
    the vocabulary, the input features the embedding's: the orientation of an output head tied to
    the embedding. The attribute `embedding` is the adapted weight without dropout, as an
    array-like. With `fedpara` it is the whole table, which is materialised for a lookup too.

    Args:
        num_embeddings, features, …: as for `nn.Embed`.
        r, alpha, …: see `LoHaLayer`; `hada_w1_a` is `[num_embeddings, r]`, and `hada_w1_b`
            is `[r, features]`.

    Example:
        >>> layer = LoHaEmbed(10, 4, r=2)
        >>> variables = layer.init(jax.random.key(0), jnp.array([1, 2]))
        >>> layer.apply(variables, jnp.ones((3, 4)), method="attend").shape
        (3, 10)
    """

    def setup(self) -> None:
        """Declare the table and its factors."""
        index = np.zeros((1,), np.int32)
        weight, _ = declare(self, nn.Embed, "embedding", (index,), lambda shape: Layout("oi"))
        self.embedding = weight

    def __call__(self, inputs: ArrayLike, deterministic: bool | None = None) -> jax.Array:
        """Return rows of the adapted table: `[...]` integers to `[..., features]`."""
        return compute(self, nn.Embed, "embedding", self.embedding, {}, (inputs,), deterministic)

    def attend(self, query: ArrayLike, deterministic: bool | None = None) -> jax.Array:
        """Compute `query @ embeddingᵀ`: `[..., features]` to `[..., num_embeddings]`."""
        return compute(
            self, nn.Embed, "embedding", self.embedding, {}, (query,), deterministic, "attend"
        )


def _einsum_layout(layer: LoHaEinsum, inputs: ArrayLike, shape: Sequence[int]) -> Layout:
    if layer.layout is not None:
        return Layout(layer.layout)
    if layer.einsum_str is None:
        raise ValueError(
            f"{where(layer)}: the einsum string comes with the call, so it does not settle what "
            f"the axes of the kernel {tuple(shape)} are. Pass layout= to the layer, e.g. "
            "layout='io' (s stack, i in, o out)."
        )
    kernel = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
    operands, result, _ = parse_einsum_input((layer.einsum_str.replace(" ", ""), inputs, kernel))
    word = einsum_layout(f"{operands}->{result}")
    if word is None:
        raise ValueError(
            f"{where(layer)}: {layer.einsum_str!r} is no product that LoHa can adapt: the kernel "
            "needs axes that the input has and the result has not (in), axes the other way round "
            "(out), and otherwise only axes that both have (stack), each once. Use nn.Einsum."
        )
    return Layout(word)
