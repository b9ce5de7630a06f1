"""The training step of `loha_jax.train`: gradients in parts, mixed precision, the guard against what is not finite."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from loha_jax.lowrank.hadamard import float32_or_wider
from loha_jax.tree.dropout import dropout
from loha_jax.tree.leaves import LoHaWeight, SavedWeight, is_adapted
from loha_jax.tree.partition import combine

RESERVED = ("loss", "grad_norm", "good", "step")
"""Names that a metric of `loss_fn` cannot have."""


class TrainStep:
    """One step of `fit`, compiled ahead of time once for each kind of batch.

    Its state is `(trainable, opt_state, good)`, where `good` is an array: whether all so far was finite. It is used up.
    """

    def __init__(
        self,
        loss_fn: Callable[[Any, Any, jax.Array], Any],
        tx: optax.GradientTransformation,
        state: Any,
        frozen: Any,
        key: jax.Array,
        accumulate: int,
        dtype: Any,
    ):
        tx = optax.with_extra_args_support(tx)

        def loss(trainable, frozen, batch, key):
            dropout_key, loss_key = jax.random.split(key)
            params = dropout(combine(cast_floating(trainable, dtype), frozen), dropout_key)
            outcome = loss_fn(params, batch, loss_key)
            value, metrics = outcome if isinstance(outcome, tuple) else (outcome, {})
            _check_metrics(metrics)
            return value.astype(float32_or_wider(value.dtype)), metrics

        def gradient(trainable, frozen, batch, key):
            (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(trainable, frozen, batch, key)
            return grads, {"loss": value, **metrics}

        def mean_gradient(trainable, frozen, batch, key):
            def add(total, part):
                grads, metrics = gradient(trainable, frozen, *part)
                return jax.tree.map(jnp.add, total, grads), metrics

            parts = jax.tree_util.tree_map_with_path(lambda path, x: _cut(path, x, accumulate), batch)
            zeros = jax.tree.map(jnp.zeros_like, trainable)
            total, metrics = jax.lax.scan(add, zeros, (parts, jax.random.split(key, accumulate)))
            return jax.tree.map(lambda x: x / accumulate, total), jax.tree.map(lambda x: jnp.mean(x, 0), metrics)

        def step(state, frozen, batch, key, number):
            trainable, opt_state, good = state
            get = gradient if accumulate == 1 else mean_gradient
            given = frozen, cast_floating(batch, dtype), jax.random.fold_in(key, number)
            grads, metrics = get(trainable, *given)

            def value_fn(trainable):
                return get(trainable, *given)[1]["loss"]

            extra = {"value": metrics["loss"], "grad": grads, "value_fn": value_fn}
            updates, new_opt_state = tx.update(grads, opt_state, trainable, **taken_by(tx.update, extra))
            new = optax.apply_updates(trainable, updates)
            finite = [jnp.isfinite(x).all() for x in jax.tree.leaves((metrics["loss"], grads, new))]
            good &= jnp.stack(finite).all()  # once it is False, no later step changes anything

            def keep(new, old):
                return jnp.where(good, new, old)

            kept = jax.tree.map(keep, new, trainable), jax.tree.map(keep, new_opt_state, opt_state), good
            return kept, {**metrics, "grad_norm": optax.tree.norm(grads), "good": good}

        self._jitted = jax.jit(step, donate_argnums=0, out_shardings=(jax.tree.map(lambda x: x.sharding, state), None))
        self._state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        self._frozen, self._key = cast_floating(frozen, dtype), key
        self._compiled: dict[Any, jax.stages.Compiled] = {}

    def compile(self, batch: Any) -> None:
        """Makes the step ready for batches of this kind, where it is not."""
        if (kind := _kind(batch)) not in self._compiled:
            lowered = self._jitted.lower(self._state, self._frozen, batch, self._key, np.uint32(0))
            self._compiled[kind] = lowered.compile()

    def __call__(self, state: Any, batch: Any, number: int) -> tuple[Any, dict[str, jax.Array]]:
        """Starts a step, the first one being number 0, and returns the state after it and its metrics."""
        return self._compiled[_kind(batch)](state, self._frozen, batch, self._key, np.uint32(number))


def _kind(batch: Any) -> Any:
    leaves, treedef = jax.tree.flatten(batch)
    return treedef, *((jax.typeof(x), getattr(x, "sharding", None)) for x in leaves)


def _check_metrics(metrics: Any) -> None:
    if not isinstance(metrics, Mapping):
        raise ValueError(f"loss_fn returns the loss, or (loss, {{name: scalar}}); the second was a {type(metrics)}")
    for name, value in metrics.items():
        if jnp.shape(value) != () or name in RESERVED:
            raise ValueError(
                f"The metric {name!r} that loss_fn returns, of shape {jnp.shape(value)}, should be a scalar with "
                f"another name than {', '.join(RESERVED)}"
            )


def _cut(path: Any, x: jax.Array, parts: int) -> jax.Array:
    """Rows n, n + parts, ... as part n: each device keeps its rows of a batch that is sharded along them."""
    if x.ndim == 0:
        return jnp.broadcast_to(x, (parts,))
    if x.shape[0] % parts:
        where = jax.tree_util.keystr(path) or "the batch"
        raise ValueError(f"accumulate={parts} cuts batches into equal parts, but {where} has {x.shape[0]} rows")
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)


def cast_floating(tree: Any, dtype: Any) -> Any:
    """The tree with its floating arrays in `dtype`, but for the factors; None leaves all as it is."""

    def cast(x: Any) -> Any:
        if isinstance(x, LoHaWeight):
            return dataclasses.replace(x, kernel=cast(x.kernel))
        if isinstance(x, SavedWeight):
            return dataclasses.replace(x, original=cast(x.original), copies=jax.tree.map(cast, x.copies))
        if x is None or x.dtype == dtype or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return x.astype(dtype)

    return tree if dtype is None else jax.tree.map(cast, tree, is_leaf=is_adapted)


def taken_by(update: Callable[..., Any], extra: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments that an update takes; `optax.contrib.sam` takes none, though its type says so."""
    parameters = inspect.signature(update).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return extra
    names = {p.name for p in parameters}
    return {name: value for name, value in extra.items() if name in names}
