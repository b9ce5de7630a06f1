"""Flax NNX layers under `loha_jax.nnx.inject`, beside the same layers with W + ΔW by numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nnx_reference import (
    ALPHA,
    F64,
    R,
    at,
    conv,
    dense,
    factors,
    fused,
    ndh,
    table,
    targets,
    transposed_conv,
    with_sums,
)
from random_arrays import normal_array

import loha_jax
from loha_jax import LoHaConfig
from loha_jax.nnx import LoHaConv, LoHaEinsum, LoHaEmbed, LoHaLinear, LoHaLinearGeneral, inject


class Holder(nnx.Module):
    def __init__(self, layer):
        self.l = layer

    def __call__(self, x):
        return self.l(x)


class TableTwice(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 4, rngs=rngs, **F64)
        self.up = nnx.Linear(4, 4, rngs=rngs, **F64)

    def __call__(self, ids):
        return self.embed.attend(jnp.tanh(self.up(self.embed(ids))))


class Einsum(nnx.Module):
    """As in tunix and bonsai."""

    def __init__(self, einsum_str, shape, rngs):
        self.einsum_str = einsum_str
        self.shape = shape
        self.w = nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float64))

    def __call__(self, x):
        return jnp.einsum(self.einsum_str, x, self.w.get_value())


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.attn = nnx.MultiHeadAttention(2, 4, 6, decode=False, rngs=rngs, **F64)

    def __call__(self, x):
        return self.attn(x)


def rnn(cell):
    return lambda rngs: nnx.RNN(cell(4, 5, rngs=rngs, **F64))


ATTENTION = {f"attn/{n}/kernel": dense for n in ("query", "key", "value", "out")}
GATES = ["ii", "if_", "ig", "io", "hi", "hf", "hg", "ho"]
X, IMAGE = (2, 5, 4), (2, 6, 5, 4)

# name: the layer, its input or the shape of it, what it targets, and how ΔW folds into each kernel
LAYERS = {
    "Linear": (
        lambda rngs: nnx.Sequential(nnx.Linear(4, 6, rngs=rngs, **F64)),
        X,
        {"layers/0/kernel": dense},
    ),
    "LinearGeneral out": (
        lambda rngs: Holder(nnx.LinearGeneral(4, (2, 3), rngs=rngs, **F64)),
        X,
        {"l/kernel": dense},
    ),
    "LinearGeneral in": (
        lambda rngs: Holder(nnx.LinearGeneral((5, 4), 3, axis=(-2, -1), rngs=rngs, **F64)),
        X,
        {"l/kernel": dense},
    ),
    "LinearGeneral batch": (
        lambda rngs: Holder(nnx.LinearGeneral(4, (2, 3), batch_axis={0: 2}, rngs=rngs, **F64)),
        X,
        {"l/kernel": dense},
    ),
    "MultiHeadAttention": (Attention, X, ATTENTION),
    "Conv 1-D": (
        lambda rngs: Holder(nnx.Conv(4, 6, (3,), strides=2, rngs=rngs, **F64)),
        X,
        {"l/kernel": conv},
    ),
    "Conv circular": (
        lambda rngs: Holder(nnx.Conv(4, 6, (3,), padding="CIRCULAR", rngs=rngs, **F64)),
        X,
        {"l/kernel": conv},
    ),
    "Conv 2-D": (
        lambda rngs: Holder(nnx.Conv(4, 6, (3, 2), rngs=rngs, **F64)),
        IMAGE,
        {"l/kernel": conv},
    ),
    "Conv grouped": (
        lambda rngs: Holder(nnx.Conv(4, 6, (3, 3), feature_group_count=2, rngs=rngs, **F64)),
        IMAGE,
        {"l/kernel": conv},
    ),
    "Conv depthwise": (
        lambda rngs: Holder(nnx.Conv(4, 8, (3, 3), feature_group_count=4, rngs=rngs, **F64)),
        IMAGE,
        {"l/kernel": conv},
    ),
    "ConvTranspose": (
        lambda rngs: Holder(nnx.ConvTranspose(4, 6, (3, 2), strides=(2, 2), rngs=rngs, **F64)),
        IMAGE,
        {"l/kernel": conv},
    ),
    "ConvTranspose, transposed kernel": (
        lambda rngs: Holder(
            nnx.ConvTranspose(4, 6, (3, 2), transpose_kernel=True, rngs=rngs, **F64)
        ),
        IMAGE,
        {"l/kernel": transposed_conv},
    ),
    "Einsum": (
        lambda rngs: Holder(nnx.Einsum("btd,ndh->btnh", (2, 4, 3), (2, 3), rngs=rngs, **F64)),
        X,
        {"l/kernel": ndh},
    ),
    "Embed and attend": (
        TableTwice,
        np.arange(10).reshape(2, 5),
        {"embed/embedding": table, "up/kernel": dense},
    ),
    "own Einsum": (lambda rngs: Holder(Einsum("BTD,NDH->BTNH", (2, 4, 3), rngs)), X, {"l/w": ndh}),
    "own fused Einsum": (
        lambda rngs: Holder(Einsum("BSD,CKDH->CBSKH", (2, 3, 4, 2), rngs)),
        X,
        {"l/w": fused},
    ),
    "LSTM": (rnn(nnx.LSTMCell), X, {f"cell/{gate}/kernel": dense for gate in GATES}),
    "OptimizedLSTM": (
        rnn(nnx.OptimizedLSTMCell),
        X,
        {"cell/dense_i/kernel": dense, "cell/dense_h/kernel": dense},
    ),
    "GRU": (rnn(nnx.GRUCell), X, {"cell/dense_i/kernel": dense, "cell/dense_h/kernel": dense}),
    "SimpleCell": (
        rnn(nnx.SimpleCell),
        X,
        {"cell/dense_i/kernel": dense, "cell/dense_h/kernel": dense},
    ),
}


def made(build, seed=0):
    return build(nnx.Rngs(seed))


def input_of(shape_or_array):
    if isinstance(shape_or_array, np.ndarray):
        return jnp.asarray(shape_or_array)
    return normal_array(3, shape_or_array, jnp.float64)


RECURRENT = ("LSTM", "OptimizedLSTM", "GRU", "SimpleCell")
CASES = [
    pytest.param(n, False, marks=[pytest.mark.slow] if n in RECURRENT else []) for n in LAYERS
] + [(name, True) for name in LAYERS if "Conv" in name]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "cores"), CASES, ids=lambda v: {True: "cores", False: ""}.get(v, v)
)
def test_a_layer_computes_with_its_adapted_kernel_and_factored(name, cores):
    build, shape, folds = LAYERS[name]
    config = LoHaConfig(
        r=R,
        alpha=ALPHA,
        init_weights=False,
        target_modules=targets(folds),
        use_effective_conv2d=cores,
    )
    model, x = made(build), input_of(shape)
    before = model(x)
    inject(model, config, rngs=nnx.Rngs(1))
    assert ("hada_t1" in factors(model, next(iter(folds)))) is cores
    reference = with_sums(made(build), model, folds)
    out = model(x)
    np.testing.assert_allclose(out, reference(x), rtol=0, atol=1e-10)
    assert jnp.abs(out - before).max() > 1e-3
    read = loha_jax.adapt(lambda m, path: at(m, path)[...])
    for path in folds:
        weight = at(reference, path)[...]
        np.testing.assert_allclose(read(model, path), weight, rtol=0, atol=1e-12)
    explained = loha_jax.explain(lambda m, x: m(x), model, x)
    assert explained.dense == ()
    assert explained.unused == ()
    assert len(explained.uses) >= len(folds)


@pytest.mark.parametrize(
    ("layer", "args"),
    [
        (LoHaLinear, (4, 8)),
        (LoHaLinearGeneral, (4, (2, 3))),
        (LoHaConv, (4, 8, (3, 3))),
        (LoHaEinsum, ("btd,ndh->btnh", (2, 4, 3))),
        (LoHaEmbed, (11, 4)),
    ],
)
def test_a_layer_that_creates_its_kernel_cannot_start_from_its_singular_vectors(layer, args):
    message = rf"{layer.__name__}: init_weights='abba' .*loha_jax\.nnx\.inject"
    with pytest.raises(ValueError, match=message):
        layer(*args, r=2, init_weights="abba", rngs=nnx.Rngs(0))
