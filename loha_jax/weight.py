"""The leaves of an adapted tree: `LoHaWeight` where a kernel stood, `SavedWeight` where a module is trained whole.

Both are registered pytrees and array-likes (`__jax_array__`, JEP 28661): a model that uses `jax.numpy` computes with
the adapted weight, with no wrapper and no knowledge of this library.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from loha_jax.array_like import ArrayLike
from loha_jax.config import LoHaConfig
from loha_jax.dora import adapted_norms, gain, is_on_out
from loha_jax.hadamard import float32_or_wider, hada_weight, hada_weight_cp, multiply_core
from loha_jax.init import FACTOR_NAMES
from loha_jax.layouts import Layout
from loha_jax.promotion import standard_promotion

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
"""Names of a BatchNorm's state in torch."""


EXTRA_NAMES = ("scalar", "dora_scale")
"""Names of the trained arrays that LyCORIS adds to the factors."""


def alpha_over_r(alphas: Sequence[float], ranks: Sequence[int], stack: Sequence[int], dtype: Any) -> jax.Array:
    """PEFT's scaling alpha/r of each module of a stack, `[*stack]`; 0 where the rank is 0."""
    scaling = [a / r if r else 0.0 for a, r in zip(alphas, ranks, strict=True)]
    return jnp.array(scaling, dtype).reshape(tuple(stack))


