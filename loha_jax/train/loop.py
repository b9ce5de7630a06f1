"""`fit`: the loop over batches, with evaluations, checkpoints and SIGTERM between its steps."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import PyTree

from loha_jax.checkpoint import Checkpoints
from loha_jax.runtime.caller import warn_caller
from loha_jax.runtime.scalars import check_key
from loha_jax.train.log import Clock, Log, progress_bar
from loha_jax.train.placement import commit, default_sharding, placed_batches
from loha_jax.train.preemption import sigterm_handler
from loha_jax.train.step import LossFunction, TrainStep
from loha_jax.tree.containers import refuse_model
from loha_jax.tree.partition import combine, partition
from loha_jax.tree.placement import place

Stopped = Literal["finished", "sigterm", "nan"]


@dataclasses.dataclass(frozen=True)
class Result:
    """A trained tree, and how the training went.

    Attributes:
        params: the tree after the last good step.
        opt_state: the optimizer's state after it.
        step: how many steps `params` has been trained for, in all calls together.
        history: of this call: `{"step": n, "loss": ..., "grad_norm": ..., ...}` every `log_every`
            steps, and `{"step": n, "eval_...": ...}` for each evaluation.
        stopped: "finished"; "sigterm" after the signal; "nan" if a loss, gradient or factor of
            step `step + 1` was not finite.
        seconds: of this call, by "compile", "train", "evaluate" and "save".
    """

    params: PyTree
    opt_state: PyTree
    step: int
    history: list[dict[str, float]]
    stopped: Stopped
    seconds: dict[str, float]


def fit(
    loss_fn: LossFunction,
    params: PyTree,
    tx: optax.GradientTransformation,
    batches: Iterable[PyTree] | Callable[[int], Iterable[PyTree]],
    *,
    key: jax.Array,
    steps: int | None = None,
    accumulate: int = 1,
    dtype: DTypeLike | None = None,
    sharding: PyTree = None,
    evaluate: Callable[[PyTree], Mapping[str, float | jax.Array]] | None = None,
    eval_every: int | None = None,
    checkpoints: Checkpoints | str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    log_every: int = 1,
    progress: bool = True,
    on_metrics: Callable[[int, dict[str, float]], object] | None = None,
) -> Result:
    """Train the active adapters of a tree.

    A step is compiled once for each shape of a batch. The loop waits for the device only at
    evaluations and checkpoints. If a step produces a NaN or infinite loss, gradient or trained
    array, training ends with a warning, and the previous state intact. On SIGTERM the step is
    finished and a checkpoint saved, and `fit` returns. Called again with the same arguments, it
    resumes from the checkpoint, with the results of a run that was never interrupted.

    Args:
        loss_fn: `(params, batch, key)` to the loss, or to `(loss, {name: scalar})`. It gets the
            adapted tree, with the dropouts of its configs already applied; call the model through
            `loha_jax.adapt`.
        params: a tree made by `inject` or `interop.load_peft`. It stays usable.
        tx: the optimizer, from optax. One that takes more than gradients (`reduce_on_plateau`,
            `lbfgs`) gets the step's loss as `value`, `grad`, and its loss as a function of the
            trained arrays as `value_fn`.
        batches: one batch (a tree of arrays) per step. Training ends where they end. A run that is
            resumed reads and drops the batches it has used; it need not if this is a function that
            takes their number and returns the others.
        key: the random key of the dropouts, and of the keys that `loss_fn` gets. A resumed run
            uses the key of its checkpoint.
        steps: how many in all, including those before a resumption.
        accumulate: the parts that each batch is split into, computed one after the other, to save
            memory. Losses, gradients and metrics are the means over the parts. For a mean over
            rows these are the whole batch's. A loss that divides by a number that differs between
            parts (unpadded tokens) weighs them equally all the same: divide by a fixed number
            there. Each part has its own dropout.
        dtype: the dtype that the model computes in, such as `jnp.bfloat16`. The frozen arrays
            (once, at the start; a base already in it is not copied), the trained copies of
            `modules_to_save` and the floating arrays of a batch are cast to it. Trained arrays,
            gradients and optimizer keep their dtype, which is float32 after `inject`; `adapt`
            multiplies with float32 factors and returns `dtype`. Compute the loss itself in
            float32: `logits.astype(jnp.float32)`. Evaluation gets the uncast tree.
        sharding: where batches go, as `NamedSharding(mesh, P("data"))`, or a tree of such. With
            several processes each gives its own rows. Without it, batches are taken as they come,
            the same from all processes.
        evaluate: `(params)` to `{name: number}`, recorded as `eval_name`. It may keep its argument.
        eval_every: steps between evaluations; one at the end is always made.
        checkpoints: a folder, or `loha_jax.checkpoint.Checkpoints`. The run resumes from the last
            checkpoint in it.
        checkpoint_every: steps between checkpoints; one at the end, however it comes, is always
            saved.
        log_every: steps whose mean makes one entry of the history.
        progress: whether to show a bar, in a terminal or notebook.
        on_metrics: called as `(step, metrics)` with each entry of the history.

    Returns:
        The trained tree, and how the training went.

    Raises:
        ValueError: arguments that contradict each other; or, in the first step, a batch whose rows
            cannot be split into `accumulate` parts, or metrics that are no scalars.

    Example:
        >>> import loha_jax, optax
        >>> from loha_jax.train import fit
        >>> config = loha_jax.LoHaConfig(r=2, target_modules=["q"])
        >>> base = {"q": {"kernel": jnp.ones((3, 3))}}
        >>> params = loha_jax.inject(base, config, key=jax.random.key(0))
        >>> apply = loha_jax.adapt(lambda params, x: x @ params["q"]["kernel"])
        >>> def loss_fn(params, batch, key):
        ...     return jnp.mean((apply(params, batch["x"]) - batch["y"]) ** 2)
        >>> batches = [{"x": jnp.ones((4, 3)), "y": jnp.zeros((4, 3))}] * 20
        >>> result = fit(loss_fn, params, optax.adam(1e-2), batches, key=jax.random.key(1))
        >>> result.step, result.stopped, result.history[-1]["loss"] < result.history[0]["loss"]
        (20, 'finished', True)
    """
    counts = {"accumulate": accumulate, "log_every": log_every}
    counts |= {"eval_every": eval_every, "checkpoint_every": checkpoint_every}
    _check(params, key, steps, dtype, counts)
    pauses = _Pauses(evaluate, eval_every, checkpoint_every)
    pauses.check(with_checkpoints=checkpoints is not None)
    clock = Clock()
    with contextlib.ExitStack() as stack:
        to_stop = stack.enter_context(sigterm_handler())
        if checkpoints is not None and not isinstance(checkpoints, Checkpoints):
            checkpoints = stack.enter_context(Checkpoints(checkpoints))
        step, state, frozen, key = _start(params, tx, key, checkpoints)
        stream = placed_batches(batches, step, steps, sharding)
        first = list(itertools.islice(stream, 1))
        default = default_sharding((sharding, params, first))
        state = commit(state, default, may_alias=False)  # a copy, because steps donate it
        frozen, key = commit((frozen, key), default)
        bar = progress_bar(progress, step, steps if steps is not None else _length(batches))
        log = Log(stack.enter_context(bar), log_every, on_metrics)
        train_step = TrainStep(loss_fn, tx, state, frozen, key, accumulate, dtype)
        run = _Run(step, state, frozen, key, pauses, checkpoints, log, clock)
        stopped = run.train(train_step, itertools.chain(first, stream), to_stop)
    return Result(run.params, run.state[1], run.step, log.history, stopped, clock.seconds())


def _check(
    params: PyTree,
    key: jax.Array,
    steps: int | None,
    dtype: DTypeLike | None,
    counts: Mapping[str, int | None],
) -> None:
    """Raise ValueError for wrong arguments."""
    check_key(key)
    refuse_model(
        params,
        "An NNX model is trained by nnx.Optimizer(model, tx, wrt=loha_jax.nnx.LoHaParam), a Keras "
        "model by its own fit.",
    )
    if steps is not None and steps < 0:
        raise ValueError(f"steps is a number of steps or None, got {steps}")
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} is 1 or more, got {count}")
    if dtype is not None and (
        not jnp.issubdtype(dtype, jnp.floating) or jnp.dtype(dtype) == jnp.float16
    ):
        raise ValueError(
            f"dtype is a floating dtype, got {jnp.dtype(dtype)}; for 16 bits take bfloat16: "
            "gradients in float16 would need a scaled loss, which this loop does not have"
        )


@dataclasses.dataclass(frozen=True)
class _Pauses:
    """The evaluations and checkpoints between the steps of a run."""

    evaluate: Callable[[PyTree], Mapping[str, float | jax.Array]] | None
    eval_every: int | None
    checkpoint_every: int | None

    def check(self, *, with_checkpoints: bool) -> None:
        """Raise ValueError for numbers that have no use."""
        if self.eval_every is not None and self.evaluate is None:
            raise ValueError(
                "eval_every needs evaluate=, a function of the parameters that returns "
                "{name: number}"
            )
        if self.checkpoint_every is not None and not with_checkpoints:
            raise ValueError(
                "checkpoint_every needs checkpoints=, a folder or loha_jax.checkpoint.Checkpoints"
            )


def _start(
    params: PyTree,
    tx: optax.GradientTransformation,
    key: jax.Array,
    checkpoints: Checkpoints | None,
) -> Any:
    """Return the step, the state, the frozen arrays and the key that the run starts with."""
    trainable, frozen = partition(params)
    opt_state = tx.init(trainable)
    if checkpoints is None or (restored := checkpoints.restore(params, opt_state)) is None:
        return 0, (trainable, opt_state, True), frozen, key
    state = partition(restored.params)[0], restored.opt_state, True
    return restored.step, state, frozen, key if restored.key is None else restored.key


@dataclasses.dataclass
class _Run:
    """A run, with its state after the last step."""

    step: int
    state: Any  # (trainable, opt_state, good), see `TrainStep`
    frozen: Any
    key: jax.Array
    pauses: _Pauses
    checkpoints: Checkpoints | None
    log: Log
    clock: Clock

    def __post_init__(self) -> None:
        self._saved, self._evaluated = self.step, 0

    @property
    def params(self) -> Any:
        """The whole tree as trained so far."""
        return combine(self.state[0], self.frozen)

    def train(
        self, train_step: TrainStep, batches: Iterable[PyTree], to_stop: Callable[[int], bool]
    ) -> Stopped:
        """Run the steps, evaluate and save between them and at the end; return why it ended."""
        stopped = self._steps(train_step, batches, to_stop)
        self.log.read_all()
        if self.log.failure is not None:
            stopped, (self.step, values) = "nan", self.log.failure
            warn_caller(
                f"Step {self.step + 1} is not finite (loss {values['loss']}, norm of the gradient "
                f"{values['grad_norm']}); training ends with the state after step {self.step}.",
                RuntimeWarning,
            )
        self.log.end(self.step)
        if stopped == "finished":
            self._measure()
        self._save()
        return stopped

    def _steps(
        self, train_step: TrainStep, batches: Iterable[PyTree], to_stop: Callable[[int], bool]
    ) -> Stopped:
        for batch in batches:
            with self.clock.measure("compile"):
                train_step.compile(batch)
            self.state, metrics = train_step(self.state, batch, self.step)
            self.step += 1
            self.log.add(self.step, metrics)
            stop = to_stop(self.step)
            evaluate = self._is_due(self.pauses.eval_every)
            save = self._is_due(self.pauses.checkpoint_every)
            if stop or evaluate or save:
                self.log.read_all()
            if self.log.failure is not None:
                return "nan"
            if stop:
                return "sigterm"
            if evaluate:
                self._measure()
            if save:
                self._save()
        return "finished"

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _measure(self) -> None:
        evaluate = self.pauses.evaluate
        if evaluate is None or self.step <= self._evaluated:
            return
        with self.clock.measure("evaluate"):
            # A copy, which `evaluate` may keep: the next step donates the state.
            trainable = jax.tree.map(lambda x: place(x, x.sharding, may_alias=False), self.state[0])
            found = evaluate(combine(trainable, self.frozen))
        self.log.record(self.step, {f"eval_{name}": float(value) for name, value in found.items()})
        self._evaluated = self.step

    def _save(self) -> None:
        if self.checkpoints is None or self.step <= self._saved:
            return
        with self.clock.measure("save"):
            metrics = self.log.metrics_of(self.step)
            self.checkpoints.save(
                self.step, self.params, self.state[1], key=self.key, metrics=metrics
            )
        self._saved = self.step


def _length(batches: object) -> int | None:
    return len(batches) if isinstance(batches, Sized) else None
