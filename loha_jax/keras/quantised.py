"""The kernel of a layer that Keras has quantised, as a quantised array of a tree.

int8:  W = values / scale            one scale per output (Embedding: per row)
int4:  W = values / scale            the same, two values per byte
       W = (values - zero) · scale   with `block_size`: one scale and zero per block
"""

# Keras has no type information.
# pyright: reportMissingImports=false, reportUnknownVariableType=false
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import keras
from keras import layers

from loha_jax.keras._keras_internals import Layer, Variable, own_value
from loha_jax.keras.layer_kinds import kernel_of
from loha_jax.tree.quantised_types import register_quantised, rounded

MODES = ("int8", "int4")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class KerasQuantised:
    """A quantised kernel of a Keras layer.

    Attributes:
        values: the integers, in the kernel's shape, or in the two axes of `scale` if it has blocks.
        scale: as the layer holds it, with axes of length 1 where it has none.
        zero: the zeros of blocks, or None.
        blocks: the block of each position along the blocks' axis, or None.
        axis: the blocks' axis.
        shape: of the kernel.
    """

    values: Any
    scale: Any
    zero: Any = None
    blocks: Any = None
    axis: int = dataclasses.field(default=0, metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})


def quantised_kernel(layer: Layer) -> KerasQuantised:
    """Return the kernel of a layer that is quantised to int8 or int4."""
    is_table = isinstance(layer, layers.Embedding)
    stored = own_value(kernel_of(layer))
    scale = own_value(layer.embeddings_scale if is_table else layer.kernel_scale)
    if layer.quantization_mode == "int8":
        return KerasQuantised(stored, _with_axes(layer, scale), shape=stored.shape)
    if isinstance(layer, layers.EinsumDense):
        columns, shape = layer._int4_unpacked_column_size, tuple(layer.original_kernel_shape)
    else:
        columns, shape = layer._orig_output_dim, (stored.shape[0], layer._orig_output_dim)
    unpacked = keras.quantizers.unpack_int4(stored, columns, axis=-1)
    values = jnp.asarray(unpacked, jnp.int4)
    if getattr(layer, "_int4_block_size", None) in (None, -1):
        return KerasQuantised(values, jnp.expand_dims(scale, 1 if is_table else 0), shape=shape)
    zero = own_value(layer.embeddings_zero if is_table else layer.kernel_zero)
    blocks = own_value(layer.g_idx).astype(jnp.int32)
    return KerasQuantised(values, scale, zero, blocks, int(is_table), shape)


def _with_axes(layer: Layer, scale: jax.Array) -> Any:
    """Return the scale of an int8 kernel with the kernel's axes."""
    if isinstance(layer, layers.Embedding):
        return scale[:, None]
    if isinstance(layer, layers.EinsumDense):
        return layer._adjust_scale_for_dequant(scale)
    return scale[None]


def set_kernel(layer: Layer, kernel: KerasQuantised) -> None:
    """Put another kernel into an int8 layer."""
    variable: Variable = kernel_of(layer)
    variable.assign(kernel.values)
    if isinstance(layer, layers.Embedding):
        layer.embeddings_scale.assign(kernel.scale[:, 0])
    elif isinstance(layer, layers.EinsumDense):
        layer.kernel_scale.assign(layer._adjust_scale_for_quant(kernel.scale, "kernel"))
    else:
        layer.kernel_scale.assign(kernel.scale[0])


def _dequantise(kernel: KerasQuantised) -> jax.Array:
    values, scale = kernel.values.astype(jnp.float32), kernel.scale.astype(jnp.float32)
    if kernel.blocks is None:
        return (values / scale.reshape(_broadcast(values, scale))).reshape(kernel.shape)
    scale, zero = (jnp.take(x, kernel.blocks, axis=kernel.axis) for x in (scale, kernel.zero))
    return ((values - zero.astype(jnp.float32)) * scale).reshape(kernel.shape)


def _broadcast(values: jax.Array, scale: jax.Array) -> tuple[int, ...]:
    return scale.shape if scale.ndim == values.ndim else (1,) * (values.ndim - 1) + (-1,)


def _requantise(kernel: jax.Array, old: KerasQuantised) -> KerasQuantised:
    if old.values.dtype != jnp.int8:
        raise ValueError(
            "A merged kernel is not quantised to Keras' int4 again: merge before quantising, or "
            "quantise to int8"
        )
    step = 1 / old.scale.astype(jnp.float32)
    values, new = rounded(kernel, step, jnp.int8)
    scale = jnp.where(new == step, old.scale, (1 / new).astype(old.scale.dtype))
    return dataclasses.replace(old, values=values, scale=scale)


register_quantised(KerasQuantised, _dequantise, _requantise)
