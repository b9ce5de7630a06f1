"""ABBA's first pair of factors: the largest singular vectors of the kernel.

ABBA (Singhal et al., ICLR 2026, arXiv:2505.14238) starts a LoHa with w1_a w1_b = the best
approximation of the base weight by a matrix of rank r. Here the product is scaled to entries of
mean square 1, as for "calibrated", so that the first steps do not depend on the kernel's size.
"""

# JAX's own functions are only partly typed.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from loha_jax.lowrank.hadamard import float32_or_wider
from loha_jax.lowrank.layout import Layout
from loha_jax.lowrank.truncated_svd import largest_singular_values, precise_product
from loha_jax.runtime.device_types import explicit_sharding

Factor = Float[Array, "..."]


def singular_pair(
    kernel: jax.Array, layout: Layout, drawn: Mapping[str, jax.Array], ranks: Sequence[int]
) -> dict[str, jax.Array]:
    """Return the first pair of factors (and its core) from the singular vectors of a kernel.

    The vectors are found by randomised subspace iteration, in float32 or wider, on the devices of
    the kernel. The kernel is multiplied where it lies: only arrays with r + 8 columns are moved.

    Where the kernel has fewer directions than the rank, and where it is zero, the drawn factors
    stay.

    Args:
        kernel: as its layout says.
        layout: of the kernel.
        drawn: all factors of "calibrated", `[*stack, *shape]`, zero beyond a module's rank.
        ranks: of the modules, by stack index.

    Returns:
        hada_w1_a, hada_w1_b and, with cores, hada_t1: w1_a w1_b of each module has entries of mean
        square 1.
    """
    first = {name: x for name, x in drawn.items() if name in ("hada_w1_a", "hada_w1_b", "hada_t1")}
    # An array on one device is read one layer at a time; the shards of others stay where they are.
    traced = isinstance(cast(object, kernel), Tracer)
    one_by_one = not traced and len(jnp.asarray(kernel).devices()) == 1

    def run(kernel: jax.Array, drawn: dict[str, jax.Array]) -> dict[str, jax.Array]:
        options = {"layout": layout, "one_by_one": one_by_one}
        return cast(Any, _pairs)(kernel, drawn, np.asarray(ranks), **options)

    if (sharding := explicit_sharding(kernel)) is not None:
        whole = NamedSharding(sharding.mesh, P())
        return cast(Any, jax.sharding.auto_axes)(run, out_sharding=whole)(kernel, first)
    return run(kernel, first)


@functools.partial(jax.jit, static_argnames=("layout", "one_by_one"))
def _pairs(
    kernel: jax.Array,
    drawn: dict[str, jax.Array],
    ranks: jax.Array,
    *,
    layout: Layout,
    one_by_one: bool,
) -> dict[str, jax.Array]:
    """Return the pairs of all modules."""
    axes = layout.axes("s")
    of_module = layout.in_front(axes).strip(layout.ndim - len(axes))
    dtype = float32_or_wider(kernel.dtype, drawn["hada_w1_a"].dtype)

    def one(
        weight: jax.Array, factors: dict[str, jax.Array], rank: jax.Array
    ) -> dict[str, jax.Array]:
        weight = of_module.unfold(weight)  # [out, in, *spatial]
        factors = {name: x.astype(dtype) for name, x in factors.items()}
        pair = _with_core if "hada_t1" in factors else _flat
        weight = weight.astype(dtype)
        largest = jnp.max(jnp.abs(weight))  # squares of very small or large values are 0 or inf
        return pair(weight / jnp.where(largest > 0, largest, 1), factors, rank)

    def flat(x: jax.Array) -> jax.Array:  # [modules, ...]
        return x.reshape(-1, *x.shape[len(axes) :])

    in_front = jnp.moveaxis(kernel, axes, range(len(axes)))
    modules = (flat(in_front), jax.tree.map(flat, drawn), ranks)

    def one_of(module: tuple[jax.Array, dict[str, jax.Array], jax.Array]) -> dict[str, jax.Array]:
        return one(*module)

    if one_by_one:
        pairs = cast(dict[str, jax.Array], jax.lax.map(one_of, modules))
    else:
        pairs = jax.vmap(one)(*modules)
    return {
        name: x.reshape(drawn[name].shape).astype(drawn[name].dtype) for name, x in pairs.items()
    }


def _flat(
    weight: Float[Array, "out *rest"], drawn: dict[str, Factor], rank: jax.Array
) -> dict[str, Factor]:
    """Return w1_a `[out, r]` and w1_b `[r, in·prod(spatial)]`."""
    a, b = drawn["hada_w1_a"], drawn["hada_w1_b"]
    left, values, right = largest_singular_values(weight.reshape(len(weight), -1), a.shape[1])
    found = (values > 0) & (jnp.arange(len(values)) < rank)
    roots = jnp.sqrt(jnp.where(found, values, 0))
    # Both factors get the same mean square, as Adam moves all entries alike.
    balance = (a.shape[0] / b.shape[1]) ** 0.25
    of_kernel = _calibrated(left * roots * balance, (roots / balance)[:, None] * right)
    a, b = jnp.where(found, of_kernel[0], a), jnp.where(found[:, None], of_kernel[1], b)
    a, b = _calibrated(a, b)
    return {"hada_w1_a": a, "hada_w1_b": b}


def _calibrated(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scale two factors so that their product has entries of mean square 1, or is zero."""
    # ‖ab‖² = sum of (aᵀa) ⊙ (bbᵀ)
    square = jnp.sum(precise_product(a.T, a) * precise_product(b, b.T)) / (a.shape[0] * b.shape[1])
    scale = jnp.where(square > 0, jnp.where(square > 0, square, 1) ** -0.25, 0)
    return a * scale, b * scale


def _with_core(
    weight: Float[Array, "out in *spatial"], drawn: dict[str, Factor], rank: jax.Array
) -> dict[str, Factor]:
    """Return w1_a `[r, out]`, w1_b `[r, in]` and t1 `[r, r, *spatial]`: a Tucker decomposition.

    The vectors are the kernel's largest along its output and its input features (De Lathauwer, De
    Moor and Vandewalle, 2000); the core is the kernel seen through them.
    """
    core = drawn["hada_t1"]
    r, flat = core.shape[0], weight.reshape(*weight.shape[:2], -1)  # [out, in, prod(spatial)]

    def vectors(features: int, name: str) -> tuple[jax.Array, jax.Array]:
        rows = jnp.moveaxis(flat, features, 0).reshape(flat.shape[features], -1)
        found, values, _ = largest_singular_values(rows, r)
        is_real = (values > 0) & (jnp.arange(r) < rank)
        # [r, features], with entries of mean square r^(-2/3)
        unit = found.T * math.sqrt(flat.shape[features]) * r ** (-1 / 3)
        return jnp.where(is_real[:, None], unit, drawn[name]), found.T * is_real[:, None]

    a, left = vectors(0, "hada_w1_a")
    b, right = vectors(1, "hada_w1_b")
    seen = precise_product(left, flat.reshape(len(flat), -1)).reshape(r, *flat.shape[1:])
    seen = jnp.einsum("ric,ji->rjc", seen, right, precision=jax.lax.Precision.HIGHEST)
    mean_square = jnp.mean(seen**2)
    scale = r ** (-1 / 3) / jnp.sqrt(jnp.where(mean_square > 0, mean_square, 1))
    return {
        "hada_w1_a": a,
        "hada_w1_b": b,
        "hada_t1": jnp.where(mean_square > 0, scale * seen.reshape(core.shape), core),
    }
