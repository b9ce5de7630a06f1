"""The layers that `python -m benchmarks accelerators` compiles, as shapes."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

from benchmarks import llama3

TOKENS = 4096
WIDTHS = ((1024, 1024), (2048, 2048), (4096, 4096), (4096, 14336))

Layer = Callable[[Any, jax.Array], jax.Array]


class Case(NamedTuple):
    """A layer to compile.

    Attributes:
        name: in the tables.
        layer: a function of parameters and input.
        params: shapes, a dictionary of modules with a "kernel" each for those that are adapted.
        x, result: shapes of the input and of the result.
        training: whether gradients are computed.
        only_tpus: whether it has a kernel for TPUs.
    """

    name: str
    layer: Layer
    params: Any
    x: jax.ShapeDtypeStruct
    result: jax.ShapeDtypeStruct
    training: bool = True
    only_tpus: bool = False


def cases(quick: bool) -> Iterator[Case]:
    """Return the layers; a small one where it has to be quick."""
    for into, out in ((256, 256),) if quick else WIDTHS:
        yield linear(into, out, TOKENS, training=True)
    if quick:
        return
    for tokens in (1, 8):
        yield linear(4096, 4096, tokens, training=False)
    yield llama_layer()


def linear(into: int, out: int, tokens: int, *, training: bool) -> Case:
    """Return one Linear layer."""
    return Case(
        f"Linear {into}x{out}, {tokens} tokens",
        lambda params, x: x @ params["linear"]["kernel"],
        {"linear": {"kernel": _half(into, out)}},
        _half(tokens, into),
        _half(tokens, out),
        training,
    )


def llama_layer() -> Case:
    """Return a layer of Llama-3-8B with flash attention, recomputed in its backward pass."""
    model = llama3.MODELS["8B"]
    layer = functools.partial(llama3.layer, model, None, attend=_flash)
    x = llama3.tokens(model, 1, TOKENS)
    params = llama3.layer_params(model)
    name = f"Llama-3-8B layer, {TOKENS} tokens"
    return Case(name, jax.checkpoint(layer), params, x, x, only_tpus=True)


def _flash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Return attention of [sequence, position, head, width]; queries share keys and values."""
    repeats = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(y, repeats, 2) for y in (k, v))
    q, k, v = (jnp.swapaxes(y, 1, 2) for y in (q, k, v))
    return jnp.swapaxes(flash_attention(q, k, v, causal=True, sm_scale=q.shape[-1] ** -0.5), 1, 2)


def _half(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)