def multipliers(weight: Any, ranks: Sequence[int], stack: Sequence[int], dtype: Any) -> jax.Array:
    """`Factors.multiplier`: a number per module of a stack; 0 where the rank is 0: nothing is adapted there."""
    targeted = jnp.array([bool(r) for r in ranks], dtype).reshape(tuple(stack))
    return targeted * jnp.asarray(weight, dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factors:
    """One adapter of one kernel: PEFT's tensors, in PEFT's shapes, with the stack axes of the kernel in front.

    Attributes:
        hada_w1_a, hada_w2_a: `[*stack, out, r]`, or `[*stack, r, out]` beside cores.
        hada_w1_b, hada_w2_b: `[*stack, r, in·prod(spatial)]`, or `[*stack, r, in]` beside cores.
        hada_t1, hada_t2: cores `[*stack, r, r, *spatial]` (Conv1d: a trailing 1), or None.
        scaling: alpha/r as an array, `()` or `[*stack]`; not trained.
        ranks, alphas: per stack index, in row-major order (one entry for a kernel that is one module). Where ranks
            differ within a stack, the factors are padded with zeros, which training leaves at zero; rank 0 marks an
            index that the config does not target.
        config: the config that made the adapter.
        scalar: `[*stack]`, one more trained factor of the update (`LycorisConfig.use_scalar`), or None.
        dora_scale: `[*stack, out, 1, ...]` or `[*stack, 1, in, 1, ...]`, the trained norms of a weight decomposition
            (`LycorisConfig.weight_decompose`), or None.
        multiplier: beside `dora_scale`, `[*stack]`: how much of the adapted weight's difference from W counts; not
            trained. Elsewhere this is a part of `scaling`.
    """

    hada_w1_a: Any
    hada_w1_b: Any
    hada_w2_a: Any
    hada_w2_b: Any
    hada_t1: Any
    hada_t2: Any
    scaling: Any
    ranks: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    alphas: tuple[float, ...] = dataclasses.field(metadata={"static": True})
    config: LoHaConfig = dataclasses.field(metadata={"static": True})
    scalar: Any = None
    dora_scale: Any = None
    multiplier: Any = None

    @property
    def is_cp(self) -> bool:
        """Whether the adapter has cores (`use_effective_conv2d`, for kernels larger than 1)."""
        return self.hada_t1 is not None

    @property
    def tensors(self) -> dict[str, Any]:
        """The factors by PEFT's names."""
        return {name: value for name in FACTOR_NAMES if (value := getattr(self, name)) is not None}

    @property
    def trained(self) -> dict[str, Any]:
        """All trained arrays: the factors and what LyCORIS adds to them."""
        extra = {name: value for name in EXTRA_NAMES if (value := getattr(self, name)) is not None}
        return {**self.tensors, **extra}

    @property
    def untrained(self) -> dict[str, Any]:
        """The arrays that are not trained."""
        return {name: value for name in ("scaling", "multiplier") if (value := getattr(self, name)) is not None}

    @property
    def arrays(self) -> dict[str, Any]:
        """All arrays, trained or not, by name."""
        return {**self.trained, **self.untrained}

    @property
    def scale(self) -> jax.Array:
        """What the product of the factors is multiplied by: `scaling`, times the scalar."""
        scaling = lax.stop_gradient(self.scaling)
        return scaling if self.scalar is None else scaling * self.scalar.astype(scaling.dtype)

    @standard_promotion()
    def delta(self, *, forward_mode: bool = False) -> jax.Array:
        """ΔW in torch's orientation: `[*stack, out, in·prod(spatial)]`, or `[*stack, out, in, *spatial]` beside cores.

        The result has at least float32; see `hada_weight` and `hada_weight_cp`.
        """
        dtype = float32_or_wider(self.hada_w1_a.dtype)
        w1_a, w1_b, w2_a, w2_b = (
            w.astype(dtype) for w in (self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b)
        )
        if not self.is_cp:
            return hada_weight(w1_a, w1_b, w2_a, w2_b, self.scale, forward_mode=forward_mode)
        t1, t2 = self.hada_t1.astype(dtype), self.hada_t2.astype(dtype)
        return hada_weight_cp(t1, w1_a, w1_b, t2, w2_a, w2_b, self.scale, forward_mode=forward_mode)

    def gains(self, kernel: jax.Array, layout: Layout) -> tuple[jax.Array, jax.Array] | None:
        """Of a weight decomposition, what ΔW and what W are multiplied by; None without one.

        The adapter's whole update is `first * ΔW + second * W`, with g = dora_scale/‖W + ΔW‖ and the multiplier m:
        first = m g and second = m (g - 1).

        Args:
            kernel: as the layout says.
            layout: of the kernel.

        Returns:
            Two arrays of the shape of `dora_scale`.
        """
        if self.dora_scale is None:
            return None
        stack = self.hada_w1_a.ndim - 2
        f, on_out = self.flat(), is_on_out(self.dora_scale.shape, layout.torch_shape(kernel.shape), stack)
        factors = (f.hada_w1_a, f.hada_w1_b, f.hada_w2_a, f.hada_w2_b)
        norms = adapted_norms(kernel, layout, *factors, self.scale, on_out=on_out)
        g = gain(norms, self.dora_scale)
        m = lax.stop_gradient(self.multiplier).astype(g.dtype).reshape(*g.shape[:stack], *(1,) * (g.ndim - stack))
        return m * g, m * (g - 1)

    @standard_promotion()
    def flat(self) -> Factors:
        """The same update without cores: they multiply into w*_b, exactly and at the same rank."""
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
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)  # arrays compare elementwise
class LoHaWeight(ArrayLike):
    """A frozen kernel with its LoHa adapters, standing in the tree where the kernel stood.

    As an array it is `kernel + Σ ΔW` over the active adapters, in the kernel's dtype, added in float32 or better. The
    kernel gets no gradient. Applied through `loha_jax.adapt`, the sum is never formed.

    Attributes:
        kernel: the base weight, unchanged (the first leaf: Flax checks its shape).
        adapters: `Factors` by adapter name.
        layout: what each axis of the kernel is.
        names: torch module names, one per stack index.
        active: the adapters that count, in order.

    Example:
        >>> import loha_jax
        >>> config = loha_jax.LoHaConfig(r=2, target_modules=["q"])
        >>> leaf = loha_jax.inject({"q": {"kernel": jnp.ones((3, 4))}}, config, key=jax.random.key(0))["q"]["kernel"]
        >>> leaf.shape, (jnp.ones((5, 3)) @ leaf).shape
        ((3, 4), (5, 4))
    """

    kernel: Any
    adapters: dict[str, Factors]
    layout: Layout = dataclasses.field(metadata={"static": True})
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    active: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    @property
    def _frozen(self) -> jax.Array:
        if self.kernel is None:
            raise ValueError(
                f"The LoHaWeight of {self.names[0]} holds no kernel: it comes from one half of `partition`. Put the "
                "halves together with `loha_jax.combine(trainable, frozen)` first."
            )
        return self.kernel

    @property
    def label(self) -> str:
        """The module's name for a person: the first and the last of a stack."""
        return self.names[0] if len(self.names) == 1 else f"{self.names[0]} … {self.names[-1]}"

    @property
    def active_adapters(self) -> tuple[Factors, ...]:
        """The active adapters that this kernel has, in order."""
        return tuple(self.adapters[name] for name in self.active if name in self.adapters)

    def __jax_array__(self) -> jax.Array:
        return self.dense()

    @standard_promotion()
    def dense(self, adapters: tuple[str, ...] | None = None, *, forward_mode: bool = False) -> jax.Array:
        """`kernel + Σ ΔW`, in the kernel's shape and dtype.

        Args:
            adapters: which ones to add; the active ones by default.
            forward_mode: plain products that `jax.jvp` can differentiate.

        Raises:
            ValueError: the leaf was taken apart by `partition`, or by a vmap or scan over other than stack axes.
        """
        kernel = lax.stop_gradient(self._frozen)
        chosen = self.active_adapters if adapters is None else tuple(self.adapters[name] for name in adapters)
        if not chosen:
            return kernel
        layout = self.layout.strip(kernel.ndim)
        stack = layout.sizes("s", kernel.shape)
        total = kernel.astype(float32_or_wider(kernel.dtype))
        for factors in chosen:
            if factors.scaling.shape != stack or factors.hada_w1_a.shape[:-2] != stack:
                raise ValueError(
                    f"The adapter of {self.names[0]} has the stack axes {factors.hada_w1_a.shape[:-2]}, its kernel "
                    f"({self.layout.word!r}, now of shape {kernel.shape}) has {stack}: the tree was sliced along an "
                    "axis that is not a leading stack axis. Apply the model through `loha_jax.adapt`."
                )
            delta = factors.delta(forward_mode=forward_mode)
            if (gains := factors.gains(kernel, layout)) is not None:
                weight = layout.unfold(kernel).astype(delta.dtype)
                delta = gains[0] * delta.reshape(weight.shape) + gains[1] * weight
            total += layout.fold(delta, kernel.shape)
        return total.astype(kernel.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)  # arrays compare elementwise
