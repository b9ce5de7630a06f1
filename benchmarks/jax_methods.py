"""The methods in JAX, as functions to compile: the frozen base, and ways to compute adapters.

A training step is the value and the gradient of the loss with respect to what is trained and to the
model's input (activations, images, the output of the embeddings). The frozen base's step has the
gradient of the input alone: through every layer, as any adapter needs it. No optimizer: it is
small, and the same for all.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import loha_jax
from benchmarks.case import (
    AUTO,
    DENSE,
    FACTORED,
    FORWARD,
    FUSED,
    JAX_FROZEN,
    MERGED,
    PALLAS,
    TRAINING,
    Adapter,
)

ADAPTED = {AUTO: "auto", FACTORED: "factored", FUSED: "fused", PALLAS: "pallas"}
"""The strategies of `adapt`. `DENSE` is the plain model on the adapted tree: leaves are W + ΔW."""

Apply = Callable[[Any, jax.Array, dict[str, jax.Array]], jax.Array]


@dataclasses.dataclass(frozen=True)
class JaxModel:
    """A frozen model.

    Attributes:
        apply: its outputs, from `params`, `x` and `batch`.
        x: the input that gradients go back to.
        batch: all other inputs, the labels among them.
        loss: a scalar, from the outputs and the batch.
        layouts: of kernels that neither a bias nor a name settles.
    """

    apply: Apply
    params: Any
    x: jax.Array
    batch: dict[str, jax.Array]
    loss: Callable[[jax.Array, dict[str, jax.Array]], jax.Array]
    layouts: Mapping[str, str] | None = None


@dataclasses.dataclass(frozen=True)
class Method:
    """A function to compile with its arguments."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    trained_parameters: int


def cross_entropy(logits: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """The mean cross-entropy with `batch["labels"]`."""
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(log_probabilities, batch["labels"][..., None], -1).mean()


def config(adapter: Adapter) -> loha_jax.LoHaConfig:
    """The adapter as loha-jax takes it."""
    return loha_jax.LoHaConfig(
        r=adapter.rank,
        alpha=adapter.alpha,
        target_modules=adapter.targets,
        use_effective_conv2d=adapter.cp,
    )


def inject(model: JaxModel, adapter: Adapter) -> Any:
    """The model's parameters with the adapter."""
    return loha_jax.inject(
        model.params, config(adapter), key=jax.random.key(0), layouts=model.layouts
    )


def methods(model: JaxModel, adapter: Adapter, kind: str) -> dict[str, Method]:
    """All methods of a forward pass or a training step, by name."""
    params = inject(model, adapter)
    trainable, frozen = loha_jax.partition(params)
    trained = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    applies = {
        name: loha_jax.adapt(model.apply, strategy=strategy, training=kind == TRAINING)
        for name, strategy in ADAPTED.items()
        if name != PALLAS or _has_a_kernel(model, params)
    } | {DENSE: model.apply}
    inputs = (model.x, model.batch)
    if kind == FORWARD:
        base = Method(model.apply, (model.params, *inputs), 0)
        merged = Method(model.apply, (loha_jax.merge(params), *inputs), 0)
        adapted = {
            name: Method(apply, (params, *inputs), trained) for name, apply in applies.items()
        }
        return {JAX_FROZEN: base, **adapted, MERGED: merged}
    base = Method(
        _step(model.apply, model.loss, lambda _, frozen: frozen), ((), model.params, *inputs), 0
    )
    adapted = {
        name: Method(
            _step(apply, model.loss, loha_jax.combine), (trainable, frozen, *inputs), trained
        )
        for name, apply in applies.items()
    }
    return {JAX_FROZEN: base, **adapted}


def _has_a_kernel(model: JaxModel, params: Any) -> bool:
    """Whether "pallas" is anything but factored here."""
    explained = loha_jax.explain(model.apply, params, model.x, model.batch, strategy="pallas")
    return any(use.strategy == "pallas" for use in explained.uses)


def _step(
    apply: Apply, loss: Callable[..., jax.Array], combine: Callable[[Any, Any], Any]
) -> Callable[..., Any]:
    def step(trainable: Any, frozen: Any, x: jax.Array, batch: dict[str, jax.Array]) -> Any:
        def compute(trainable: Any, x: jax.Array) -> jax.Array:
            return loss(apply(combine(trainable, frozen), x, batch), batch)

        return jax.value_and_grad(compute, argnums=(0, 1))(trainable, x)

    return step


def chosen_strategies(model: JaxModel, adapter: Adapter, kind: str) -> dict[str, int]:
    """How many products "auto" computes in which way."""
    apply = loha_jax.adapt(model.apply, training=kind == TRAINING)
    explanation = loha_jax.explain(apply, inject(model, adapter), model.x, model.batch)
    return dict(Counter(use.strategy for use in explanation.uses))


def runner(compiled: Callable[..., Any], method: Method) -> Callable[[], Any]:
    """Runs a compiled method and waits for its results."""
    return functools.partial(_run, compiled, method.arguments)


def _run(compiled: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return jax.block_until_ready(compiled(*arguments))
