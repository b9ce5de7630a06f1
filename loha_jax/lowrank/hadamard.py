"""The weight update of LoHa, ΔW = (w1_a @ w1_b) ⊙ (w2_a @ w2_b) · scale, and its low-rank form.

Both weight functions are `jax.custom_vjp`: the forward pass keeps only the factors, and the
backward pass recomputes what it needs. Products of bfloat16 and float16 factors are accumulated in
float32.

The Hadamard product of two rank-r matrices is a matrix of rank r² with known factors, the row-wise
and column-wise Khatri-Rao products: ΔW = KA @ KB exactly. `loha_jax.adapt` computes x·ΔW from them
without materialising ΔW.

Source: Hyeon-Woo et al., "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated
Learning", ICLR 2022 (arXiv:2108.06098), and PEFT's `HadaWeight` and `HadaWeightCP`.
"""

# JAX's own functions are only partly typed.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from loha_jax.runtime.device_types import vary_alike
from loha_jax.runtime.promotion import standard_promotion
from loha_jax.runtime.xla_hints import isolated

Scale = Float[Array | np.ndarray, "*#stack"] | float
"""alpha/r: one number, or an array that broadcasts against the stack axes."""

A = TypeVar("A", jax.Array, np.ndarray)


@standard_promotion()
def float32_or_wider(*dtypes: DTypeLike) -> jnp.dtype:
    """Return the dtype to compute in: the common dtype of these, at least float32.

    Float8 counts as float32: JAX does not promote it.
    """
    return jnp.result_type(jnp.float32, *(d for d in dtypes if jnp.dtype(d).itemsize > 1))


def _accumulator(*arrays: jax.Array) -> jnp.dtype:
    return float32_or_wider(*(array.dtype for array in arrays))


def _scaled(product: Float[Array, "*shape"], scale: Scale) -> Float[Array, "*shape"]:
    scale = jnp.asarray(scale, product.dtype)
    return product * scale.reshape(scale.shape + (1,) * (product.ndim - scale.ndim))


def _plain_weight(
    w1_a: Float[Array, "*stack out r1"],
    w1_b: Float[Array, "*stack r1 in"],
    w2_a: Float[Array, "*stack out r2"],
    w2_b: Float[Array, "*stack r2 in"],
    scale: Scale,
) -> Float[Array, "*stack out in"]:
    dtype = _accumulator(w1_a, w1_b, w2_a, w2_b)
    # [*stack, out, r] @ [*stack, r, in] -> [*stack, out, in]
    first = jnp.matmul(w1_a, w1_b, preferred_element_type=dtype)
    second = jnp.matmul(w2_a, w2_b, preferred_element_type=dtype)
    return _scaled(first * second, scale).astype(jnp.result_type(w1_a, w1_b, w2_a, w2_b))


def _cp_matrix(
    t: Float[Array, "r r *spatial"],
    w_a: Float[Array, "r out"],
    w_b: Float[Array, "r in"],
    dtype: jnp.dtype,
) -> Float[Array, "out in *spatial"]:
    """Return `w_aᵀ @ t @ w_b` at every position."""
    # [r, r, *spatial] · [r, in] -> [r, in, *spatial] -> [out, in, *spatial]
    inner = jnp.einsum("ij...,jq->iq...", t, w_b, preferred_element_type=dtype)
    return jnp.einsum("iq...,ip->pq...", inner, w_a, preferred_element_type=dtype)


def _plain_weight_cp(
    t1: Float[Array, "*core1"],
    w1_a: Float[Array, "*stack r1 out"],
    w1_b: Float[Array, "*stack r1 in"],
    t2: Float[Array, "*core2"],
    w2_a: Float[Array, "*stack r2 out"],
    w2_b: Float[Array, "*stack r2 in"],
    scale: Scale,
) -> Float[Array, "*shape"]:
    factors = (t1, w1_a, w1_b, t2, w2_a, w2_b)
    dtype = _accumulator(*factors)

    def one(*factors: jax.Array) -> jax.Array:
        (t1, w1_a, w1_b), (t2, w2_a, w2_b) = factors[:3], factors[3:]
        return _cp_matrix(t1, w1_a, w1_b, dtype) * _cp_matrix(t2, w2_a, w2_b, dtype)

    for _ in range(w1_a.ndim - 2):  # each takes one stack axis away
        one = jax.vmap(one)
    # [*stack, out, in, *spatial]
    return _scaled(one(*factors), scale).astype(jnp.result_type(*factors))