class SavedWeight(ArrayLike):
    """A leaf of a module in `modules_to_save`: the original, and a trained copy per adapter.

    As an array it is the copy of the active adapter that has one, else the original, which gets no gradient. With two
    such adapters it is neither, and an error (as in PEFT).

    Attributes:
        original: the base parameter.
        copies: trained copies by adapter name.
        layout: of a kernel, or None for a parameter that torch stores with the same axes.
        name: torch parameter name, e.g. "classifier.weight".
        active: the adapters that count.
        counters: `(adapter, torch name, value)` of integer buffers in the adapter's file that the tree has no leaf for
            (a BatchNorm's `num_batches_tracked`); written back as they were.
    """

    original: Any
    copies: dict[str, Any]
    layout: Layout | None = dataclasses.field(metadata={"static": True})
    name: str = dataclasses.field(metadata={"static": True})
    active: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    counters: tuple[tuple[str, str, int], ...] = dataclasses.field(default=(), metadata={"static": True})

    @property
    def is_buffer(self) -> bool:
        """Whether torch holds it as a buffer (BatchNorm statistics): saved, but not trained."""
        return self.name.rsplit(".", 1)[-1] in BUFFERS

    @property
    def _frozen(self) -> jax.Array:
        if self.original is None:
            raise ValueError(
                f"The SavedWeight of {self.name} holds no original: it comes from one half of `partition`. Put the "
                "halves together with `loha_jax.combine(trainable, frozen)` first."
            )
        return self.original

    def copy_of(self, adapters: Sequence[str]) -> str | None:
        """The one of these adapters that has a copy, or None.

        Raises:
            ValueError: several have one.
        """
        names = [name for name in adapters if name in self.copies]
        if len(names) > 1:
            raise ValueError(
                f"Only one adapter at a time can replace {self.name}, but {', '.join(names)} each hold a copy of it "
                "(modules_to_save). Activate one of them, or run each row through its own with "
                "adapt(fn, adapter_index=ids)."
            )
        return names[0] if names else None

    def __jax_array__(self) -> jax.Array:
        name = self.copy_of(self.active)
        return lax.stop_gradient(self._frozen) if name is None else self.copies[name]


def is_adapted(leaf: Any) -> bool:
    """Whether a node of a tree is a `LoHaWeight` or a `SavedWeight` (for `is_leaf=`)."""
    return isinstance(leaf, LoHaWeight | SavedWeight)
