"""Each kind of layer computes with W + ΔW, by the formula in float64."""

import jax
import keras
import numpy as np
import pytest
from keras import layers
from keras_models import adapted, loha_tree, output, quantise, update

import loha_jax

RNG = np.random.default_rng(0)
TOKENS = RNG.normal(size=(2, 5, 4)).astype("float32")
IMAGES = RNG.normal(size=(2, 5, 5, 4)).astype("float32")
IDS = RNG.integers(0, 7, (2, 5))


def spatial(delta, shape):
    """ΔW `[out, in · positions]` as a kernel `[*positions, in, out]`."""
    return np.moveaxis(delta.reshape(shape[-1], shape[-2], *shape[:-2]), (0, 1), (-1, -2))


def linear(delta, shape):
    """ΔW `[out, in]` as a kernel, whose input axes come first."""
    return delta.T.reshape(shape)


KINDS = {
    "dense": (layers.Dense, (6, "gelu"), {}, TOKENS, linear),
    "heads": (
        layers.EinsumDense,
        ("abc,cde->abde", (None, 2, 3), "tanh", "de"),
        {},
        TOKENS,
        linear,
    ),
    "sum": (layers.EinsumDense, ("abc,bcd->ad", 3, "tanh", "d"), {}, TOKENS, linear),
    "ellipsis": (layers.EinsumDense, ("...x,xy->...y", 3), {}, TOKENS, linear),
    "conv1d": (layers.Conv1D, (6, 3), {"padding": "causal"}, TOKENS, spatial),
    "conv2d": (layers.Conv2D, (6, 3, 2, "same"), {"activation": "relu"}, IMAGES, spatial),
    "groups": (layers.Conv2D, (6, 3), {"groups": 2}, IMAGES, spatial),
    "conv3d": (layers.Conv3D, (3, 2), {}, IMAGES[..., None], spatial),
    "embedding": (layers.Embedding, (7, 4), {}, IDS, lambda delta, shape: delta),
}


def model_of(kind, dtype="float32"):
    """A built model of one layer, and the layer."""
    cls, arguments, more, x, _ = KINDS[kind]
    keras.utils.set_random_seed(0)
    model = keras.Sequential([cls(*arguments, **more, dtype=dtype, name="it")])
    model(x)
    if getattr(model.layers[0], "bias", None) is not None:
        bias = model.layers[0].bias
        bias.assign(bias.value + 0.1 * np.arange(1, 1 + bias.shape[-1]))
    return model, model.layers[0]


HALF = [(kind, "mixed_bfloat16") for kind in ("heads", "conv2d", "embedding")]


@pytest.mark.parametrize(("kind", "dtype"), [*((kind, "float32") for kind in KINDS), *HALF])
def test_a_layer_computes_with_the_updated_kernel(kind, dtype):
    x, fold = KINDS[kind][3:]
    model, layer = model_of(kind, dtype)
    before = output(model, x)
    adapted(model, target_modules=["it"])
    result = output(model, x)
    state = [[v.value for v in model.trainable_variables]]
    state.append([v.value for v in model.non_trainable_variables])
    stateless = jax.jit(lambda *state: model.stateless_call(*state, x)[0])(*state)
    plain, own = model_of(kind, dtype)
    kernel = own.weights[0]
    kernel.assign(np.asarray(kernel.value) + fold(update(layer), kernel.shape))
    tolerance = 1e-6 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(result, output(plain, x), atol=tolerance)
    np.testing.assert_allclose(np.asarray(stateless, np.float64), result, atol=tolerance)
    assert np.abs(result - before).max() > 0.05
    assert {v.dtype for v in model.trainable_variables} == {"float32"}
    assert model(x).dtype == ("float32" if dtype == "float32" else "bfloat16")


QUANTISED = [
    ("dense", "int8", {}),
    ("heads", "int8", {}),
    ("embedding", "int8", {}),
    ("dense", "int4", {"block_size": 2}),
    ("dense", "int4", {"block_size": -1}),
    ("sum", "int4", {"block_size": 2}),
    ("embedding", "int4", {"block_size": 2}),
]


