"""Bytes and FLOPs of a training step of one Llama-3 layer: from shapes, and as XLA compiles it.

A step takes the layer's factors, their AdamW state, the frozen kernels, the layer's input and the
gradient of its result, recomputes the layer (remat) and returns new factors and state and the
gradient of its input.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

import loha_jax
from benchmarks import llama3
from benchmarks.llama3 import Llama3
from benchmarks.measure import xla_counts

OPTIMIZER = optax.adamw(1e-4)
QUICK_COMPILE = {"xla_backend_optimization_level": 0}
"""For the CPU's code generator, which has no part in what XLA counts."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A step and the shapes of its arguments.

    Attributes:
        forward: of the trained half, the frozen half and the layer's input.
        trainable, state, frozen, x: shapes with shardings; x is also the shape of the gradient of
            the result.
    """

    forward: Callable[..., jax.Array]
    trainable: Any
    state: Any
    frozen: Any
    x: jax.ShapeDtypeStruct


def adapted_step(
    model: Llama3, rank: int, sequences: int, length: int, mesh: Any = None, *, remat: bool = True
) -> Step:
    """With a LoHa for each of the seven linear modules."""
    config = loha_jax.LoHaConfig(r=rank, alpha=rank, target_modules=list(model.kernels))
    params = loha_jax.inject(llama3.layer_params(model, mesh), config, key=jax.random.key(0))
    trainable, frozen = loha_jax.partition(params)
    layer = functools.partial(llama3.layer, model, mesh)
    adapted = loha_jax.adapt(jax.checkpoint(layer) if remat else layer)

    def forward(trainable: Any, frozen: Any, x: jax.Array) -> jax.Array:
        return adapted(loha_jax.combine(trainable, frozen), x)

    return Step(
        forward,
        trainable,
        _optimizer_state(trainable, mesh),
        frozen,
        llama3.tokens(model, sequences, length, mesh),
    )


def frozen_step(model: Llama3, sequences: int, length: int) -> Step:
    """Without an adapter: the gradient of the input alone."""

    def forward(trainable: Any, frozen: Any, x: jax.Array) -> jax.Array:
        return jax.checkpoint(functools.partial(llama3.layer, model, None))(frozen, x)

    return Step(
        forward,
        (),
        OPTIMIZER.init(()),
        llama3.layer_params(model),
        llama3.tokens(model, sequences, length),
    )


def _optimizer_state(trainable: Any, mesh: Any) -> Any:
    whole = mesh and NamedSharding(mesh, PartitionSpec())
    return optax.tree_utils.tree_map_params(
        OPTIMIZER,
        lambda leaf, factor: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=factor.sharding),
        jax.eval_shape(OPTIMIZER.init, trainable),
        trainable,
        transform_non_params=lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=whole
        ),
    )


# --- compiled -------------------------------------------------------------------------------------


def compile_step(step: Step) -> jax.stages.Compiled:
    """Compiles; nothing is allocated."""

    def run(trainable: Any, state: Any, frozen: Any, x: jax.Array, target: jax.Array) -> Any:
        def loss(trainable: Any, x: jax.Array) -> jax.Array:
            return jnp.sum(step.forward(trainable, frozen, x).astype(jnp.float32) * target)

        value, (gradients, dx) = jax.value_and_grad(loss, argnums=(0, 1))(trainable, x)
        updates, state = OPTIMIZER.update(gradients, state, trainable)
        return optax.apply_updates(trainable, updates), state, dx, value

    def sharding(leaf: jax.ShapeDtypeStruct) -> Any:
        return leaf.sharding

    results = (*jax.tree.map(sharding, (step.trainable, step.state, step.x)), None)
    program = jax.jit(run, out_shardings=results, donate_argnums=(0, 1))
    return _compile(program, step.trainable, step.state, step.frozen, step.x, step.x)


def compile_kept(step: Step) -> jax.stages.Compiled:
    """Compiles a layer's forward pass; it returns the activations that its backward pass keeps."""
    return _compile(jax.jit(functools.partial(_kept, step)), step.trainable, step.frozen, step.x)


def compile_head(model: Llama3, sequences: int, length: int) -> jax.stages.Compiled:
    """Compiles the loss of the last layer's result and its gradient with respect to that."""
    labels = jax.ShapeDtypeStruct((sequences, length), jnp.int32)
    x = llama3.tokens(model, sequences, length)
    return _compile(
        jax.jit(jax.value_and_grad(llama3.head_loss, argnums=1)),
        llama3.outer_params(model),
        x,
        labels,
    )


def flops(compiled: jax.stages.Compiled) -> float:
    """XLA's count, per device."""
    return xla_counts(compiled)["xla_flops"]


def _compile(program: Any, *arguments: Any) -> jax.stages.Compiled:
    return program.lower(*arguments).compile(compiler_options=QUICK_COMPILE)


# --- from shapes ----------------------------------------------------------------------------------


def bytes_per_device(tree: Any) -> int:
    """Bytes of shapes with shardings."""

    def of(leaf: jax.ShapeDtypeStruct) -> int:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(of, jax.tree.leaves(tree)))


def kept_bytes(model: Llama3, step: Step, fsdp: int, tensor: int) -> int:
    """Bytes per device of what one layer keeps for its backward pass, by the rules.

    All of it is split over all devices but x·KB of the factored form, whose r² columns each tensor
    device has whole.
    """
    split = {model.hidden, model.mlp, llama3.HEAD_WIDTH, 1}
    leaves = jax.eval_shape(functools.partial(_kept, step), step.trainable, step.frozen, step.x)
    return sum(
        leaf.size * leaf.dtype.itemsize // (fsdp * tensor if leaf.shape[-1] in split else fsdp)
        for leaf in leaves
    )


def _kept(step: Step, trainable: Any, frozen: Any, x: jax.Array) -> list[jax.Array]:
    def run(trainable: Any, x: jax.Array) -> jax.Array:
        return step.forward(trainable, frozen, x)

    _, pull_back = jax.vjp(run, trainable, x)
    return [
        leaf for leaf in jax.tree.leaves(pull_back) if leaf.shape[:2] == x.shape[:2]
    ]  # not the kernels
