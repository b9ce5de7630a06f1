"""Image: a convolutional net that knows the digits 0 to 4 learns to call 5 to 9 so.

The net is that of examples/digits_convnet.py. Its classifier stays as it is: only the convolutions
learn, for a new classifier on the frozen ones is as good here as any adapter. All seeds have the
same 200 validation and 400 test pictures. A seed draws the net, which is trained on 0 to 4, and 100
of the other 296 pictures.
"""

from __future__ import annotations

import functools

import jax
import numpy as np
import optax
from digits_convnet import ConvNet
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from benchmarks.learning.methods import Tree
from benchmarks.learning.task import Batch, Task
from benchmarks.learning.training import ADAM
from loha_jax import LoHaConfig

CONFIG = LoHaConfig(r=2, alpha=4, target_modules=r"Conv_\d")
BASE_RATE = 3e-3
TRAIN, VALIDATION, TEST = 100, 200, 400
BATCH = 32
STEPS = 300
QUICK_STEPS = 20

Pictures = tuple[np.ndarray, np.ndarray]
"""Pictures, [n, 8, 8, 1] from 0 to 1, and their labels from 0 to 4."""


def task(quick: bool) -> Task:
    """Load the pictures."""
    low, pool, validation, test = load_pictures()
    steps = QUICK_STEPS if quick else STEPS

    @functools.cache
    def start(seed: int) -> tuple[Tree, Tree]:
        return pretrained(low, seed, 2 * steps), {}

    def batches(seed: int) -> list[Batch]:
        few, _ = cut(pool, TRAIN, seed)
        return draws(few, steps, seed)

    return Task(
        config=CONFIG,
        head_rate=0.0,
        start=start,
        loss=loss,
        batches=batches,
        scores={
            "validation": functools.partial(accuracy, validation),
            "test": functools.partial(accuracy, test),
        },
    )


def load_pictures() -> tuple[Pictures, Pictures, Pictures, Pictures]:
    """Return all of 0 to 4; and of 5 to 9, a pool to train with, validation and test."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).reshape(-1, 8, 8, 1).astype(np.float32)
    high, labels = labels > 4, (labels % 5).astype(np.int32)
    test, rest = cut((images[high], labels[high]), TEST, 0)
    validation, pool = cut(rest, VALIDATION, 0)
    return (images[~high], labels[~high]), pool, validation, test


def cut(pictures: Pictures, count: int, seed: int) -> tuple[Pictures, Pictures]:
    """Return so many pictures, with the labels' shares kept, and the others."""
    images, labels = pictures
    some, others = train_test_split(
        np.arange(len(labels)), train_size=count, random_state=seed, stratify=labels
    )
    return (images[some], labels[some]), (images[others], labels[others])


def draws(pictures: Pictures, steps: int, seed: int) -> list[Batch]:
    """Return batches that are drawn with replacement."""
    random, (images, labels) = np.random.default_rng(seed), pictures
    rows = [random.integers(0, len(labels), BATCH) for _ in range(steps)]
    return [{"images": images[row], "labels": labels[row]} for row in rows]


def logits(params: Tree, images: np.ndarray | jax.Array) -> jax.Array:
    """Return the net's logits, [n, 5]."""
    return ConvNet().apply({"params": params}, images)  # type: ignore[return-value]  # it also returns tuples


def loss(params: Tree, head: Tree, batch: Batch) -> jax.Array:
    """Return the mean cross-entropy."""
    scores = logits(params, batch["images"])
    return optax.softmax_cross_entropy_with_integer_labels(scores, batch["labels"]).mean()


def accuracy(pictures: Pictures, params: Tree, head: Tree) -> float:
    """Return the share of pictures whose label the net finds."""
    images, labels = pictures
    return float((np.asarray(_compiled(params, images)).argmax(1) == labels).mean())


_compiled = jax.jit(logits)


def new_net(seed: int) -> Tree:
    """Return the parameters of an untrained net."""
    return dict(ConvNet().init(jax.random.key(seed), np.zeros((1, 8, 8, 1), np.float32))["params"])


def pretrained(pictures: Pictures, seed: int, steps: int) -> Tree:
    """Return a net that was trained whole on these pictures."""
    params = new_net(seed)
    schedule = optax.cosine_decay_schedule(BASE_RATE, steps)
    state = ADAM.init(params)
    for n, batch in enumerate(draws(pictures, steps, seed)):
        params, state = _step(params, state, batch, schedule(n))
    return params


@jax.jit
def _step(params: Tree, state: optax.OptState, batch: Batch, rate: jax.Array):
    gradient = jax.grad(lambda params: loss(params, {}, batch))(params)
    direction, state = ADAM.update(gradient, state)
    return optax.apply_updates(params, optax.tree.scale(-rate, direction)), state
