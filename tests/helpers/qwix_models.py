"""Tiny models, bases and references for the tests of `loha_jax.qwix`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import nnx
from random_arrays import normal_array

from loha_jax.qwix import LoHaProvider

BASES = {
    "float": {},
    "int8": {"weight_qtype": "int8"},
    "int4": {"weight_qtype": "int4"},
    "nf4": {"weight_qtype": "nf4", "tile_size": 8},
    "fp8": {"weight_qtype": "float8_e4m3fn"},
    "int8 activations": {"weight_qtype": "int8", "act_qtype": "int8"},
}
"""Fields of a rule, by the kind of base."""


class Attention(nnx.Module):
    """Products with several output axes, with several input axes, and a plain one."""

    def __init__(self, rngs):
        self.query = nnx.LinearGeneral(16, (2, 8), rngs=rngs)
        self.out = nnx.Einsum("btnh,nhd->btd", (2, 8, 16), rngs=rngs)
        self.mlp = nnx.Linear(16, 24, rngs=rngs)

    def __call__(self, x):
        return self.mlp(jax.nn.gelu(self.out(self.query(x))))


class Images(nnx.Module):
    """A grouped convolution and a plain one."""

    def __init__(self, rngs):
        self.grouped = nnx.Conv(8, 16, (3, 3), feature_group_count=2, strides=2, rngs=rngs)
        self.plain = nnx.Conv(16, 6, (3, 3), padding="VALID", rngs=rngs)

    def __call__(self, x):
        return self.plain(jax.nn.gelu(self.grouped(x)))


class Layer(nn.Module):
    """A body of a scan."""

    @nn.compact
    def __call__(self, x, _):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        return nn.gelu(nn.Dense(16, name="dense", kernel_init=init)(x)), None


class Stack(nnx.Module):
    """Layers of one width, run by a scan."""

    def __init__(self, layers, width, rngs):
        @nnx.split_rngs(splits=layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return nnx.Linear(width, width, use_bias=False, rngs=rngs)

        self.layers = make(rngs)

    def __call__(self, x):
        axes = nnx.StateAxes({nnx.RngState: nnx.Carry, ...: 0})

        @nnx.scan(in_axes=(nnx.Carry, axes), out_axes=nnx.Carry)
        def run(x, layer):
            return jnp.tanh(layer(x))

        return run(x, self.layers)


class LinenModel(nn.Module):
    """Linen's dot_generals, and a stack scanned over an axis."""

    axis: int = 0

    @nn.compact
    def __call__(self, x):
        x = nn.DenseGeneral((2, 8), name="query")(x)
        x = nn.DenseGeneral(16, axis=(-2, -1), name="out")(x)
        stack = nn.scan(
            Layer,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=3,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return stack(name="layers")(x, None)[0]


def tokens(dtype=jnp.float32):
    return normal_array(0, (3, 5, 16), dtype)


def images():
    return normal_array(0, (2, 9, 8, 8))


def adapted(model, x, *, trained=True, **fields):
    """The model with adapters everywhere; with random factors if `trained`."""
    rule = {"module_path": ".*", "rank": 2, "alpha": 4.0, **fields}
    model = qwix.apply_lora_to_model(model, LoHaProvider(**rule), x, rngs=nnx.Rngs(1))
    if trained:
        randomise(model)
    return model


def randomise(model):
    """Give all factors random values, as training would."""
    for n, (_, variable) in enumerate(nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))):
        draw = normal_array(n, variable.get_value().shape)
        variable.set_value(draw.astype(variable.get_value().dtype) * 0.5)


def quantised(model, x, **fields):
    """The model as qwix quantises it, without adapters."""
    if not fields:
        return model
    rule = qwix.QuantizationRule(module_path=".*", **fields)
    return qwix.quantize_model(model, qwix.PtqProvider([rule]), x)


def arrays(model, kind):
    """Copies of a model's arrays, by path."""
    flat = nnx.to_flat_state(nnx.state(model, kind))
    return {path: np.array(variable.get_value()) for path, variable in flat}
