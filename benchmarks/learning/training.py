"""The one loop that all methods train in: Adam with a linear warm-up and a linear decay."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

import loha_jax
from benchmarks.learning.methods import CLIP, DECAY, FASTER, METHODS, Method, Tree
from benchmarks.learning.task import Batch, Run, Task

WARMUP = 0.1
"""The share of the steps in which the learning rate rises."""

WINDOW = 10
"""The steps that a point of the loss curve is the mean of."""

Loss = Callable[[Tree, Tree, Batch], jax.Array]
State = tuple[Tree, Any]
"""The trained arrays, with the head, and Adam's moments."""

ADAM = optax.scale_by_adam()
CLIPPING = optax.clip_by_global_norm(CLIP)


@functools.cache
def make_step(loss: Loss, method: Method) -> Callable[..., Any]:
    """Return one compiled step, for all seeds and learning rates of a method."""
    adapted = loha_jax.adapt(loss)  # the same function of a tree without LoHa

    @jax.jit
    def step(
        state: State, start: Tree, frozen: Tree, batch: Batch, rate: float, head_rate: float
    ) -> tuple[Any, jax.Array]:
        trained, moments = state

        def of_trained(trained: Tree) -> jax.Array:
            return adapted(method.tree(trained["factors"], frozen), trained["head"], batch)

        value, gradient = jax.value_and_grad(of_trained)(trained)
        if method.clips:
            gradient["factors"], _ = CLIPPING.update(gradient["factors"], CLIPPING.init(trained))
        found, moments = ADAM.update(gradient, moments)
        direction = cast(Tree, found)
        if method.decays:
            direction["factors"] = decayed(direction["factors"], trained["factors"], start, method)
        updates = {
            "factors": scaled(direction["factors"], -rate, method.faster),
            "head": optax.tree.scale(-head_rate, direction["head"]),
        }
        return (optax.apply_updates(trained, updates), moments), value

    return step


def scaled(factors: Tree, rate: jax.Array | float, faster: str) -> Tree:
    """Return the factors times the rate; those of the name `faster` times `FASTER` more."""

    def scale(path: tuple[Any, ...], factor: jax.Array) -> jax.Array:
        last = jax.tree_util.keystr(path[-1:], simple=True)
        return factor * rate * (FASTER if last == faster else 1)

    return jax.tree_util.tree_map_with_path(scale, factors)


def decayed(direction: Tree, factors: Tree, start: Tree, method: Method) -> Tree:
    """Return the direction, with a pull to their start on the factors that decay."""

    def pulled(
        path: tuple[Any, ...], direction: jax.Array, factor: jax.Array, start: jax.Array
    ) -> jax.Array:
        last = jax.tree_util.keystr(path[-1:], simple=True)
        pull = DECAY * (factor - start) if last.startswith(method.decays) else 0
        return direction + pull

    return jax.tree_util.tree_map_with_path(pulled, direction, factors, start)


def ramp(step: int, steps: int) -> float:
    """Return the share of the peak rate at a step: up from 0, then down to 0."""
    warmup = round(WARMUP * steps)
    return step / warmup if step < warmup else (steps - step) / (steps - warmup)


class Trained(NamedTuple):
    """What a training leaves behind."""

    base: Tree
    model: Tree
    """The base with the update merged."""
    head: Tree
    losses: list[float | None]
    parameters: int
    steps: int
    seconds: float
    cpu_seconds: float
    compile_seconds: float


def train(task: Task, run: Run) -> dict[str, Any]:
    """Train as `run` says and return the score of its held-out part, the losses and the seconds."""
    done = run_training(task, run)
    score = task.scores[run.stage](done.model, done.head)
    return {
        "score": score if math.isfinite(score) else None,
        "losses": done.losses,
        "steps": done.steps,
        "parameters": done.parameters,
        "seconds": round(done.seconds, 2),
        "cpu_seconds": round(done.cpu_seconds, 2),
        "compile_seconds": round(done.compile_seconds, 1),
    }


def run_training(task: Task, run: Run) -> Trained:
    """Train as `run` says."""
    method = METHODS[run.method]
    scale = task.config.alpha / task.config.r
    config = dataclasses.replace(task.config, r=run.r, alpha=scale * run.r)
    base, head = task.start(run.seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "r = .* allows updates of rank")
        factors, frozen = method.start(base, config, jax.random.key(run.seed))
    batches = task.batches(run.seed)
    trained: Tree = {"factors": factors, "head": head}
    state: State = (trained, ADAM.init(trained))
    step = make_step(task.loss, method)
    compile_seconds = _compile(step, state, factors, frozen, batches)
    wall, cpu = time.perf_counter(), time.process_time()
    losses = []
    for n, batch in enumerate(batches):
        share = np.float32(ramp(n, len(batches)))
        rates = np.float32(run.rate) * share, np.float32(task.head_rate) * share
        state, loss = step(state, factors, frozen, batch, *rates)
        losses.append(loss)
    curve = _curve(np.asarray(jax.device_get(losses)))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    trained, _ = state
    return Trained(
        base,
        loha_jax.merge(method.tree(trained["factors"], frozen)),
        trained["head"],
        curve,
        sum(leaf.size for leaf in jax.tree.leaves(factors)),
        len(batches),
        wall,
        cpu,
        compile_seconds,
    )


def _compile(
    step: Callable[..., Any], state: State, start: Tree, frozen: Tree, batches: Sequence[Batch]
) -> float:
    """Compile the step for all shapes of the batches; return the seconds that it took."""
    begun = time.perf_counter()
    zero = np.float32(0)
    by_shape = {next(iter(batch.values())).shape: batch for batch in batches}
    for batch in by_shape.values():
        jax.block_until_ready(step(state, start, frozen, batch, zero, zero))
    return time.perf_counter() - begun


def _curve(losses: np.ndarray) -> list[float | None]:
    """Return the mean of each window of steps; None where it is not finite."""
    means = [losses[n : n + WINDOW].mean() for n in range(0, len(losses) - WINDOW + 1, WINDOW)]
    return [round(float(mean), 4) if jnp.isfinite(mean) else None for mean in means]
