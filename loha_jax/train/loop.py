"""`fit`: a training loop for people who want one. Everyone else keeps their own: nothing else here needs this.

result = loha_jax.train.fit(loss_fn, params, optax.adamw(1e-3), batches, key=key, steps=1000, checkpoints="run")
interop.save_peft("adapter", result.params)
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from loha_jax.checkpoint import Checkpoints
from loha_jax.runtime.caller import warn_caller
from loha_jax.runtime.scalars import check_key
from loha_jax.train.log import Clock, Log, progress_bar
from loha_jax.train.step import TrainStep
from loha_jax.tree.containers import refuse_model
from loha_jax.tree.partition import combine, partition
from loha_jax.tree.placement import place


@dataclasses.dataclass(frozen=True)
class Result:
    """What `fit` returns.

    Attributes:
        params: the tree after the last good step.
        opt_state: the optimizer's state after it.
        step: how many steps `params` has been trained for, in all calls together.
        history: of this call: `{"step": n, "loss": ..., "grad_norm": ..., ...}` every `log_every` steps, and
            `{"step": n, "eval_...": ...}` for each evaluation.
        stopped: "finished"; "sigterm" after the signal; "nan" where step `step + 1` gave a loss, gradient or factor
            that is not finite.
        seconds: of this call, by "compile", "train", "evaluate" and "save".
    """

    params: Any
    opt_state: Any
    step: int
    history: list[dict[str, float]]
    stopped: Literal["finished", "sigterm", "nan"]
    seconds: dict[str, float]


def fit(
    loss_fn: Callable[[Any, Any, jax.Array], Any],
    params: Any,
    tx: optax.GradientTransformation,
    batches: Iterable[Any] | Callable[[int], Iterable[Any]],
    *,
    key: jax.Array,
    steps: int | None = None,
    accumulate: int = 1,
    dtype: Any = None,
    sharding: Any = None,
    evaluate: Callable[[Any], Mapping[str, Any]] | None = None,
    eval_every: int | None = None,
    checkpoints: Checkpoints | str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    log_every: int = 1,
    progress: bool = True,
    on_metrics: Callable[[int, dict[str, float]], Any] | None = None,
) -> Result:
    """Trains the active adapters of a tree.

    A step is compiled once for each shape of a batch. The device is never waited for but at evaluations and
    checkpoints. Where loss, gradients or trained arrays stop being finite, they and the optimizer's state are left as
    the step before left them, bit for bit, and training ends with a warning. On SIGTERM the step is finished and saved,
    and `fit` returns; called again with the same arguments it goes on, with the results of a run that was never
    interrupted.

    Args:
        loss_fn: `(params, batch, key)` to the loss, or to `(loss, {name: scalar})`. It gets the adapted tree, the
            dropouts of its configs already applied; call the model through `loha_jax.adapt`.
        params: a tree that `inject` or `interop.load_peft` made. It stays usable.
        tx: the optimizer, from optax. One that takes more than gradients (`reduce_on_plateau`, `lbfgs`) gets the step's
            loss as `value`, `grad`, and its loss as a function of the trained arrays as `value_fn`.
        batches: one batch (a tree of arrays) per step; or, better where a run may be resumed, a function that takes how
            many were used and returns the others. Without it, a resumed run reads and drops those. Training ends
            where they end.
        key: of the dropouts, and of the keys that `loss_fn` gets. A resumed run goes on with its own.
        steps: how many in all, those before a resumption included.
        accumulate: the parts that each batch is cut into, one after the other on the device, to save memory. Losses,
            gradients and metrics are the means of the parts', which for a mean over rows are the whole batch's. A loss
            that divides by a number that differs between parts (unpadded tokens) weighs them equally all the same:
            divide by a fixed number there. Each part has its own dropout.
        dtype: what the model computes in, such as `jnp.bfloat16`: the frozen arrays (once, at the start: a base that is
            in it already is not copied), the trained copies of `modules_to_save` and the floating arrays of a batch are
            cast to it. Trained arrays, gradients and optimizer keep their dtype, which is float32 as `inject` makes
            them; `adapt` multiplies with float32 factors and returns `dtype`. Compute the loss itself in float32:
            `logits.astype(jnp.float32)`. Evaluation gets the uncast tree.
        sharding: where batches go, as `NamedSharding(mesh, P("data"))`, or a tree of such. With several processes
            each gives its own rows. Without it batches are taken as they come, from all processes the same ones.
        evaluate: `(params)` to `{name: number}`, recorded as `eval_name`. It may keep what it gets.
        eval_every: steps between evaluations; there is one in the end in any case.
        checkpoints: a folder, or `loha_jax.checkpoint.Checkpoints`. The last one in it is where this run starts.
        checkpoint_every: steps between checkpoints; there is one in the end in any case, however it comes.
        log_every: steps whose mean makes one entry of the history.
        progress: whether to show a bar, where there is a terminal or notebook.
        on_metrics: called as `(step, metrics)` with each entry of the history.

    Returns:
        The trained tree, and how it came about.

    Raises:
        ValueError: arguments that make no sense together; or, in the first step, a batch whose rows cannot be cut into
            `accumulate` parts, or metrics that are no scalars.

    Example:
        >>> import loha_jax, optax
        >>> from loha_jax.train import fit
        >>> config = loha_jax.LoHaConfig(r=2, target_modules=["q"])
        >>> params = loha_jax.inject({"q": {"kernel": jnp.ones((3, 3))}}, config, key=jax.random.key(0))
        >>> apply = loha_jax.adapt(lambda params, x: x @ params["q"]["kernel"])
        >>> def loss_fn(params, batch, key):
        ...     return jnp.mean((apply(params, batch["x"]) - batch["y"]) ** 2)
        >>> batches = [{"x": jnp.ones((4, 3)), "y": jnp.zeros((4, 3))}] * 20
        >>> result = fit(loss_fn, params, optax.adam(1e-2), batches, key=jax.random.key(1))
        >>> result.step, result.stopped, result.history[-1]["loss"] < result.history[0]["loss"]
        (20, 'finished', True)
    """
    _check(params, key, steps, accumulate, dtype, evaluate, eval_every, checkpoints, checkpoint_every, log_every)
    clock = Clock()
    with contextlib.ExitStack() as stack:
        terminated = stack.enter_context(_sigterm())
        if checkpoints is not None and not isinstance(checkpoints, Checkpoints):
            checkpoints = stack.enter_context(Checkpoints(checkpoints))
        trainable, frozen = partition(params)
        opt_state, step = tx.init(trainable), 0
        start = trainable, opt_state
        if checkpoints is not None and (restored := checkpoints.restore(params, opt_state)) is not None:
            start = partition(restored.params)[0], restored.opt_state
            step, key = restored.step, key if restored.key is None else restored.key
        saved, evaluated = step, 0

        stream = _stream(batches, step, steps, sharding)
        first = list(itertools.islice(stream, 1))
        home = _home((sharding, params, first))
        frozen, key = (jax.tree.map(place, tree, _shardings(tree, home)) for tree in (frozen, key))
        places = _shardings((trainable, opt_state, True), home)
        copied = functools.partial(place, may_alias=False)  # a step uses it up, and not what was given
        state = jax.tree.map(copied, (*start, True), places)
        train_step = TrainStep(loss_fn, tx, state, frozen, key, accumulate, dtype)
        bar = progress_bar(progress, step, steps if steps is not None else _length(batches))
        log = Log(stack.enter_context(bar), log_every, on_metrics)

        def measure() -> None:
            nonlocal evaluated
            if evaluate is not None and step > evaluated:
                with clock.measure("evaluate"):
                    found = evaluate(combine(jax.tree.map(copied, state[0], places[0]), frozen))
                log.record(step, {f"eval_{name}": float(value) for name, value in found.items()})
                evaluated = step

        def save() -> None:
            nonlocal saved
            if checkpoints is not None and step > saved:
                with clock.measure("save"):
                    tree = combine(state[0], frozen)
                    checkpoints.save(step, tree, state[1], key=key, metrics=log.metrics_of(step))
                saved = step

        stopped = "finished"
        for batch in itertools.chain(first, stream):
            with clock.measure("compile"):
                train_step.compile(batch)
            state, metrics = train_step(state, batch, step)
            step += 1
            log.add(step, metrics)
            to_stop, to_evaluate = terminated(step), _is_due(step, eval_every)
            to_save = _is_due(step, checkpoint_every)
            if to_stop or to_evaluate or to_save:
                log.read_all()
            if log.failure is not None:
                break
            if to_stop:
                stopped = "sigterm"
                break
            if to_evaluate:
                measure()
            if to_save:
                save()
        log.read_all()
        if log.failure is not None:
            stopped, (step, values) = "nan", log.failure
            warn_caller(
                f"Step {step + 1} is not finite (loss {values['loss']}, norm of the gradient {values['grad_norm']}); "
                f"training ends with the state after step {step}.",
                RuntimeWarning,
            )
        log.end(step)
        if stopped == "finished":
            measure()
        save()
    return Result(combine(state[0], frozen), state[1], step, log.history, stopped, clock.seconds())


def _check(
    params, key, steps, accumulate, dtype, evaluate, eval_every, checkpoints, checkpoint_every, log_every
) -> None:
    """Raises ValueError for arguments that make no sense."""
    check_key(key)
    refuse_model(params, "An NNX model is trained by nnx.Optimizer(model, tx, wrt=loha_jax.nnx.LoHaParam).")
    if steps is not None and steps < 0:
        raise ValueError(f"steps is a number of steps or None, got {steps}")
    counts = {
        "accumulate": accumulate,
        "eval_every": eval_every,
        "checkpoint_every": checkpoint_every,
        "log_every": log_every,
    }
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} is 1 or more, got {count}")
    if eval_every is not None and evaluate is None:
        raise ValueError("eval_every needs evaluate=, a function of the parameters that returns {name: number}")
    if checkpoint_every is not None and checkpoints is None:
        raise ValueError("checkpoint_every needs checkpoints=, a folder or loha_jax.checkpoint.Checkpoints")
    if dtype is not None and (not jnp.issubdtype(dtype, jnp.floating) or jnp.dtype(dtype) == jnp.float16):
        raise ValueError(
            f"dtype is a floating dtype, got {jnp.dtype(dtype)}; for 16 bits take bfloat16: gradients in float16 would "
            "need a scaled loss, which this loop does not have"
        )


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _length(batches: Any) -> int | None:
    return len(batches) if hasattr(batches, "__len__") else None


def _stream(batches: Any, used: int, steps: int | None, sharding: Any) -> Iterator[Any]:
    """The batches that are still to come, on the device."""
    rest: Iterable[Any] = batches(used) if callable(batches) else itertools.islice(batches, used, None)  # type: ignore[assignment]
    for batch in itertools.islice(rest, None if steps is None else max(steps - used, 0)):
        yield batch if sharding is None else jax.tree.map(_put, batch, jax.tree.broadcast(sharding, batch))


def _put(x: Any, sharding: Any) -> jax.Array:
    if isinstance(x, jax.Array):
        return jax.device_put(x, sharding)
    return jax.make_array_from_process_local_data(sharding, x)


def _home(tree: Any) -> Any:
    """Where arrays go that were put nowhere in particular: to all devices of the first in `tree` that was."""
    for x in jax.tree.leaves(tree):
        sharding = x if isinstance(x, jax.sharding.Sharding) else _committed(x)
        if sharding is not None:
            return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding
    return jnp.zeros(()).sharding  # the default device


def _committed(x: Any) -> Any:
    return x.sharding if getattr(x, "committed", False) else None


def _shardings(tree: Any, home: Any) -> Any:
    """Where the arrays of `tree` are to be, so that no step moves one, or is compiled for another place."""
    return jax.tree.map(lambda x: _committed(x) or home, tree)


@contextlib.contextmanager
def _sigterm() -> Iterator[Callable[[int], bool]]:
    """Whether to stop after a step, because of SIGTERM. One that comes too late to be asked about is sent again.

    A second one does what the first would have done without this. Several processes stop after the same step: JAX's
    preemption service, which has a handler of its own, sees to it.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    if threading.current_thread() is not threading.main_thread():  # signals are handled in the main thread alone
        yield lambda step: False
        return
    before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
    came = told = False

    def handle(signum: int, frame: Any) -> None:
        nonlocal came
        came = True
        signal.signal(signal.SIGTERM, before)

    def stop(step: int) -> bool:
        nonlocal told
        told = came
        return came

    signal.signal(signal.SIGTERM, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
        if came and not told:
            signal.raise_signal(signal.SIGTERM)
