"""Models of Equinox, Haiku and Keras, and PyTorch twins of them."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Mapping
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import keras_hub
import numpy as np
import torch
import transformers as hf
from flax.traverse_util import flatten_dict, unflatten_dict

import loha_jax
from tests.models.twins import VOCABULARY, Size, Twins, seeded

CHANNELS = 8


class TorchNet(torch.nn.Module):
    """A grouped convolution, attention and an MLP, with the names of Equinox' modules."""

    def __init__(self, width: int, heads: int, layers: int):
        super().__init__()
        self.conv = torch.nn.Conv2d(CHANNELS, width, 3, stride=2, padding=1, groups=2)
        self.attention = torch.nn.ModuleDict(
            {
                name: torch.nn.Linear(width, width, bias=False)
                for name in ("query_proj", "key_proj", "value_proj")
            }
        )
        self.attention["output_proj"] = torch.nn.Linear(width, width, bias=False)
        sizes = [width, *[2 * width] * layers, 3]
        self.mlp = torch.nn.ModuleDict(
            {
                "layers": torch.nn.ModuleList(
                    torch.nn.Linear(*pair) for pair in itertools.pairwise(sizes)
                )
            }
        )
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).flatten(2).mT
        split = (len(x), x.shape[1], self.heads, -1)
        parts = [
            self.attention[f"{name}_proj"](x).reshape(split).transpose(1, 2)
            for name in ("query", "key", "value")
        ]
        y = torch.nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
        x = (x + self.attention["output_proj"](y)).mean(1)
        *hidden, last = self.mlp["layers"]
        for layer in hidden:
            x = torch.relu(layer(x))
        return last(x)


class EquinoxNet(eqx.Module):
    """Equinox' own layers; a model is a tree, and arrays keep torch's axes (`oi`, `oikk`)."""

    conv: eqx.nn.Conv2d
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, width: int, heads: int, layers: int):
        key = jax.random.key(0)
        self.conv = eqx.nn.Conv2d(CHANNELS, width, 3, stride=2, padding=1, groups=2, key=key)
        self.attention = eqx.nn.MultiheadAttention(heads, width, key=key)
        self.mlp = eqx.nn.MLP(width, 3, 2 * width, layers, key=key)

    def __call__(self, x: Any) -> Any:
        x = self.conv(x)
        x = x.reshape(len(x), -1).T
        return self.mlp((x + self.attention(x, x, x)).mean(0))


def equinox(size: Size) -> Twins:
    sizes = (size.width, size.heads, size.layers)
    module = seeded(lambda: TorchNet(*sizes), size)
    weights = {k: v.numpy() for k, v in module.state_dict().items()}
    arrays, static = eqx.partition(EquinoxNet(*sizes), eqx.is_array)

    def value(path: Any, leaf: Any) -> Any:
        name = ".".join(str(getattr(key, "name", getattr(key, "idx", None))) for key in path)
        return jnp.asarray(weights[name].reshape(leaf.shape))  # a convolution's bias is [out, 1, 1]

    params = jax.tree_util.tree_map_with_path(value, arrays)

    def fn(params: Any, inputs: Mapping[str, Any]) -> Any:
        return jax.vmap(eqx.combine(params, static))(inputs["x"])

    inputs = {"x": size.normal(2, CHANNELS, 8, 8)}
    layouts = loha_jax.infer_layouts(
        fn, params, inputs
    )  # Equinox' weights are [out, in], not Flax's [in, out]
    return Twins(
        module, lambda module, tensors: module(**tensors), fn, params, inputs, layouts=layouts
    )


