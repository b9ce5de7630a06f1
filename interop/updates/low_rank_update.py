"""`LowRankUpdate`: ΔW of one module as products of its factors, for LoHa and LoRA."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jaxtyping import Float

from ..disk.base_checkpoint import accumulator
from ..formats.adapter_file import AdapterModule, times_core

Left = Float[np.ndarray, "rows r"]
Right = Float[np.ndarray, "r columns"]


@dataclasses.dataclass(frozen=True)
class LowRankUpdate:
    """ΔW as a matrix: scale · (left₁ @ right₁) ⊙ (left₂ @ right₂), or with one pair only (LoRA).

    Attributes:
        pairs: `(left, right)`, in float32 or wider.
        scale: alpha/r.
        in_shape: `(in, *spatial)` where the factors show it; flat factors of a convolution do not.
    """

    pairs: tuple[tuple[Left, Right], ...]
    scale: float
    in_shape: tuple[int, ...] | None = None

    @classmethod
    def of(cls, module: AdapterModule) -> LowRankUpdate:
        """Return the update of a module. Cores are multiplied into the right factors, which is
        exact.

        Raises:
            ValueError: it is the LoRA of a convolution in groups, whose factors do not multiply to
                a weight's change.
        """
        tensors = {n: t.astype(accumulator(t.dtype), copy=False) for n, t in module.tensors.items()}
        scale = module.alpha / module.r
        if module.kind == "lora":
            a, b = tensors["lora_A"], tensors["lora_B"]
            if b.shape[1] != a.shape[0]:
                raise ValueError(
                    f"{module.name} is the LoRA of a convolution in groups, which is not supported "
                    "here"
                )
            spatial = a.shape[1:] if a.ndim > 2 else None
            return cls(((b.reshape(b.shape[0], -1), a.reshape(a.shape[0], -1)),), scale, spatial)
        if "hada_t1" not in tensors:
            return cls(
                tuple((tensors[f"hada_w{n}_a"], tensors[f"hada_w{n}_b"]) for n in "12"),
                scale,
                module.in_shape,
            )
        pairs = []
        for n in "12":
            core, w_b = tensors[f"hada_t{n}"], tensors[f"hada_w{n}_b"]
            right = times_core(core, w_b)
            pairs.append(
                (tensors[f"hada_w{n}_a"].T, np.ascontiguousarray(right).reshape(right.shape[0], -1))
            )
        in_shape = module.in_shape or (tensors["hada_w1_b"].shape[1], *tensors["hada_t1"].shape[2:])
        return cls(tuple(pairs), scale, in_shape)

    @property
    def rows(self) -> int:
        """The number of output features."""
        return self.pairs[0][0].shape[0]

    @property
    def columns(self) -> int:
        """The number of input features, times the size of a convolution's kernel."""
        return self.pairs[0][1].shape[1]

    @property
    def inner(self) -> int:
        """The inner size of the exact product of two matrices: r for LoRA, r² for LoHa."""
        return math.prod(left.shape[1] for left, _ in self.pairs)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Return whether it can be added to a weight `[out, in, *spatial]`."""

        def without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
            while len(shape) > 1 and shape[-1] == 1:  # PEFT's core of a Conv1d
                shape = shape[:-1]
            return shape

        if len(shape) < 2 or shape[0] != self.rows or math.prod(shape[1:]) != self.columns:
            return False
        return self.in_shape is None or without_ones(self.in_shape) == without_ones(shape[1:])

    @property
    def T(self) -> LowRankUpdate:
        """The update of a weight that is stored as `[in, out]`."""
        return LowRankUpdate(tuple((right.T, left.T) for left, right in self.pairs), self.scale)

    def block(self, start: int, stop: int) -> Float[np.ndarray, "rows {self.columns}"]:
        """Return rows of ΔW, in float64."""
        result = np.float64(self.scale)
        for left, right in self.pairs:
            result = result * (left[start:stop].astype(np.float64) @ right.astype(np.float64))
        return np.asarray(result)
