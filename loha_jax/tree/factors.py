"""`Factors`: one adapter of one kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from loha_jax.lowrank.hadamard import (
    float32_or_wider,
    hada_weight,
    hada_weight_cp,
    khatri_rao_columns,
    khatri_rao_rows,
    multiply_core,
)
from loha_jax.lowrank.initial_values import FACTOR_NAMES
from loha_jax.lowrank.layout import Layout
from loha_jax.lowrank.weight_decomposition import adapted_norms, gain, is_on_out
from loha_jax.targets.config import LoHaConfig
from loha_jax.tree.flat_node import FlatNode, keep, register
from loha_jax.tree.kernel_samples import KernelSample
from loha_jax.tree.provenance import Origin, interned
from loha_jax.tree.short_repr import number_range, rank_range, short_array

EXTRA_NAMES = ("scalar", "dora_scale")
"""Names of the trained arrays that LyCORIS adds to the factors."""

UNTRAINED_NAMES = ("module_index", "gate")
"""Names of the arrays that are not trained."""

_ARRAYS = (*FACTOR_NAMES, *EXTRA_NAMES, *UNTRAINED_NAMES)


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Factors(FlatNode):
    """One adapter of one kernel: PEFT's tensors, in PEFT's shapes, after the kernel's stack axes.

    alpha/r is no array, so no optimizer can change it: it follows from `ranks`, `alphas` and
    `multiplier`. Of the adapter's origin (`config`, `base`) only what computing needs is part of
    the tree's structure.

    Attributes:
        hada_w1_a, hada_w2_a: `[*stack, out, r]`, or `[*stack, r, out]` with cores.
        hada_w1_b, hada_w2_b: `[*stack, r, in·prod(spatial)]`, or `[*stack, r, in]` with cores.
        hada_t1, hada_t2: cores `[*stack, r, r, *spatial]` (Conv1d: a trailing 1), or None.
        ranks, alphas: per stack index, in row-major order (one entry for a kernel that is one
            module). If ranks differ within a stack, the factors are padded with zeros, which
            training leaves at zero. Rank 0 marks an index that the config does not target.
        config: the config that made the adapter.
        scalar: `[*stack]`, one more trained factor of the update (`LycorisConfig.use_scalar`), or
            None.
        dora_scale: `[*stack, out, 1, ...]` or `[*stack, 1, in, 1, ...]`, the trained norms of a
            weight decomposition (`LycorisConfig.weight_decompose`), or None. Zero where the rank is
            0.
        multiplier: the number that `loha_jax.scale` set. It multiplies ΔW; with `dora_scale`, the
            adapted weight's difference from W.
        module_index: integers `[*stack]`, only if alpha/r differs within a stack: the entry of
            `ranks` and `alphas` that each slice has, whatever a scan or vmap takes away. Not
            trained.
        gate: `[*stack]`, one more multiplier that is traced, or None: from `loha_jax.scale` with a
            traced number, and from `loha_jax.dropout` with `dora_scale`. Not trained.
        base: a sample of the kernel that the adapter was made on, or None.
        parts: names of the arrays that the adapter has, though one half of `partition` may hold
            None for them.
    """

    hada_w1_a: Any
    hada_w1_b: Any
    hada_w2_a: Any
    hada_w2_b: Any
    hada_t1: Any = None
    hada_t2: Any = None
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    config: LoHaConfig
    scalar: Any = None
    dora_scale: Any = None
    multiplier: float = 1.0
    module_index: Any = None
    gate: Any = None
    base: KernelSample | None = dataclasses.field(default=None, compare=False)
    parts: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    def __post_init__(self) -> None:
        held = (*FACTOR_NAMES[:4], *self.parts)
        parts = interned(
            *(name for name in _ARRAYS if name in held or getattr(self, name) is not None)
        )
        key = interned(parts, self.ranks, self.alphas, self.multiplier)
        keep(self, parts=parts, _children=tuple(getattr(self, name) for name in parts))
        keep(self, _aux=(key, Origin(self.config, self.base, self.alphas)))

    def __repr__(self) -> str:
        arrays = (f"{name}={short_array(getattr(self, name))}" for name in self.parts)
        return f"Factors({', '.join((self.description, *arrays))})"

    @property
    def description(self) -> str:
        """Rank, alpha and what the adapter has besides the two pairs of factors, on one line."""
        text = f"r={rank_range(self.ranks)} alpha={number_range(self.alphas)}"
        scaled = "" if self.multiplier == 1 else f" scaled by {self.multiplier:g}"
        return text + scaled + "".join(f" + {kind}" for kind in self.extra_kinds)

    @property
    def extra_kinds(self) -> tuple[str, ...]:
        """Kinds of trained arrays besides the two pairs of factors: cores, scalar, norms."""
        kinds = {"cores": "hada_t1", "scalar": "scalar", "norms": "dora_scale"}
        return tuple(kind for kind, name in kinds.items() if name in self.parts)

    @property
    def is_cp(self) -> bool:
        """True if the adapter has cores (`use_effective_conv2d`, for kernels larger than 1)."""
        return self.hada_t1 is not None

    @property
    def tensors(self) -> dict[str, Any]:
        """The factors by PEFT's names."""
        return self._held(FACTOR_NAMES)

    @property
    def trained(self) -> dict[str, Any]:
        """All trained arrays: the factors and what LyCORIS adds to them."""
        return self._held((*FACTOR_NAMES, *EXTRA_NAMES))

    @property
    def untrained(self) -> dict[str, Any]:
        """The arrays that are not trained."""
        return self._held(UNTRAINED_NAMES)

    @property
    def arrays(self) -> dict[str, Any]:
        """All arrays, trained or not, by name."""
        return self._held(_ARRAYS)

    def _held(self, names: Iterable[str]) -> dict[str, Any]:
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def stack(self) -> tuple[int, ...]:
        """The stack axes that the factors have now; a scan or vmap takes some away."""
        return tuple(self.hada_w1_a.shape[:-2])

    @property
    def scaling(self) -> jax.Array:
        """alpha/r times the number that `scale` set: the multiplier without the scalar.

        `[*stack]`, the stack axes that the factors have now.
        """
        scaling = self._alpha_over_r()
        return scaling if self.dora_scale is not None else self._with_multiplier(scaling)

    @property
    def strength(self) -> jax.Array:
        """The share of W' - W that counts, `[*stack]`, for a weight decomposition.

        It is 0 for modules that are not adapted.
        """
        strength = jnp.ones(self.stack, float32_or_wider(self.hada_w1_a.dtype))
        if 0 in self.ranks:  # norms of zero mark these modules
            norms = lax.stop_gradient(self.dora_scale)
            strength *= (norms != 0).any(tuple(range(len(self.stack), norms.ndim)))
        return self._with_multiplier(strength)

    def _with_multiplier(self, x: jax.Array) -> jax.Array:
        x = x if self.multiplier == 1 else x * self.multiplier
        return x if self.gate is None else x * lax.stop_gradient(self.gate).astype(x.dtype)

    def _alpha_over_r(self) -> jax.Array:
        """Return alpha/r of the modules of the stack that are left, `[*stack]`.

        Where the rank is 0 the factors are zero, and any number will do.
        """
        dtype = float32_or_wider(self.hada_w1_a.dtype)
        ratios = [a / r if r else 0.0 for a, r in zip(self.alphas, self.ranks, strict=True)]
        distinct = {ratio for ratio, r in zip(ratios, self.ranks, strict=True) if r}
        if len(distinct) < 2:
            return jnp.full(self.stack, distinct.pop() if distinct else 0.0, dtype)
        table = np.asarray(ratios, dtype)
        if self.module_index is not None:
            return jnp.asarray(table)[self.module_index]
        if len(ratios) != np.prod(self.stack, dtype=int):
            raise ValueError(
                f"alpha/r differs within a stack of {len(ratios)} modules, the factors have been "
                f"cut to the stack axes {self.stack}, and nothing says which modules are left: "
                "`module_index` is missing."
            )
        return jnp.asarray(table.reshape(self.stack))

    @property
    def scale(self) -> jax.Array:
        """The multiplier of the factors' product: `scaling`, times the scalar. `[*stack]`."""
        scaling = self.scaling
        return scaling if self.scalar is None else scaling * self.scalar.astype(scaling.dtype)

    def delta(self, *, forward_mode: bool = False) -> jax.Array:
        """Compute ΔW in torch's orientation.

        Its shape is `[*stack, out, in·prod(spatial)]`, or `[*stack, out, in, *spatial]` with cores.

        The result has at least float32; see `hada_weight` and `hada_weight_cp`.
        """
        pairs = self.pairs()
        if not self.is_cp:
            return hada_weight(*pairs, self.scale, forward_mode=forward_mode)
        w1_a, w1_b, w2_a, w2_b = pairs
        t1, t2 = (t.astype(w1_a.dtype) for t in (self.hada_t1, self.hada_t2))
        return hada_weight_cp(t1, w1_a, w1_b, t2, w2_a, w2_b, self.scale, forward_mode=forward_mode)

    def pairs(self) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Return w1_a, w1_b, w2_a and w2_b in float32 or wider."""
        dtype = float32_or_wider(self.hada_w1_a.dtype)
        w1_a, w1_b, w2_a, w2_b = (getattr(self, name).astype(dtype) for name in FACTOR_NAMES[:4])
        return w1_a, w1_b, w2_a, w2_b

    def khatri_rao(self) -> tuple[jax.Array, jax.Array]:
        """Return KA `[*stack, out, r²]` and KB `[*stack, r², in]`; ΔW is their scaled product."""
        w1_a, w1_b, w2_a, w2_b = self.flat().pairs()
        return khatri_rao_rows(w1_a, w2_a), khatri_rao_columns(w1_b, w2_b)

    def gains(self, kernel: jax.Array, layout: Layout) -> tuple[jax.Array, jax.Array] | None:
        """Return the multipliers of ΔW and of W in a weight decomposition; None without one.

        The adapter's whole update is `first * ΔW + second * W`, with g = dora_scale/‖W + ΔW‖ and
        the strength m: first = m g and second = m (g - 1).

        Args:
            kernel: as the layout says.
            layout: of the kernel.

        Returns:
            Two arrays of the shape of `dora_scale`.
        """
        if self.dora_scale is None:
            return None
        stack, f = self.hada_w1_a.ndim - 2, self.flat()
        on_out = is_on_out(self.dora_scale.shape, layout.torch_shape(kernel.shape), stack)
        factors = (f.hada_w1_a, f.hada_w1_b, f.hada_w2_a, f.hada_w2_b)
        norms = adapted_norms(kernel, layout, *factors, self.scale, on_out=on_out)
        g = gain(norms, self.dora_scale)
        m = self.strength.astype(g.dtype).reshape(*g.shape[:stack], *(1,) * (g.ndim - stack))
        return m * g, m * (g - 1)

    def flat(self) -> Factors:
        """Return the same update without cores.

        They are multiplied into w*_b, exactly and at the same rank.
        """
        if not self.is_cp:
            return self
        dtype = float32_or_wider(self.hada_w1_a.dtype)
        return dataclasses.replace(
            self,
            hada_w1_a=jnp.swapaxes(self.hada_w1_a, -1, -2),
            hada_w2_a=jnp.swapaxes(self.hada_w2_a, -1, -2),
            hada_w1_b=multiply_core(self.hada_t1, self.hada_w1_b, dtype),
            hada_w2_b=multiply_core(self.hada_t2, self.hada_w2_b, dtype),
            hada_t1=None,
            hada_t2=None,
            parts=(),
        )


def module_index(
    ranks: Sequence[int], alphas: Sequence[float], stack: Sequence[int]
) -> jax.Array | None:
    """Return `Factors.module_index` of a new adapter: None if all modules have one alpha/r.

    Args:
        ranks, alphas: per stack index.
        stack: sizes of the kernel's stack axes.
    """
    if len({a / r for a, r in zip(alphas, ranks, strict=True) if r}) < 2:
        return None
    return jnp.arange(len(ranks), dtype=jnp.int32).reshape(tuple(stack))


def norms_of_adapted(
    dora_scale: jax.Array, ranks: Sequence[int], stack: Sequence[int]
) -> jax.Array:
    """Return the norms of a weight decomposition, with zeros for modules of rank 0."""
    if 0 not in ranks:
        return dora_scale
    adapted = np.asarray(ranks).reshape(*stack, *(1,) * (dora_scale.ndim - len(stack))) > 0
    return jnp.where(adapted, dora_scale, 0)


def _unflatten(aux: tuple[Any, ...], children: Iterable[Any]) -> Factors:
    (parts, ranks, _, multiplier), origin = aux
    factors, children = object.__new__(Factors), tuple(children)
    keep(factors, **dict.fromkeys(_ARRAYS))
    keep(factors, **dict(zip(parts, children, strict=True)))
    keep(factors, ranks=ranks, alphas=origin.alphas, multiplier=multiplier, parts=parts)
    keep(factors, config=origin.config, base=origin.base, _children=children, _aux=aux)
    return factors


register(Factors, lambda factors: factors.parts, _unflatten)
