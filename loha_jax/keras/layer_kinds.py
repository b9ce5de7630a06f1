"""The kinds of layers whose kernel can be adapted: its layout, and the product that it is in."""

# Keras has no type information.
# pyright: reportMissingImports=false, reportUnknownVariableType=false
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from keras import layers

from loha_jax.keras._keras_internals import Layer, Variable
from loha_jax.lowrank.layout import einsum_layout
from loha_jax.transform.options import Options
from loha_jax.transform.update_alone import update_alone
from loha_jax.tree.leaves import LoHaWeight

KINDS = (
    layers.Dense,
    layers.EinsumDense,
    layers.Conv1D,
    layers.Conv2D,
    layers.Conv3D,
    layers.Embedding,
)

TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)

DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
"""Their kernels are `[*taps, in, multiplier]`, and `[in * multiplier, 1, *taps]` in torch."""

NORMALISATIONS = (
    layers.BatchNormalization,
    layers.GroupNormalization,
    layers.LayerNormalization,
    layers.RMSNormalization,
)

_COMMON_NAMES: dict[str, str] = {
    "gamma": "scale",
    "beta": "bias",
    "moving_mean": "mean",
    "moving_variance": "var",
}


def base_class(layer: Layer) -> type:
    """Return the class that a layer had before it was adapted."""
    return getattr(type(layer), "_loha_base", type(layer))


def common_name(layer: Layer, variable: Variable) -> str:
    """Return the name of a variable as other libraries have it: `embedding`, `scale`, `mean`."""
    if isinstance(layer, layers.Embedding) and variable.name == "embeddings":
        return "embedding"
    if isinstance(layer, NORMALISATIONS):
        return _COMMON_NAMES.get(variable.name, str(variable.name))
    return str(variable.name)


def kernel_of(layer: Layer) -> Variable | None:
    """Return the variable that is the kernel of a layer of a known kind; None for other layers."""
    if not isinstance(layer, KINDS):
        return None
    name = "_embeddings" if isinstance(layer, layers.Embedding) else "_kernel"
    return getattr(layer, name, None)


def kernel_layout(layer: Layer) -> str | None:
    """Return the layout of a layer's kernel; None for an einsum that no layout describes."""
    if isinstance(layer, layers.Embedding):
        return "oi"
    if isinstance(layer, layers.EinsumDense):
        return einsum_layout(layer.equation)
    return "k" * getattr(layer, "rank", 0) + "io"  # Dense has no spatial axes


def why_not(layer: Layer, variable: Variable, leaf: LoHaWeight) -> str | None:
    """Return why a layer's variable cannot be adapted; None if it can."""
    name = base_class(layer).__name__
    if variable is not kernel_of(layer):
        kinds = ", ".join(kind.__name__ for kind in KINDS)
        return f"a {name} is none of the layers that can be adapted: {kinds}"
    if layer.lora_enabled:
        return "it has Keras' own LoRA (enable_lora): save the merged weights, and inject into them"
    if variable.constraint is not None:
        return "it has a constraint, which the adapted weight would not satisfy: leave it out"
    mode = layer.quantization_mode
    if mode is None:
        return None
    if mode not in ("int8", "int4") or base_class(layer) not in _PRODUCTS:
        return (
            f"a {name} quantised to {mode} is none of int8 and int4 Dense, EinsumDense and "
            "Embedding: adapt the float layer"
        )
    if any(factors.dora_scale is not None for factors in leaf.adapters.values()):
        return "a weight decomposition needs the norms of a float kernel: adapt the float layer"
    return None


# --- the update of a quantised layer --------------------------------------------------------------


def update_of(layer: Layer, inputs: jax.Array, leaf: LoHaWeight, options: Options) -> jax.Array:
    """Return what the adapters add to the product of a layer, in the layer's compute dtype."""
    delta = _PRODUCTS[base_class(layer)](layer, inputs, leaf, options)
    return delta.astype(layer.compute_dtype)


def _dense(layer: Layer, inputs: jax.Array, leaf: LoHaWeight, options: Options) -> jax.Array:
    return update_alone(jnp.matmul, inputs, leaf, options)


def _einsum(layer: Layer, inputs: jax.Array, leaf: LoHaWeight, options: Options) -> jax.Array:
    def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.einsum(layer.equation, x, kernel)

    return update_alone(product, inputs, leaf, options)


def _embedding(layer: Layer, inputs: jax.Array, leaf: LoHaWeight, options: Options) -> jax.Array:
    rows = inputs.astype("int32")

    def product(_: jax.Array, table: jax.Array) -> jax.Array:
        return jnp.take(table, rows, axis=0)

    return update_alone(product, jnp.zeros((), layer.compute_dtype), leaf, options)


_Update = Callable[[Layer, jax.Array, LoHaWeight, Options], jax.Array]
_PRODUCTS: dict[type, _Update] = {
    layers.Dense: _dense,
    layers.EinsumDense: _einsum,
    layers.Embedding: _embedding,
}
