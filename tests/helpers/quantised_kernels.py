"""Quantised kernels of several libraries and schemes, as trees of them stand in for float ones."""

import jax
import jax.numpy as jnp
import pytest

import loha_jax

KEY = jax.random.key(0)
QWIX = ("int8", "int4", "nf4", "float8", "uint4_zero_point")
SCHEMES = (*QWIX, "scaled_int8", "scaled_float8", "aqt")


def quantised(kernel, scheme, stacked=False):
    """A float kernel `[(stack,) in, ..., out]`, quantised per channel, or in tiles of 4 inputs."""
    stack = [0] if stacked else []
    axis, last = len(stack), kernel.ndim - 1
    if scheme.startswith("scaled"):
        dtype = jnp.int8 if scheme == "scaled_int8" else jnp.float8_e4m3fn
        largest = 127.0 if dtype == jnp.int8 else 448.0
        scale = jnp.abs(kernel).max(axis, keepdims=True) / largest
        values = kernel / scale
        values = jnp.round(values) if dtype == jnp.int8 else values
        return loha_jax.ScaledArray(values.astype(dtype), scale)
    if scheme == "aqt":
        return _aqt(kernel, axis)
    qwix = pytest.importorskip("qwix")
    options = {
        "int8": (jnp.int8, {"channelwise_axes": [*stack, last]}),
        "int4": (jnp.int4, {"channelwise_axes": [*stack, last], "tiled_axes": {axis: 4}}),
        "nf4": ("nf4", {"channelwise_axes": stack, "tiled_axes": {axis: 4}}),
        "float8": (jnp.float8_e4m3fn, {"channelwise_axes": [*stack, last]}),
        "uint4_zero_point": (
            jnp.int4,
            {"channelwise_axes": [*stack, last], "calibration_method": "minmax"},
        ),
    }
    dtype, how = options[scheme]
    return qwix.quantize(kernel, dtype, **how)


def _aqt(kernel, axis):
    """An AQT tensor, made as its documentation says `dequant` reads it."""
    aqt_tensor = pytest.importorskip("aqt.jax.v2.aqt_tensor")
    scale = jnp.abs(kernel).max(axis, keepdims=True) / 127
    return aqt_tensor.QTensor(
        qvalue=jnp.round(kernel / scale).astype(jnp.int8),
        scale=[scale],
        scale_t=None,
        bias=[],
        dequant_dtype=kernel.dtype,
    )


def float_and_quantised(params, config, layouts=None, **options):
    """A tree of quantised kernels, adapted, and the same with dequantised kernels."""
    return tuple(
        loha_jax.inject(tree, config, key=KEY, layouts=layouts, **options)
        for tree in (loha_jax.dequantise(params), params)
    )
