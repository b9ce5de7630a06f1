"""The step of `fit`: gradient accumulation, mixed precision, no update from NaN or infinity."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike
from jaxtyping import PyTree

from loha_jax.lowrank.hadamard import float32_or_wider
from loha_jax.tree.dropout import dropout
from loha_jax.tree.leaves import LoHaWeight, SavedWeight, is_whole
from loha_jax.tree.partition import combine
from loha_jax.tree.quantised import is_quantised, wrapped

RESERVED = ("loss", "grad_norm", "good", "step")
"""Names that `loss_fn` cannot give a metric."""

LossFunction = Callable[
    [PyTree, PyTree, jax.Array], jax.Array | tuple[jax.Array, Mapping[str, jax.Array]]
]
"""`(params, batch, key)` to the loss, or to `(loss, {name: scalar})`."""

T = TypeVar("T")

State = tuple[Any, Any, jax.Array]
"""`(trainable, opt_state, good)`: `good` is False once a step was not finite."""


class TrainStep:
    """One step of `fit`, compiled ahead of time once for each kind of batch.

    Each call donates the state that it is given.
    """

    def __init__(
        self,
        loss_fn: LossFunction,
        tx: optax.GradientTransformation,
        state: State,
        frozen: PyTree,
        key: jax.Array,
        accumulate: int,
        dtype: DTypeLike | None,
    ):
        self._loss_fn, self._tx = loss_fn, optax.with_extra_args_support(tx)
        self._accumulate, self._dtype = accumulate, dtype
        self._frozen, self._key = cast_floating(frozen, dtype), key
        self._state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        shardings = jax.tree.map(lambda x: x.sharding, state)
        self._jitted = jax.jit(self._step, donate_argnums=0, out_shardings=(shardings, None))
        self._compiled: dict[Any, jax.stages.Compiled] = {}

    def compile(self, batch: PyTree) -> None:
        """Compile the step for batches of this kind, unless that is done."""
        if (kind := _kind(batch)) not in self._compiled:
            lowered = self._jitted.lower(self._state, self._frozen, batch, self._key, np.uint32(0))
            self._compiled[kind] = lowered.compile()

    def __call__(
        self, state: State, batch: PyTree, number: int
    ) -> tuple[State, dict[str, jax.Array]]:
        """Start step `number`, counted from 0; return the state after it and its metrics."""
        return self._compiled[_kind(batch)](
            state, self._frozen, batch, self._key, np.uint32(number)
        )

    def _step(self, state, frozen, batch, key, number):
        trainable, opt_state, good = state
        get = self._gradient if self._accumulate == 1 else self._mean_gradient
        given = frozen, cast_floating(batch, self._dtype), jax.random.fold_in(key, number)
        grads, metrics = get(trainable, *given)
        extra = {
            "value": metrics["loss"],
            "grad": grads,
            "value_fn": lambda trainable: get(trainable, *given)[1]["loss"],
        }
        updates, new_opt_state = self._tx.update(
            grads, opt_state, trainable, **taken_by(self._tx.update, extra)
        )
        new = optax.apply_updates(trainable, updates)
        finite = [jnp.isfinite(x).all() for x in jax.tree.leaves((metrics["loss"], grads, new))]
        good &= jnp.stack(finite).all()  # once it is False, no later step changes anything

        def keep(new, old):
            return jnp.where(good, new, old)

        kept = (
            jax.tree.map(keep, new, trainable),
            jax.tree.map(keep, new_opt_state, opt_state),
            good,
        )
        return kept, {**metrics, "grad_norm": optax.tree.norm(grads), "good": good}

    def _loss(self, trainable, frozen, batch, key):
        dropout_key, loss_key = jax.random.split(key)
        params = dropout(combine(cast_floating(trainable, self._dtype), frozen), dropout_key)
        outcome = self._loss_fn(params, batch, loss_key)
        value, metrics = outcome if isinstance(outcome, tuple) else (outcome, {})
        _check_metrics(metrics)
        return value.astype(float32_or_wider(value.dtype)), metrics

    def _gradient(self, trainable, frozen, batch, key):
        """The gradient for one batch, and its metrics with the loss among them."""
        (value, metrics), grads = jax.value_and_grad(self._loss, has_aux=True)(
            trainable, frozen, batch, key
        )
        return grads, {"loss": value, **metrics}

    def _mean_gradient(self, trainable, frozen, batch, key):
        """The means of the parts' gradients and metrics, one part after the other."""
        count = self._accumulate

        def add(total, part):
            grads, metrics = self._gradient(trainable, frozen, *part)
            return jax.tree.map(jnp.add, total, grads), metrics

        parts = jax.tree_util.tree_map_with_path(lambda path, x: _split(path, x, count), batch)
        zeros = jax.tree.map(jnp.zeros_like, trainable)
        total, metrics = jax.lax.scan(add, zeros, (parts, jax.random.split(key, count)))
        means = jax.tree.map(lambda x: jnp.mean(x, 0), metrics)
        return jax.tree.map(lambda x: x / count, total), means


def _kind(batch: PyTree) -> tuple[Any, ...]:
    leaves, treedef = jax.tree.flatten(batch)
    return treedef, *((jax.typeof(x), getattr(x, "sharding", None)) for x in leaves)


def _check_metrics(metrics: object) -> None:
    if not isinstance(metrics, Mapping):
        raise ValueError(
            "loss_fn returns the loss, or (loss, {name: scalar}); the second was a "
            f"{type(metrics)}"
        )
    for name, value in metrics.items():
        if jnp.shape(value) != () or name in RESERVED:
            raise ValueError(
                f"The metric {name!r} that loss_fn returns, of shape {jnp.shape(value)}, should be "
                f"a scalar with another name than {', '.join(RESERVED)}"
            )


def _split(path: tuple[Any, ...], x: jax.Array, parts: int) -> jax.Array:
    """Split the rows into parts: `[rows, ...]` to `[parts, rows / parts, ...]`.

    Part n holds the rows n, n + parts, …, so that each device keeps its rows of a sharded batch.
    """
    if x.ndim == 0:
        return jnp.broadcast_to(x, (parts,))
    if x.shape[0] % parts:
        where = jax.tree_util.keystr(path) or "the batch"
        raise ValueError(
            f"accumulate={parts} splits batches into equal parts, but {where} has {x.shape[0]} rows"
        )
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)


def cast_floating(tree: T, dtype: DTypeLike | None) -> T:
    """Cast the floating arrays of a tree, except factors, to `dtype`; None changes nothing."""

    def cast(x: Any) -> Any:
        if isinstance(x, LoHaWeight):
            return dataclasses.replace(x, kernel=cast(x.kernel))
        if isinstance(x, SavedWeight):
            return jax.tree.map(cast, x, is_leaf=is_quantised)
        if is_quantised(x):
            return wrapped(x).as_dtype(dtype)
        if x is None or x.dtype == dtype or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return x.astype(dtype)

    return tree if dtype is None else jax.tree.map(cast, tree, is_leaf=is_whole)


def taken_by(update: Callable[..., Any], extra: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments that an update takes.

    `optax.contrib.sam` takes none, though its type says so.
    """
    parameters = inspect.signature(update).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return extra
    names = {p.name for p in parameters}
    return {name: value for name, value in extra.items() if name in names}