def _recompute_vjp(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Return `fn` as a `custom_vjp` that keeps only its arguments and runs again backwards."""
    fn = standard_promotion()(fn)  # derivatives are traced later, where the caller's settings hold
    wrapped = cast(Any, jax.custom_vjp(fn))

    def forward(*args: object) -> tuple[jax.Array, tuple[object, ...]]:
        return fn(*args), args

    def recompute(args: tuple[object, ...], cotangent: jax.Array) -> tuple[object, ...]:
        return cast(tuple[object, ...], jax.vjp(fn, *args)[1](cotangent))

    @standard_promotion()
    def backward(args: tuple[object, ...], cotangent: jax.Array) -> tuple[object, ...]:
        return isolated(recompute, (args, cotangent), cast(jax.Array, args[0]))

    def recomputing(*args: object) -> jax.Array:
        return wrapped(*vary_alike(args))

    wrapped.defvjp(forward, backward)
    return recomputing


_weight = _recompute_vjp(_plain_weight)
_weight_cp = _recompute_vjp(_plain_weight_cp)


@standard_promotion()
def hada_weight(
    w1_a: jax.Array,
    w1_b: jax.Array,
    w2_a: jax.Array,
    w2_b: jax.Array,
    scale: Scale = 1.0,
    *,
    forward_mode: bool = False,
) -> jax.Array:
    """Return (w1_a @ w1_b) ⊙ (w2_a @ w2_b) · scale, the update of a linear weight.

    A convolution without cores is linear in this sense: its in axis is in·prod(spatial) long.

    Args:
        w1_a, w2_a: `[*stack, out, r]`.
        w1_b, w2_b: `[*stack, r, in]` (for a flat convolution `[r, in·kh·kw]`).
        scale: alpha/r, a number or an array that broadcasts against the stack axes (shape `()` or
            `[*stack]`).
        forward_mode: plain products that `jax.jvp` can differentiate, instead of a `custom_vjp`.

    Returns:
        `[*stack, out, in]` in the factors' common dtype; products of lower precision accumulate in
        float32.

    Raises:
        ValueError: the shapes do not fit together.

    Mirrors PEFT's `HadaWeight.apply(w1a, w1b, w2a, w2b, scale)`, values and gradients. The gradient
    with respect to `scale`, which PEFT leaves out, is there too.

    Example:
        >>> a, b = jnp.ones((4, 2)), jnp.ones((2, 3))
        >>> hada_weight(a, b, a, b, 0.5)[0, 0].item()
        2.0
    """
    _check_shapes(w1_a=w1_a, w1_b=w1_b, w2_a=w2_a, w2_b=w2_b)
    return (_plain_weight if forward_mode else _weight)(w1_a, w1_b, w2_a, w2_b, scale)


@standard_promotion()
def hada_weight_cp(
    t1: jax.Array,
    w1_a: jax.Array,
    w1_b: jax.Array,
    t2: jax.Array,
    w2_a: jax.Array,
    w2_b: jax.Array,
    scale: Scale = 1.0,
    *,
    forward_mode: bool = False,
) -> jax.Array:
    """Return the update of a convolution with cores ("effective" or CP form).

    Each of the two factors is, at every kernel position, `w_aᵀ @ t[:, :, position] @ w_b`.

    Args:
        t1, t2: `[*stack, r, r, *spatial]`.
        w1_a, w2_a: `[*stack, r, out]`.
        w1_b, w2_b: `[*stack, r, in]`.
        scale: alpha/r, a number or an array that broadcasts against the stack axes.
        forward_mode: plain products that `jax.jvp` can differentiate, instead of a `custom_vjp`.

    Returns:
        `[*stack, out, in, *spatial]` in the factors' common dtype.

    Raises:
        ValueError: the shapes do not fit together.

    Mirrors the value of PEFT's `HadaWeightCP.apply(t1, w1a, w1b, t2, w2a, w2b, scale)`. Up to PEFT
    0.21.2 its backward pass returns wrong gradients for w1a and w2a: each contracts the other
    pair's core. These are the true ones.

    Example:
        >>> one = jnp.ones((2, 3)); t = jnp.ones((2, 2, 3, 3))
        >>> hada_weight_cp(t, one, one, t, one, one).shape
        (3, 3, 3, 3)
    """
    for name, t, w_a, w_b in (("1", t1, w1_a, w1_b), ("2", t2, w2_a, w2_b)):
        n = w_a.ndim - 2
        if not (
            n >= 0
            and w_b.ndim == w_a.ndim
            and t.ndim > w_a.ndim
            and t.shape[: n + 2] == (*w_a.shape[: n + 1], w_b.shape[n])
        ):
            raise ValueError(
                f"hada_t{name} {t.shape}, hada_w{name}_a {w_a.shape} and hada_w{name}_b "
                f"{w_b.shape} do not fit: expected [r, r, *spatial], [r, out] and [r, in]"
            )
    if (
        w1_a.shape[-1] != w2_a.shape[-1]
        or w1_b.shape[-1] != w2_b.shape[-1]
        or t1.shape[w1_a.ndim :] != t2.shape[w1_a.ndim :]
    ):
        raise ValueError(
            f"The two factors differ in shape: out {w1_a.shape[-1]} and {w2_a.shape[-1]}, in "
            f"{w1_b.shape[-1]} and {w2_b.shape[-1]}, spatial {t1.shape[w1_a.ndim :]} and "
            f"{t2.shape[w1_a.ndim :]}"
        )
    return (_plain_weight_cp if forward_mode else _weight_cp)(t1, w1_a, w1_b, t2, w2_a, w2_b, scale)


def khatri_rao_rows(
    w1_a: Float[A, "*stack out r1"], w2_a: Float[A, "*stack out r2"]
) -> Float[A, "*stack out r1*r2"]:
    """Return the row-wise Khatri-Rao product.

    With `khatri_rao_columns` it is the exact low-rank form of the update:
    `(w1_a @ w1_b) * (w2_a @ w2_b) == khatri_rao_rows(w1_a, w2_a) @ khatri_rao_columns(w1_b, w2_b)`.

    The result of numpy arrays is one.

    Example:
        >>> khatri_rao_rows(jnp.ones((5, 2)), jnp.ones((5, 3))).shape
        (5, 6)
    """
    product = w1_a[..., :, :, None] * w2_a[..., :, None, :]  # [*stack, out, r1, r2]
    return product.reshape(*product.shape[:-2], -1)


def khatri_rao_columns(
    w1_b: Float[Array, "*stack r1 in"], w2_b: Float[Array, "*stack r2 in"]
) -> Float[Array, "*stack r1*r2 in"]:
    """Return the column-wise Khatri-Rao product; see `khatri_rao_rows`.

    Example:
        >>> khatri_rao_columns(jnp.ones((2, 5)), jnp.ones((3, 5))).shape
        (6, 5)
    """
    product = w1_b[..., :, None, :] * w2_b[..., None, :, :]  # [*stack, r1, r2, in]
    return product.reshape(*product.shape[:-3], -1, product.shape[-1])


def multiply_core(
    core: Float[Array, "*core"], w_b: Float[Array, "*stack r in"], dtype: DTypeLike
) -> Float[Array, "*stack r flat"]:
    """Return w_b of the flat form that equals one with cores, of the same rank: t times w_b.

    Args:
        core: `[*stack, r, r, *spatial]`.
        w_b: `[*stack, r, in]`.
        dtype: to compute in.

    Returns:
        `[*stack, r, in·prod(spatial)]`. w_a of the flat form is the transposed w_a.
    """
    core = core.astype(dtype).reshape(*core.shape[: w_b.ndim], -1)  # [*stack, r, r, prod(spatial)]
    product = jnp.einsum("...pqk,...qi->...pik", core, w_b.astype(dtype))
    return product.reshape(*product.shape[:-2], -1)


def _check_shapes(*, w1_a: jax.Array, w1_b: jax.Array, w2_a: jax.Array, w2_b: jax.Array) -> None:
    for name, a, b in (("1", w1_a, w1_b), ("2", w2_a, w2_b)):
        if (
            a.ndim < 2
            or b.ndim != a.ndim
            or a.shape[-1] != b.shape[-2]
            or a.shape[:-2] != b.shape[:-2]
        ):
            raise ValueError(
                f"hada_w{name}_a {a.shape} and hada_w{name}_b {b.shape} do not fit: "
                "expected [out, r] and [r, in]"
            )
    if w1_a.shape[:-1] != w2_a.shape[:-1] or w1_b.shape[-1] != w2_b.shape[-1]:
        raise ValueError(
            f"The two factors differ in shape: {w1_a.shape[:-1]} x {w1_b.shape[-1]} and "
            f"{w2_a.shape[:-1]} x {w2_b.shape[-1]}"
        )
