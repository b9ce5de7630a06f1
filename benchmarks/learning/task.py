"""A task: a model, its data and a score; and one run of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from benchmarks.learning.methods import Tree
from loha_jax import LoHaConfig

Batch = Mapping[str, np.ndarray]


class Run(NamedTuple):
    """One training: its settings. They are also the name of its record."""

    task: str
    stage: str
    """The held-out part whose score is read at the end: "validation" or "test"."""
    method: str
    r: int
    rate: float
    seed: int


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A job that all methods do in the same way.

    Args:
        config: the kernels to train, and r and alpha of LoHa.
        head_rate: the learning rate of the head, the same for all methods.
        start: from a seed to the base model and a new head (an empty tree where there is none).
        loss: the mean loss of a batch, from the model, the head and the batch.
        batches: from a seed to all batches of a training, in their order.
        scores: by the held-out part: from the merged model and the head to the score.
    """

    config: LoHaConfig
    head_rate: float
    start: Callable[[int], tuple[Tree, Tree]]
    loss: Callable[[Tree, Tree, Batch], jax.Array]
    batches: Callable[[int], Sequence[Batch]]
    scores: Mapping[str, Callable[[Tree, Tree], float]]


class Facts(NamedTuple):
    """The part of a task that plan and report need; its model is not loaded for it."""

    load: Callable[[bool], Task]
    """Loads the model and the data; with True, a small slice of the data."""
    score: str
    """The name of the score."""
    higher_is_better: bool
    r: int
    choice_seeds: int
    """How many seeds the learning rate is chosen with."""
    test_seeds: int
    goal: float
    """A training loss, for the column "steps to loss"."""
    shared_rate: float
    """The learning rate at which ranks are compared."""
    ranks: tuple[int, ...]
