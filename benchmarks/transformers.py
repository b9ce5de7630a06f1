"""Two whole Transformers: a Llama of 6 layers and width 1024, and the example's MiniLM.

    python -m benchmarks transformers

Both are Hugging Face's own, in Flax and in PyTorch, unchanged. The Llama has random weights and
adapters on all linear layers but its head; MiniLM has its pretrained ones and the adapters of
examples/finetune_minilm.py. Heads are frozen. The input that gradients go back to is the output of
the embeddings: in Flax an array of zeros is added there.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.case import Adapter, Case, NotInstalled, Settings
from benchmarks.jax_methods import JaxModel, cross_entropy

if TYPE_CHECKING:
    from benchmarks.torch_peers import TorchModel

LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LLAMA = {
    "vocab_size": 1024,  # small, so that the head does not weigh
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
}
QUICK_LLAMA = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}

MINILM_TARGETS = ("query", "key", "value", "attention.output.dense")
MINILM_WIDTH = 384
MINILM_CLASSES = 2
MINILM_LAYERS = 6

Batch = dict[str, np.ndarray]


def cases(settings: Settings) -> list[Case]:
    """The Llama and MiniLM."""
    sequences, length = (2, 16) if settings.quick else (4, 512)
    sentences, words = (2, 8) if settings.quick else (16, 32)
    sizes = QUICK_LLAMA if settings.quick else LLAMA
    layers = 1 if settings.quick else MINILM_LAYERS
    llama = functools.partial(_llama_batch, sizes["vocab_size"], sequences, length)
    minilm = functools.partial(_minilm_batch, sentences, words)
    return [
        Case(
            subject="transformers",
            name="llama",
            shape={"tokens": f"{sequences} x {length}", "r": 8, **sizes},
            adapter=Adapter(8, LLAMA_TARGETS),
            jax_model=lambda: _jax_llama(sizes, llama(), settings.dtype),
            torch_model=lambda: _torch_llama(sizes, llama(), settings.dtype),
            process_memory=True,
        ),
        Case(
            subject="transformers",
            name="minilm",
            shape={"tokens": f"{sentences} x {words}", "r": 8},
            adapter=Adapter(8, MINILM_TARGETS),
            jax_model=lambda: _jax_minilm(minilm(), settings.dtype, layers),
            torch_model=lambda: _torch_minilm(minilm(), settings.dtype, layers),
            process_memory=not settings.quick,
        ),
    ]


def _add_to_output(name: str, shift: jax.Array) -> Any:
    """A context in which `shift` is added to the output of the Flax modules of this name."""

    def add(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        output = call(*args, **kwargs)
        return (
            output + shift
            if context.module.name == name and context.method_name == "__call__"
            else output
        )

    return nn.intercept_methods(add)


def _cast(params: Any, dtype: str) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)


def _llama_batch(vocabulary: int, sequences: int, length: int) -> Batch:
    random = np.random.default_rng(0)
    return {
        name: random.integers(0, vocabulary, (sequences, length), np.int32)
        for name in ("ids", "labels")
    }


def _llama_config(sizes: dict[str, int], batch: Batch) -> Any:
    from transformers import LlamaConfig

    # FlaxLlama cuts the sines and cosines of a position, two heads wide, off at this number too.
    positions = max(batch["ids"].shape[1], 2 * sizes["hidden_size"] // sizes["num_attention_heads"])
    return LlamaConfig(**sizes, max_position_embeddings=positions, use_cache=False)  # type: ignore[arg-type]


def _jax_llama(sizes: dict[str, int], batch: Batch, dtype: str) -> JaxModel:
    try:
        from transformers import FlaxLlamaForCausalLM
    except ImportError as error:
        raise NotInstalled("transformers with Flax (the last one is 4.57.6)") from error
    model: Any = FlaxLlamaForCausalLM(
        _llama_config(sizes, batch), dtype=jnp.dtype(dtype), _do_init=False
    )

    def apply(params: Any, shift: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
        with _add_to_output("embed_tokens", shift):
            return model(batch["ids"], params=params).logits

    return JaxModel(
        apply=apply,
        params=_cast(model.init_weights(jax.random.key(0), (1, 1)), dtype),
        x=jnp.zeros((*batch["ids"].shape, sizes["hidden_size"]), dtype),
        batch=jax.tree.map(jnp.asarray, batch),
        loss=cross_entropy,
    )


def _torch_llama(sizes: dict[str, int], batch: Batch, dtype: str) -> TorchModel:
    from benchmarks import torch_models

    return torch_models.llama(_llama_config(sizes, batch), batch, dtype)


def _minilm_batch(sentences: int, words: int) -> Batch:
    random = np.random.default_rng(0)
    shape = (sentences, words)
    return {
        "ids": random.integers(1000, 20000, shape, np.int32),
        "mask": np.ones(shape, np.int32),
        "labels": random.integers(0, MINILM_CLASSES, sentences, np.int32),
    }


def _example() -> Any:
    """examples/minilm.py."""
    folder = str(Path(__file__).parents[1] / "examples")
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        import minilm

        minilm.model_folder()
    except (ImportError, RuntimeError) as error:
        raise NotInstalled(f"what examples/minilm.py needs: {error}") from error
    return minilm


def _jax_minilm(batch: Batch, dtype: str, layers: int) -> JaxModel:
    example = _example()
    model, bert = example.load_minilm(example.model_folder())
    model.config.num_hidden_layers = layers
    model = type(model)(
        model.config, dtype=jnp.dtype(dtype), add_pooling_layer=False, _do_init=False
    )
    stack = bert["encoder"]["layer"]
    kept = {name: stack[name] for name in map(str, range(layers))}
    bert = bert | {"encoder": {"layer": kept}}
    classifier = example.init_classifier(MINILM_WIDTH, MINILM_CLASSES, jax.random.key(0))

    def apply(params: Any, shift: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
        with _add_to_output("embeddings", shift):
            vectors = example.embed(model, params["bert"], batch["ids"], batch["mask"])
        return example.classify(params["classifier"], vectors)

    return JaxModel(
        apply=apply,
        params=_cast({"bert": bert, "classifier": classifier}, dtype),
        x=jnp.zeros((*batch["ids"].shape, MINILM_WIDTH), dtype),
        batch=jax.tree.map(jnp.asarray, batch),
        loss=cross_entropy,
    )


def _torch_minilm(batch: Batch, dtype: str, layers: int) -> TorchModel:
    from benchmarks import torch_models

    folder = _example().model_folder()
    return torch_models.minilm(folder, layers, MINILM_CLASSES, batch, dtype)
