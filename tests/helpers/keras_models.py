"""Keras models, their twins in torch, and ΔW by the formula."""

import unittest.mock

import jax
import keras
import numpy as np
import torch
from keras import layers

import loha_jax
from loha_jax.keras import inject

KEY = jax.random.key(0)
TARGETS = ["conv", "up", "head"]


def images(n=6):
    """Images, channels last."""
    return np.random.default_rng(0).normal(size=(n, 5, 5, 3)).astype("float32")


@keras.saving.register_keras_serializable("tests")
class Block(layers.Layer):
    """Two layers inside a layer of one's own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.up, self.down = layers.Dense(8, "relu", name="up"), layers.Dense(6, name="down")

    def build(self, shape):
        self.up.build(shape)
        self.down.build((*shape[:-1], 8))

    def call(self, x):
        return x + self.down(self.up(x))


class Net(keras.Model):
    """A convolution, a normalisation, a block and a head."""

    def __init__(self):
        super().__init__(name="net")
        self.conv = layers.Conv2D(6, 3, padding="same", activation="relu", name="conv")
        self.norm = layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name="norm")
        self.block = Block(name="block")
        self.head = layers.Dense(2, name="head")

    def call(self, x, training=None):
        x = self.norm(self.conv(x), training=training)
        return self.head(self.block(x.mean((1, 2))))


class Twin(torch.nn.Module):
    """`Net` in torch."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 6, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(6)
        up, down = torch.nn.Linear(6, 8), torch.nn.Linear(8, 6)
        self.block = torch.nn.ModuleDict({"up": up, "down": down})
        self.head = torch.nn.Linear(6, 2)

    def forward(self, x):
        x = self.norm(torch.relu(self.conv(x.permute(0, 3, 1, 2)))).mean((2, 3))
        return self.head(x + self.block["down"](torch.relu(self.block["up"](x))))


def net():
    """A built `Net` with equal weights at each call."""
    keras.utils.set_random_seed(0)
    model = Net()
    model(images())
    return model


def twin(model):
    """Make the torch twin of a `Net` without adapters, quantised or not."""
    weights = {
        path.replace("/", "."): np.asarray(value)
        for path, value in loha_jax.dequantise(loha_tree(model)).items()
    }
    others = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    state = {}
    for name, value in weights.items():
        module, last = name.rsplit(".", 1)
        if last == "kernel":
            value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
        state[f"{module}.{others.get(last, last)}"] = torch.from_numpy(np.array(value))
    result = Twin()
    state["norm.num_batches_tracked"] = torch.tensor(0)
    result.load_state_dict(state)
    return result.eval()


def quantise(model, mode, layers, **settings):
    """Quantise the weights of some layers alone: activations stay float, as in a twin."""
    kind = {"int8": "Int8", "int4": "Int4"}[mode]
    config = getattr(keras.quantizers, f"{kind}QuantizationConfig")
    with unittest.mock.patch("gc.collect"):  # Keras collects for each variable that it deletes
        for layer in layers:
            layer.quantize(config=config(activation_quantizer=None, **settings))
    return model


def loha_tree(model):
    """Return the tree that the library's functions see."""
    from loha_jax.tree.containers import tree_of

    return tree_of(model)


def adapted(model=None, **settings):
    """Inject random factors, that change the result, into a model."""
    settings = {"r": 2, "alpha": 12, "target_modules": TARGETS, "init_weights": False, **settings}
    return inject(net() if model is None else model, loha_jax.LoHaConfig(**settings), key=KEY)


def values(variables):
    """Copies of the values of variables, by path."""
    return {v.path: np.array(v.value, copy=True) for v in variables}


def output(model, x):
    """Return a model's result in inference, in float64."""
    return np.asarray(model(x, training=False)).astype(np.float64)


def update(layer):
    """Return ΔW of a layer's adapter "default" from its variables: `[out, in · positions]`."""
    f = [
        np.asarray(v.value).astype(np.float64)
        for v in layer.trainable_variables
        if v.name.split("_lora_")[-1] in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    ]
    return 6 * (f[0] @ f[1]) * (f[2] @ f[3])  # alpha/r = 12/2
