"""The layers that `python -m benchmarks accelerators` compiles, as shapes."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import llama3
from benchmarks.accelerator_compilers import MESHES, tpus

TOKENS = 4096
WIDTHS = ((1024, 1024), (2048, 2048), (4096, 4096), (4096, 14336))

Layer = Callable[[Any, jax.Array], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraKernel:
    """A kernel [..., in, out] with a LoRA: a [..., in, k], b [k, out].

    That of a convolution is another one to k channels and one of size 1 from there, as in PEFT.
    """

    kernel: jax.Array
    a: jax.Array
    b: jax.Array

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        return x @ self.kernel + (x @ self.a.astype(x.dtype)) @ self.b.astype(x.dtype)


class Case(NamedTuple):
    """A layer to compile.

    Attributes:
        name: in the tables.
        layer: a function of parameters and input.
        params: shapes, a dictionary of modules with a "kernel" each for those that are adapted.
        x, result: shapes of the input and of the result.
        training: whether gradients are computed.
        only_tpus: whether it has a kernel for TPUs.
        mesh: what its shapes are split over.
    """

    name: str
    layer: Layer
    params: Any
    x: jax.ShapeDtypeStruct
    result: jax.ShapeDtypeStruct
    training: bool = True
    only_tpus: bool = False
    mesh: Mesh | None = None


def cases(kind: str, quick: bool) -> Iterator[Case]:
    """Return the layers for a kind of device; a small one where it has to be quick."""
    for into, out in ((256, 256),) if quick else WIDTHS:
        yield linear(into, out, TOKENS, training=True)
    if quick:
        return
    for tokens in (1, 8):
        yield linear(4096, 4096, tokens, training=False)
    yield resnet_block()
    model = llama3.MODELS["8B"]
    yield llama_layer(model, TOKENS)
    if kind in MESHES:
        yield llama_layer(model, TOKENS, llama3.make_mesh(4, 4, tpus(MESHES[kind])))


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


def llama_layer(model: llama3.Llama3, length: int, mesh: Mesh | None = None) -> Case:
    """Return a layer of Llama-3 with flash attention, recomputed in its backward pass.

    On a mesh there is one sequence for each index of the axis "fsdp".
    """
    heads = PartitionSpec("fsdp", None, "tensor", None)
    attend = mesh and jax.shard_map(
        _flash, mesh=mesh, in_specs=heads, out_specs=heads, check_vma=False
    )
    layer = functools.partial(llama3.layer, model, mesh, attend=attend or _flash)
    x = llama3.tokens(model, mesh.shape["fsdp"] if mesh else 1, length, mesh)
    params = llama3.layer_params(model, mesh)
    name = f"Llama-3-{model.name} layer, {length} tokens"
    if mesh:
        name += f", mesh of {mesh.shape['fsdp']}x{mesh.shape['tensor']}"
    return Case(name, jax.checkpoint(layer), params, x, x, only_tpus=True, mesh=mesh)


def resnet_block() -> Case:
    """Return a block of SDXL's U-Net: three convolutions, of 3x3 and of 1x1."""
    into, out = 320, 640
    params: dict[str, Any] = {
        "conv1": {"kernel": _half(3, 3, into, out)},
        "conv2": {"kernel": _half(3, 3, out, out)},
        "shortcut": {"kernel": _half(1, 1, into, out)},
        "norm1": {"scale": _half(into), "bias": _half(into)},
        "norm2": {"scale": _half(out), "bias": _half(out)},
    }

    def activated(params: Any, x: jax.Array) -> jax.Array:
        norm = nn.GroupNorm(num_groups=32, dtype=x.dtype)
        return jax.nn.silu(cast(jax.Array, norm.apply({"params": params}, x)))

    def layer(params: Any, x: jax.Array) -> jax.Array:
        y = _convolve(activated(params["norm1"], x), params["conv1"]["kernel"])
        y = _convolve(activated(params["norm2"], y), params["conv2"]["kernel"])
        return y + _convolve(x, params["shortcut"]["kernel"])

    name = f"ResNet block {into}->{out}, 4 images of 64x64"
    return Case(name, layer, params, _half(4, 64, 64, into), _half(4, 64, 64, out))


def _convolve(x: jax.Array, kernel: Any) -> jax.Array:
    if isinstance(kernel, LoraKernel):
        low = _convolve(x, kernel.a.astype(x.dtype))
        return _convolve(x, kernel.kernel) + low @ kernel.b.astype(x.dtype)
    axes = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=axes)


def lora_factors(
    kernel: jax.ShapeDtypeStruct, rank: int
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Return the shapes of a LoRA's a and b, each axis split as the kernel's, the rank whole."""
    *inner, out = kernel.shape
    a, b = (*inner, rank), (rank, out)
    if not isinstance(kernel.sharding, NamedSharding):
        return jax.ShapeDtypeStruct(a, jnp.float32), jax.ShapeDtypeStruct(b, jnp.float32)
    mesh, (*inner_split, out_split) = kernel.sharding.mesh, kernel.sharding.spec
    return (
        llama3.array(mesh, a, jnp.float32, *inner_split, None),
        llama3.array(mesh, b, jnp.float32, None, out_split),
    )


def _flash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Return attention of [sequence, position, head, width]; queries share keys and values."""
    repeats = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(y, repeats, 2) for y in (k, v))
    q, k, v = (jnp.swapaxes(y, 1, 2) for y in (q, k, v))
    return jnp.swapaxes(flash_attention(q, k, v, causal=True, sm_scale=q.shape[-1] ** -0.5), 1, 2)


def _half(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)
