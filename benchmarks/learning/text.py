"""Text: all-MiniLM-L6-v2 learns from 2,000 film sentences whether they praise or blame.

Model, data and split are those of examples/finetune_minilm.py.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from minilm import (
    Encoder,
    classify,
    embed,
    init_classifier,
    load_minilm,
    load_tokenizer,
    model_folder,
)
from movie_sentences import CLASSES, Tokenized, load, split

from benchmarks.learning.methods import Tree
from benchmarks.learning.task import Batch, Task
from loha_jax import LoHaConfig

CONFIG = LoHaConfig(
    r=8, alpha=16, target_modules=["query", "key", "value", "attention.output.dense"]
)
HEAD_RATE = 5e-3
BATCH = 8
SENTENCES = (2000, None, None)  # of training, validation, test; None is all
QUICK = (160, 64, 64)


def task(quick: bool) -> Task:
    """Load the model and the sentences."""
    folder = model_folder()
    counts = QUICK if quick else SENTENCES
    parts = [
        part if count is None else part.take(range(count))
        for part, count in zip(split(load()), counts, strict=True)
    ]
    tokenizer = load_tokenizer(folder)
    train, validation, test = (Tokenized(part, tokenizer) for part in parts)
    model, bert = load_minilm(folder)
    encode = Encoder(model, bert)

    def start(seed: int) -> tuple[Tree, Tree]:
        return bert, init_classifier(encode.features, len(CLASSES), jax.random.key(1000 + seed))

    def loss(bert: Tree, head: Tree, batch: Batch) -> jax.Array:
        ids, mask = jnp.asarray(batch["ids"]), jnp.asarray(batch["mask"])
        logits = classify(head, embed(model, bert, ids, mask))
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()

    def accuracy(data: Tokenized, bert: Tree, head: Tree) -> float:
        found = np.asarray(classify(head, encode(bert, data))).argmax(1)
        return float((found == data.labels).mean())

    return Task(
        config=CONFIG,
        head_rate=HEAD_RATE,
        start=start,
        loss=loss,
        batches=lambda seed: train.epoch(BATCH, np.random.default_rng(seed)),
        scores={
            "validation": functools.partial(accuracy, validation),
            "test": functools.partial(accuracy, test),
        },
    )
