"""`LycorisConfig`: LoHa with the options that LyCORIS has and PEFT has not."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from loha_jax.targets.config import LoHaConfig


@dataclasses.dataclass(frozen=True, eq=False)
class LycorisConfig(LoHaConfig):
    """A `LoHaConfig` with LyCORIS' own options, under the names of its `LohaModule`.

    An adapter of it is trained, merged and applied like any other. `interop.save_lycoris` writes all of it;
    `interop.save_peft` writes what PEFT has a place for (rank stabilisation and the scalar, by folding them into alpha
    and `hada_w1_a`) and refuses a weight decomposition.

    Args:
        rs_lora: the update is scaled by alpha/√r instead of alpha/r (rank stabilisation). Files hold it folded into
            alpha, so that every reader's alpha/r is right; a loaded config has it False.
        use_scalar: the update is multiplied by one more trained number, which starts at zero; the factors then start
            random, all of them. Files hold it folded into `hada_w1_a`.
        weight_decompose: DoRA: the rows of W + ΔW are rescaled to trained norms, `dora_scale`, which start at those of
            W. At `loha_jax.scale(params, {name: 0})` the weight is W (LyCORIS 4.1.3 gives W + ΔW there).
        wd_on_out: True: one norm per out feature; False: one per in feature (per channel and group of a convolution).
            LyCORIS 4.1.3 writes files of either kind and can read the first alone.
        rank_dropout_scale: rank dropout rescales the rows that it keeps, which PEFT's always does.
        metadata: strings in the header of the file that the adapter was loaded from, to be written again.

    Example:
        >>> config = LycorisConfig(r=4, alpha=1, target_modules=["q"], weight_decompose=True, init_weights="lycoris")
        >>> config.wd_on_out
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
        for name in ("rs_lora", "use_scalar", "weight_decompose", "wd_on_out", "rank_dropout_scale"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` should be True or False but the value passed is {getattr(self, name)!r}")
        strings = self.metadata.items() if isinstance(self.metadata, Mapping) else [(None, None)]
        if not all(isinstance(k, str) and isinstance(v, str) for k, v in strings):
            raise ValueError(f"`metadata` should be a dict of strings but the value passed is {self.metadata!r}")
        object.__setattr__(self, "metadata", dict(self.metadata))

    @property
    def computing(self) -> tuple[Any, ...]:
        """As of a `LoHaConfig`; `rank_dropout_scale` says whether the kept rows are rescaled."""
        return self.rank_dropout, self.module_dropout, self.rank_dropout_scale
