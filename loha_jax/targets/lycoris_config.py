"""`LycorisConfig`: LoHa with the options that LyCORIS has and PEFT lacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from loha_jax.lowrank.initial_values import CALIBRATED
from loha_jax.lowrank.layout import Layout
from loha_jax.lowrank.weight_decomposition import weight_norms
from loha_jax.targets.config import LoHaConfig, peft_fields
from loha_jax.targets.matching import most_common

_FLAGS = ("rs_lora", "use_scalar", "weight_decompose", "wd_on_out", "rank_dropout_scale")


@dataclasses.dataclass(frozen=True, eq=False)
class LycorisConfig(LoHaConfig):
    """A `LoHaConfig` with LyCORIS' own options, named as in its `LohaModule`.

    Its adapters are trained, merged and applied like any other. `interop.save_lycoris` writes all
    of them. `interop.save_peft` folds rank stabilisation into alpha and the scalar into
    `hada_w1_a`, and refuses a weight decomposition, which PEFT's LoHa lacks.

    Args:
        rs_lora: the update is scaled by alpha/√r instead of alpha/r (rank stabilisation). It is
            folded into the alphas of tree and files, so that every reader's alpha/r is right. A
            loaded config has False.
        use_scalar: the update is multiplied by one more trained number, which starts at zero. All
            factors then start random. Files hold it folded into `hada_w1_a`.
        weight_decompose: DoRA: the rows of W + ΔW are rescaled to trained norms, `dora_scale`,
            which start at the norms of W. With `loha_jax.scale(params, {name: 0})` the weight is W
            (LyCORIS 4.1.3 gives W + ΔW there).
        wd_on_out: True: one norm per output feature. False: one per input feature (per channel and
            group of a convolution). LyCORIS 4.1.3 writes both kinds of files and can read only the
            first.
        rank_dropout_scale: rank dropout rescales the rows that it keeps, as PEFT's always does.
        metadata: strings in the header of the file that the adapter was loaded from; written again.

    Example:
        >>> LycorisConfig(r=4, alpha=1, target_modules=["q"], weight_decompose=True).wd_on_out
        True
    """

    rs_lora: bool = False
    use_scalar: bool = False
    weight_decompose: bool = False
    wd_on_out: bool = True
    rank_dropout_scale: bool = False
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in _FLAGS:
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(
                    f"`{name}` should be True or False but the value passed is {value!r}"
                )
        strings = self.metadata.items() if isinstance(self.metadata, Mapping) else [(None, None)]
        if not all(isinstance(k, str) and isinstance(v, str) for k, v in strings):
            raise ValueError(
                f"`metadata` should be a dict of strings but the value passed is {self.metadata!r}"
            )
        if self.use_scalar and self.init_weights in CALIBRATED:
            raise ValueError(
                f"init_weights={self.init_weights!r} sets the size of the first steps, but with "
                "use_scalar=True the update starts at zero times random factors. Leave one out."
            )
        object.__setattr__(self, "metadata", dict(self.metadata))

    @property
    def computing(self) -> tuple[Any, ...]:
        """The fields that computing needs; `rank_dropout_scale` says if kept rows are rescaled."""
        return self.rank_dropout, self.module_dropout, self.rank_dropout_scale

    @property
    def initial_values(self) -> bool | str:
        """The factors' distribution: with a scalar, which starts at zero, all are random."""
        if not self.use_scalar:
            return self.init_weights
        return "lycoris, all random" if self.init_weights == "lycoris" else False

    @property
    def file_metadata(self) -> Mapping[str, str]:
        """`metadata`."""
        return self.metadata

    def effective_alpha(self, alpha: float, r: int) -> float:
        """Return alpha with rank stabilisation folded in, so that alpha/r becomes alpha/√r."""
        return alpha * max(r, 1) ** 0.5 if self.rs_lora else alpha

    def extra_arrays(
        self, kernel: jax.Array, layout: Layout, dtype: DTypeLike
    ) -> dict[str, jax.Array]:
        """Return the scalar, `[*stack]`, and the norms of the kernel, as far as the config asks.

        Args:
            kernel: the base weight.
            layout: of the kernel.
            dtype: of the factors.
        """
        extras = {}
        if self.use_scalar:
            extras["scalar"] = jnp.zeros(layout.sizes("s", kernel.shape), dtype)
        if self.weight_decompose:
            extras["dora_scale"] = weight_norms(kernel, layout, self.wd_on_out).astype(dtype)
        return extras

    def as_peft(self, alphas: Iterable[float]) -> LoHaConfig:
        """Return PEFT's fields as a `LoHaConfig`, with the most frequent alpha of the modules."""
        return LoHaConfig(**{**peft_fields(self), "alpha": most_common(alphas)})
