"""Initial values of the factors: PEFT's law, LyCORIS' law, a calibrated one, and PEFT's all-random.

Every draw depends only on the key and on the module's name: not on the order of the tree, the
adapter's name, or whether a layer is part of a stack.
"""

# JAX's own functions are only partly typed.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt32

CALIBRATED = ("calibrated", "abba")
"""The named values whose first steps move ΔW as LoRA's do."""

INIT_SCHEMES = ("lycoris", *CALIBRATED)
"""Named values that `LoHaConfig.init_weights` takes besides True and False."""

FACTOR_NAMES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")

_Draw = Literal["uniform", "normal", "signs"]

_LYCORIS_RANDOM = "lycoris, all random"

_LYCORIS_STD = {"a": 0.1, "b": 1.0, "t": 0.1}

_SMALLEST = 2**14
"""Values of the smallest flat draw: under a millisecond, and enough for r=8 of 2048 features."""


def factor_shapes(
    out: int, in_: int, spatial: Sequence[int], r: int, cp: bool
) -> dict[str, tuple[int, ...]]:
    """Return PEFT's shapes of one module's factors.

    Flat (linear, and convolutions without cores): w*_a `[out, r]`, w*_b `[r, in·prod(spatial)]`.
    With cores (`cp`): w*_a `[r, out]`, w*_b `[r, in]`, t* `[r, r, *spatial]`, where a Conv1d core
    has a trailing axis of 1.

    Example:
        >>> factor_shapes(out=5, in_=3, spatial=(), r=2, cp=False)["hada_w1_b"]
        (2, 3)
    """
    if not cp:
        a, b = (out, r), (r, in_ * math.prod(spatial))
        return {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b}
    core = (r, r, *spatial, *((1,) if len(spatial) == 1 else ()))
    a, b = (r, out), (r, in_)
    return {
        "hada_w1_a": a,
        "hada_w1_b": b,
        "hada_w2_a": a,
        "hada_w2_b": b,
        "hada_t1": core,
        "hada_t2": core,
    }


def init_factors(
    key: jax.Array | np.ndarray,
    module_names: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    init_weights: bool | str,
    dtype: DTypeLike,
    stack: Sequence[int] | None = None,
    *,
    only: str | None = None,
) -> dict[str, jax.Array]:
    """Draw the factors of several modules of equal shape, stacked: `[*stack, *shape]` each.

    Few programs are compiled: a factor is the beginning of a flat draw of one of a few sizes, which
    all shapes share.

    Args:
        key: a JAX PRNG key; the same key and name give the same values.
        module_names: torch module names.
        shapes: from `factor_shapes`.
        init_weights: True: PEFT's law, uniform in ±1/√fan_in where fan_in is the factor's second
            dimension times the spatial ones (torch's `kaiming_uniform_(a=√5)`), with w2_b zero.
            False: the same with w2_b random too. "lycoris": normal with standard deviation 0.1 for
            w1_a and the cores, 1 for w*_b, and w2_a zero. "lycoris, all random": the same with w2_a
            as w1_a, for an update that a scalar makes zero. "calibrated": w1_a w1_b has entries of
            mean square 1, w2_b is LoRA's A (uniform in ±1/√fan_in), and w2_a is zero, as LoRA's B.
            "abba": the same; `singular_pair` then replaces the first pair.
        dtype: of the factors.
        stack: shape of the stack axes, whose product is the number of modules; by default one axis.
        only: the one factor to draw; by default all.
    """
    digests = [hashlib.sha256(name.encode()).digest() for name in module_names]
    seeds = np.array(
        [[int.from_bytes(d[:4], "big"), int.from_bytes(d[4:8], "big")] for d in digests], np.uint32
    )
    stack = (len(module_names),) if stack is None else tuple(stack)
    key = jnp.asarray(key) if isinstance(key, np.ndarray) else key
    traced = any(isinstance(array, Tracer) for array in (key, jax.device_put(seeds)))
    zero = {True: "hada_w2_b", False: None, _LYCORIS_RANDOM: None}
    factors: dict[str, jax.Array] = {}
    for name, shape in shapes.items():
        if name != (only or name):
            continue
        full = (*stack, *shape)
        if name == zero.get(init_weights, "hada_w2_a"):
            factors[name] = jnp.zeros(full, dtype) if traced else _put(np.zeros(full, dtype), key)
            continue
        size = math.prod(shape)
        how, std = _law(name, shapes, init_weights)
        flat = cast(
            jax.Array,
            _draw(
                key,
                seeds,
                np.uint32(FACTOR_NAMES.index(name)),
                np.asarray(1 / math.sqrt(math.prod(shape[1:])), dtype),
                size=size if traced and _begins_alike(key) else max(_SMALLEST, _power_of_two(size)),
                dtype=jnp.dtype(dtype),
                how=how,
                std=std,
                at_once=_begins_alike(key),
            ),
        )  # [modules, at least size]
        if traced or not flat.is_fully_addressable:
            factors[name] = flat[:, :size].reshape(full)
        else:  # on the host, where no program is compiled for a shape
            factors[name] = _put(jax.device_get(flat)[:, :size].reshape(full), key)
    return factors


