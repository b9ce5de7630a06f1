"""Initial values of the factors: PEFT's law, LyCORIS' law, and PEFT's all-random one.

Every draw depends on the key and on the module's name alone: not on the order of the tree, the adapter's name, or
whether a layer stands alone or in a stack.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

INIT_SCHEMES = ("lycoris",)
"""Named values that `LoHaConfig.init_weights` takes beside True and False."""

FACTOR_NAMES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")

_LYCORIS_RANDOM = "lycoris, all random"

_LYCORIS_STD = {"a": 0.1, "b": 1.0, "t": 0.1}


def factor_shapes(out: int, in_: int, spatial: Sequence[int], r: int, cp: bool) -> dict[str, tuple[int, ...]]:
    """PEFT's shapes of one module's factors.

    Flat (linear, and convolutions without cores): w*_a `[out, r]`, w*_b `[r, in·prod(spatial)]`. With cores (`cp`):
    w*_a `[r, out]`, w*_b `[r, in]`, t* `[r, r, *spatial]`, where a Conv1d core has a trailing axis of 1.
    """
    if not cp:
        a, b = (out, r), (r, in_ * math.prod(spatial))
        return {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b}
    core = (r, r, *spatial, *((1,) if len(spatial) == 1 else ()))
    a, b = (r, out), (r, in_)
    return {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b, "hada_t1": core, "hada_t2": core}


def init_factors(
    key: jax.Array,
    module_names: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    init_weights: bool | str,
    dtype: jnp.dtype,
) -> dict[str, jax.Array]:
    """The factors of several modules of equal shape, stacked: each array is `[len(module_names), *shape]`.

    Args:
        key: a JAX PRNG key; the same key and name give the same values.
        module_names: torch module names.
        shapes: from `factor_shapes`.
        init_weights: True: PEFT's law, uniform in ±1/√fan_in where fan_in is the factor's second dimension times the
            spatial ones (torch's `kaiming_uniform_(a=√5)`), with w2_b zero. False: the same with w2_b random too.
            "lycoris": normal with standard deviation 0.1 for w1_a and the cores, 1 for w*_b, and w2_a zero. "lycoris,
            all random": the same with w2_a as w1_a, for an update that a scalar makes zero.
        dtype: of the factors.
    """
    digests = [hashlib.sha256(name.encode()).digest() for name in module_names]
    seeds = np.array([[int.from_bytes(d[:4], "big"), int.from_bytes(d[4:8], "big")] for d in digests], np.uint32)
    return _init(key, seeds, shapes=tuple(shapes.items()), init_weights=init_weights, dtype=jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnames=("shapes", "init_weights", "dtype"))
def _init(key, seeds, *, shapes, init_weights, dtype):
    zero = {True: "hada_w2_b", False: None, "lycoris": "hada_w2_a", _LYCORIS_RANDOM: None}[init_weights]

    def one(seed):
        module_key = jax.random.fold_in(jax.random.fold_in(key, seed[0]), seed[1])
        factors = {}
        for name, shape in shapes:
            factor_key = jax.random.fold_in(module_key, FACTOR_NAMES.index(name))
            if name == zero:
                factors[name] = jnp.zeros(shape, dtype)
            elif init_weights in ("lycoris", _LYCORIS_RANDOM):
                std = _LYCORIS_STD["t" if name.startswith("hada_t") else name[-1]]
                factors[name] = std * jax.random.normal(factor_key, shape, dtype)
            else:
                bound = 1 / math.sqrt(math.prod(shape[1:]))
                factors[name] = jax.random.uniform(factor_key, shape, dtype, -bound, bound)
        return factors

    return jax.vmap(one)(seeds)