@pytest.mark.parametrize(("kind", "mode", "settings"), QUANTISED)
def test_a_quantised_layer_adds_the_update_before_bias_and_activation(kind, mode, settings):
    """The base product is Keras' own; the tree's kernel is the one that it computes with."""
    x, fold = KINDS[kind][3:]
    model, layer = model_of(kind)
    activations = mode == "int8" and kind == "dense"
    if activations:
        layer.quantize(mode)
    else:
        quantise(model, mode, [layer], **settings)
    activation, layer.activation = getattr(layer, "activation", None), None
    product = output(model, x)
    layer.activation = activation
    held = {v.path: np.asarray(v.value) for v in model.variables}
    adapted(model, target_modules=["it"])
    shape = {"heads": (4, 2, 3), "sum": (5, 4, 3), "dense": (4, 6), "embedding": (7, 4)}[kind]
    delta = fold(update(layer), shape)
    einsum = {"heads": "abc,cde->abde", "sum": "abc,bcd->ad", "dense": "abc,cd->abd"}
    expected = product + (delta[x] if kind == "embedding" else np.einsum(einsum[kind], x, delta))
    expected = expected if activation is None else np.asarray(activation(expected))
    np.testing.assert_allclose(output(model, x), expected, atol=2e-6)
    assert np.abs(delta).max() > 0.05
    now = {v.path: np.asarray(v.value) for v in model.variables}
    assert all(np.array_equal(now[path], value) for path, value in held.items())
    tree = loha_jax.dequantise(loha_jax.unload(loha_tree(model)))
    kernel = np.asarray(tree["it/embedding" if kind == "embedding" else "it/kernel"])
    bias = 0 if kind == "embedding" else np.asarray(layer.bias.value)
    read = kernel[x] if kind == "embedding" else np.einsum(einsum[kind], x, kernel) + bias
    np.testing.assert_allclose(product, read, atol=0.05 if activations else 2e-6)


def test_several_adapters_are_summed_and_switched_off():
    x = KINDS["dense"][3]
    model, layer = model_of("dense")
    before = output(model, x)
    adapted(model, target_modules=["it"])
    one = output(model, x)
    config = loha_jax.LoHaConfig(r=3, target_modules=["it"], init_weights=False)
    loha_jax.inject(model, config, key=jax.random.key(5), adapter_name="b")
    assert next(v.name for v in model.trainable_variables) == "kernel_lora_b_hada_w1_a"
    assert len(model.trainable_variables) == 4
    loha_jax.set_adapter(model, ["default", "b"])
    factors = [np.asarray(v.value).astype(np.float64) for v in model.trainable_variables[4:]]
    second = 8 / 3 * (factors[0] @ factors[1]) * (factors[2] @ factors[3])
    plain, own = model_of("dense")
    own.kernel.assign(np.asarray(own.kernel.value) + (update(layer) + second).T)
    np.testing.assert_allclose(output(model, x), output(plain, x), atol=1e-6)
    loha_jax.set_adapter(model, ())
    np.testing.assert_array_equal(output(model, x), before)
    assert not model.trainable_variables
    loha_jax.delete_adapter(loha_jax.set_adapter(model, "default"), "b")
    np.testing.assert_array_equal(output(model, x), one)


def test_shared_layers_and_layers_in_layers():
    """A layer that is used twice has one adapter; those of attention are adapted one by one."""
    inputs = keras.Input((5, 4))
    shared = layers.Dense(4, name="shared")
    attention = layers.MultiHeadAttention(2, 3, name="attention")
    inner = keras.Model(inputs, attention(inputs, inputs), name="inner")
    model = keras.Model(inputs, shared(inner(shared(inputs))))
    before = output(model, TOKENS)
    adapted(model, target_modules=["shared", "query", "attention_output"])
    assert len(model.trainable_variables) == 3 * 4
    names = {use.module for use in loha_jax.explain(lambda m, x: m(x), model, TOKENS).uses}
    assert names == {"shared", "attention.query", "attention.attention_output"}
    result = output(model, TOKENS)
    assert np.abs(result - before).max() > 0.1
    loha_jax.merge(model)
    np.testing.assert_allclose(output(model, TOKENS), result, atol=1e-6)


def test_all_linear_takes_dense_and_einsum_dense():
    model = keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            layers.Embedding(7, 4, name="table"),
            layers.Conv1D(4, 2, name="conv"),
            layers.SimpleRNN(4, return_sequences=True, name="rnn"),
            layers.EinsumDense("abc,cd->abd", (None, 4), name="einsum"),
            layers.EinsumDense("abc,cdef->abdef", (None, 2, 3, 5), bias_axes="def", name="wide"),
            layers.Reshape((4, 30)),
            layers.Dense(2, name="dense"),
        ]
    )
    adapted(model, target_modules="all-linear")
    modules = {v.path.split("/")[-2] for v in model.trainable_variables}
    assert modules == {"einsum", "wide", "dense"}


def test_all_linear_takes_the_projections_of_attention_with_their_biases():
    """Those of queries, keys and values have two axes: no kernels."""
    tokens = keras.Input((4, 8))
    attention = layers.MultiHeadAttention(2, 3, name="attention")
    model = keras.Model(tokens, attention(tokens, tokens))
    adapted(model, target_modules="all-linear")
    modules = {v.path.split("/")[-2] for v in model.trainable_variables}
    assert modules == {"query", "key", "value", "attention_output"}