def _law(
    name: str, shapes: Mapping[str, tuple[int, ...]], init_weights: bool | str
) -> tuple[_Draw, float]:
    """Return how a factor is drawn, and its standard deviation unless it is uniform."""
    core = name.startswith("hada_t")
    if not isinstance(init_weights, str):
        return "uniform", 0.0
    if init_weights not in CALIBRATED:
        return "normal", _LYCORIS_STD["t" if core else name[-1]]
    if name == "hada_w2_b":
        return "uniform", 0.0
    if name == "hada_t2":  # each row of t2 w2_b has the variance of LoRA's A, 1 / (3 fan_in)
        return "signs", 1 / math.sqrt(math.prod(shapes[name][1:]))
    # An entry of w1_a w1_b is a sum of r products of two numbers; with a core, of r² of three. A
    # core has few numbers: as signs they have the same mean square in every draw.
    std = shapes["hada_w1_b"][0] ** (-1 / 3 if "hada_t1" in shapes else -1 / 4)
    return ("signs" if core else "normal"), std


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _begins_alike(key: jax.Array) -> bool:
    """Return whether flat draws of all sizes, of several keys too, begin with the same values."""
    counted = getattr(jax.config, "jax_threefry_partitionable", True)
    return bool(counted) and str(jax.random.key_impl(key)) == "threefry2x32"


def _put(array: np.ndarray, key: jax.Array) -> jax.Array:
    """Return an array on the device, that of the key if it is committed to one."""
    return jax.device_put(array, key.sharding if key.committed else None)


@functools.partial(jax.jit, static_argnames=("size", "dtype", "how", "std", "at_once"))
def _draw(
    key: jax.Array,
    seeds: UInt32[Array, "modules 2"],
    index: UInt32[Array, ""],
    bound: Float[Array, ""],
    *,
    size: int,
    dtype: jnp.dtype,
    how: _Draw,
    std: float,
    at_once: bool,
) -> Float[Array, "modules {size}"]:
    """Draw one factor of each module: normal, random signs times `std`, or uniform in ±bound.

    `std` is static because XLA rounds its product otherwise where it is not a constant.
    """

    def one(seed: UInt32[Array, "2"]) -> Float[Array, "values"]:
        module_key = jax.random.fold_in(jax.random.fold_in(key, seed[0]), seed[1])
        factor_key = jax.random.fold_in(module_key, index)
        if how == "normal":
            return std * jax.random.normal(factor_key, (size,), dtype)
        if how == "signs":
            return std * jax.random.rademacher(factor_key, (size,), dtype)
        return jax.random.uniform(factor_key, (size,), dtype, -bound, bound)

    # The values of other kinds of keys depend on what is drawn besides them.
    return cast(jax.Array, jax.vmap(one)(seeds) if at_once else jax.lax.map(one, seeds))
