"""Llama-3 as shapes: three sizes, their parameters on a mesh, and one layer to compile.

The rules, on a mesh with the axes "fsdp" and "tensor":

    q, k, v, gate, up     [in, out]: in over fsdp, out over tensor
    o, down               [in, out]: in over tensor, out over fsdp
    embedding, head       the vocabulary over tensor, the hidden axis over fsdp
    norms                 on every device
    between the layers    [sequence, position, hidden]: sequences over fsdp, positions over tensor
    heads, MLP            sequences over fsdp, heads and MLP width over tensor
    factors, optimizer    `inject`'s rule: each axis as the kernel's, r on every device

Each fsdp index has one sequence: as many sequences a step as the axis is long.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

BASE_DTYPE = jnp.bfloat16
VOCABULARY = 128256
HEAD_WIDTH = 128
ROPE_BASE = 500000.0

IN_OUT, OUT_IN = ("fsdp", "tensor"), ("tensor", "fsdp")
"""How a kernel [in, out] is split whose output or input axis is that of heads or of the MLP."""

RESIDUAL, WIDE = ("fsdp", "tensor", None), ("fsdp", None, "tensor")
"""How the array between the layers, and those inside a layer, are split."""


@dataclasses.dataclass(frozen=True)
class Llama3:
    """One size.

    Attributes:
        tensor: devices that share one sequence, in the tables.
    """

    name: str
    layers: int
    hidden: int
    mlp: int
    heads: int
    tensor: int
    kv_heads: int = 8

    @property
    def kernels(self) -> dict[str, tuple[int, int, tuple[str, str]]]:
        """In, out and sharding of each linear module of a layer."""
        wide, narrow = self.heads * HEAD_WIDTH, self.kv_heads * HEAD_WIDTH
        return {
            "q_proj": (self.hidden, wide, IN_OUT),
            "k_proj": (self.hidden, narrow, IN_OUT),
            "v_proj": (self.hidden, narrow, IN_OUT),
            "o_proj": (wide, self.hidden, OUT_IN),
            "gate_proj": (self.hidden, self.mlp, IN_OUT),
            "up_proj": (self.hidden, self.mlp, IN_OUT),
            "down_proj": (self.mlp, self.hidden, OUT_IN),
        }


MODELS = {
    model.name: model
    for model in (
        Llama3("8B", layers=32, hidden=4096, mlp=14336, heads=32, tensor=2),
        Llama3("70B", layers=80, hidden=8192, mlp=28672, heads=64, tensor=4),
        Llama3("405B", layers=126, hidden=16384, mlp=53248, heads=128, tensor=8),
    )
}


def make_mesh(fsdp: int, tensor: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of the first devices; of JAX's own without any."""
    devices = (jax.devices() if devices is None else devices)[: fsdp * tensor]
    return jax.make_mesh(
        (fsdp, tensor), ("fsdp", "tensor"), (AxisType.Auto, AxisType.Auto), devices=devices
    )


def array(
    mesh: Any, shape: tuple[int, ...], dtype: Any, *split: str | None
) -> jax.ShapeDtypeStruct:
    """A shape and how a mesh holds it; on one device without a mesh."""
    return jax.ShapeDtypeStruct(
        shape, dtype, sharding=mesh and NamedSharding(mesh, PartitionSpec(*split))
    )


def layer_params(model: Llama3, mesh: Any = None) -> dict[str, Any]:
    """Shapes of one layer's parameters."""
    params: dict[str, Any] = {
        name: {"kernel": array(mesh, (into, out), BASE_DTYPE, *split)}
        for name, (into, out, split) in model.kernels.items()
    }
    for name in ("input_layernorm", "post_attention_layernorm"):
        params[name] = {"scale": array(mesh, (model.hidden,), BASE_DTYPE)}
    return params


def outer_params(model: Llama3, mesh: Any = None) -> dict[str, Any]:
    """Shapes of what is no layer's."""
    return {
        "embed_tokens": {
            "embedding": array(mesh, (VOCABULARY, model.hidden), BASE_DTYPE, "tensor", "fsdp")
        },
        "norm": {"scale": array(mesh, (model.hidden,), BASE_DTYPE)},
        "lm_head": {"kernel": array(mesh, (model.hidden, VOCABULARY), BASE_DTYPE, *IN_OUT)},
    }


def tokens(model: Llama3, sequences: int, length: int, mesh: Any = None) -> jax.ShapeDtypeStruct:
    """The array between the layers."""
    return array(mesh, (sequences, length, model.hidden), BASE_DTYPE, *RESIDUAL)


Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""Of q, k and v: [sequence, position, head, width]."""


@jax.checkpoint
def _attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")


def layer(
    model: Llama3, mesh: Any, params: Any, x: jax.Array, attend: Attention = _attend
) -> jax.Array:
    """One layer. Like flash attention, its gradient keeps q, k and v and no scores."""
    split = functools.partial(_split, mesh)
    sequences, length, _ = x.shape

    def heads(y: jax.Array) -> jax.Array:
        return split(y.reshape(sequences, length, -1, HEAD_WIDTH), "fsdp", None, "tensor", None)

    h = split(_rms_norm(x, params["input_layernorm"]["scale"]), *RESIDUAL)
    q, k, v = (heads(h @ params[name]["kernel"]) for name in ("q_proj", "k_proj", "v_proj"))
    mixed = split(attend(_rotate(q), _rotate(k), v).reshape(sequences, length, -1), *WIDE)
    x = split(x + mixed @ params["o_proj"]["kernel"], *RESIDUAL)
    h = split(_rms_norm(x, params["post_attention_layernorm"]["scale"]), *RESIDUAL)
    gate, up = (split(h @ params[name]["kernel"], *WIDE) for name in ("gate_proj", "up_proj"))
    return split(x + (jax.nn.silu(gate) * up) @ params["down_proj"]["kernel"], *RESIDUAL)


def head_loss(params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy after the last layer."""
    logits = (_rms_norm(x, params["norm"]["scale"]) @ params["lm_head"]["kernel"]).astype(
        jnp.float32
    )
    chosen = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return (jax.nn.logsumexp(logits, -1) - chosen).mean()


def _split(mesh: Any, x: jax.Array, *split: str | None) -> jax.Array:
    return (
        x
        if mesh is None
        else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*split)))
    )


def _rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-5)).astype(
        x.dtype
    ) * scale


def _rotate(x: jax.Array) -> jax.Array:
    """Rotary positions."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None, None] * ROPE_BASE ** (-jnp.arange(half) / half)
    sine, cosine = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate(
        [first * cosine - second * sine, second * cosine + first * sine], -1
    ).astype(x.dtype)
