"""The dtype that an update is computed in."""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from loha_jax.lowrank.hadamard import float32_or_wider
from loha_jax.runtime.promotion import standard_promotion
from loha_jax.transform.packed_kernel import PackedKernel

ComputeDtype = Literal["auto", "input", "float32"]
"""A rule. "float32": float32 or wider, as PEFT computes. "input": the product's dtype (the common
one of input and kernel), if it is bfloat16 or float16, as JAX's LoRA libraries do. "auto":
"float32" on CPU, "input" elsewhere."""

COMPUTE_DTYPES: tuple[ComputeDtype, ...] = get_args(ComputeDtype)


@standard_promotion()
def dtype_of_update(
    rule: ComputeDtype, x: DTypeLike, kernel: jax.Array | PackedKernel, *factors: DTypeLike
) -> jnp.dtype:
    """Return the dtype of an update's products, for an input, a kernel and factors.

    A quantised kernel is dequantised to whatever the product needs, and does not count. Neither
    does float8, which JAX does not promote. Products in bfloat16 and float16 are accumulated in
    float32.
    """
    if rule == "auto":
        rule = "float32" if jax.default_backend() == "cpu" else "input"
    counts = not isinstance(kernel, PackedKernel) and jnp.dtype(kernel.dtype).itemsize > 1
    common = jnp.result_type(x, kernel.dtype) if counts else jnp.dtype(x)
    narrow = common in (jnp.bfloat16, jnp.float16)
    return common if narrow and rule == "input" else float32_or_wider(x, *factors)


def with_update(base: jax.Array, update: jax.Array) -> jax.Array:
    """Return the sum: of one dtype in that dtype, of others in float32 or wider.

    A sum of two bfloat16 in float32, rounded, is the same. But XLA's compiler for GPUs adds to a
    product in the product's own kernel only where all have one dtype.
    """
    if base.dtype == update.dtype:
        return base + update
    wide = float32_or_wider(base.dtype, update.dtype)
    return base.astype(wide) + update.astype(wide)