class TorchStack(torch.nn.Module):
    """The twin of `haiku`."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.conv = torch.nn.Conv2d(CHANNELS, width, 3)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(layers))
        self.head = torch.nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv(x)).mean((2, 3))
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x)


def haiku(size: Size) -> Twins:
    """A Haiku model whose layers are stacked by `layer_stack`.

    One kernel `sio` for all of them, one adapter each.
    """

    def forward(x: Any) -> Any:
        x = hk.Conv2D(size.width, 3, padding="VALID", data_format="NCHW", name="conv")(x)
        x = jax.nn.relu(x).mean((2, 3))
        x = hk.experimental.layer_stack(size.layers, name="layers")(
            lambda x: x + jnp.tanh(hk.Linear(size.width, name="linear")(x))
        )(x)
        return hk.Linear(3, name="head")(x)

    model = hk.without_apply_rng(hk.transform(forward))
    module = seeded(lambda: TorchStack(size.width, size.layers), size)
    inputs = {"x": size.normal(2, CHANNELS, 6, 6)}
    weights = {k: v.numpy() for k, v in module.state_dict().items()}
    stacked = {
        part: np.stack([weights[f"layers.{n}.{part}"].T for n in range(size.layers)])
        for part in ("weight", "bias")
    }
    (stack,) = (
        n for n in jax.eval_shape(model.init, jax.random.key(0), inputs["x"]) if "layers" in n
    )
    params = {
        # Haiku keeps the bias of a convolution over channels-first images as [out, 1, 1].
        "conv": {
            "w": weights["conv.weight"].transpose(2, 3, 1, 0),
            "b": weights["conv.bias"][:, None, None],
        },
        stack: {"w": stacked["weight"], "b": stacked["bias"]},
        "head": {"w": weights["head.weight"].T, "b": weights["head.bias"]},
    }

    def fn(params: Any, inputs: Mapping[str, Any]) -> Any:
        return model.apply(params, inputs["x"])

    params = jax.tree.map(jnp.asarray, params)
    return Twins(
        module,
        lambda module, tensors: module(**tensors),
        fn,
        params,
        inputs,
        names={r"(.*\.)?layers\..*": "layers.{}"},
        layouts=loha_jax.infer_layouts(fn, params, inputs),
    )


_KERAS_BERT = {
    r"transformer_layer_(\d+)\.self_attention_layer\.(query|key|value)": (
        r"encoder.layer.\1.attention.self."
        r"\2"
    ),
    r"transformer_layer_(\d+)\.self_attention_layer\.attention_output": (
        r"encoder.layer.\1.attention.output."
        r"dense"
    ),
    r"transformer_layer_(\d+)\.feedforward_intermediate_dense": (
        r"encoder.layer.\1.intermediate."
        r"dense"
    ),
    r"transformer_layer_(\d+)\.feedforward_output_dense": r"encoder.layer.\1.output.dense",
    "pooled_dense": "pooler.dense",
}


def keras_bert(size: Size) -> Twins:
    """keras-hub's BERT, which reads the checkpoint of the PyTorch one.

    Its attention's kernels have three axes.

    It computes every gelu by tanh, whatever the checkpoint's config says: the PyTorch model is told
    to.
    """
    config = hf.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=2 * size.width,
        max_position_embeddings=40,
        hidden_act="gelu_pytorch_tanh",
    )
    module = seeded(lambda: hf.BertModel(config), size)
    with tempfile.TemporaryDirectory() as folder:
        module.save_pretrained(folder)
        backbone = keras_hub.models.BertBackbone.from_preset(folder)
    paths = [tuple(variable.path.split("/")) for variable in backbone.trainable_variables]
    params = unflatten_dict(
        dict(zip(paths, (v.value for v in backbone.trainable_variables), strict=True))
    )
    others = [variable.value for variable in backbone.non_trainable_variables]

    def fn(params: Any, inputs: Mapping[str, Any]) -> Any:
        flat = flatten_dict(params)
        outputs, _ = backbone.stateless_call([flat[path] for path in paths], others, inputs)
        return outputs["sequence_output"] + outputs["pooled_output"][:, None]

    ids = size.ids()
    inputs = {
        "token_ids": ids,
        "segment_ids": np.zeros_like(ids),
        "padding_mask": np.ones_like(ids),
    }

    def output(module: Any, tensors: Mapping[str, Any]) -> Any:
        found = module(tensors["token_ids"], tensors["padding_mask"], tensors["segment_ids"])
        return found.last_hidden_state + found.pooler_output[:, None]

    return Twins(
        module,
        output,
        fn,
        params,
        inputs,
        names=_KERAS_BERT,
        layouts=loha_jax.infer_layouts(fn, params, inputs),
    )
