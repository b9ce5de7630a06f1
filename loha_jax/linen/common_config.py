"""One config for all LoHa layers of a model, as PEFT has it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from loha_jax.targets.config import LoHaConfig
from loha_jax.targets.matching import exact_patterns, most_common
from loha_jax.tree.plan import Target

Path = tuple[str, ...]


def common_config(targets: Mapping[Path, Target], configs: Mapping[Path, LoHaConfig]) -> LoHaConfig:
    """Return the config of layers, of which `targets` has the names.

    Raises:
        ValueError: two layers have one name, or they differ in a field that a config holds once.
    """
    if not targets:
        return LoHaConfig()
    counted = Counter(name for target in targets.values() for name in target.names)
    if twice := [name for name, count in counted.items() if count > 1]:
        raise ValueError(
            f"Two layers have the module name {twice[0]!r}: give names= that tell them apart"
        )

    def common(field: str, paths: Sequence[Path]) -> Any:
        values = {path: getattr(configs[path], field) for path in paths}
        if len(set(values.values())) > 1:
            shown = ", ".join(
                f"{targets[path].names[0]}: {value!r}" for path, value in values.items()
            )
            raise ValueError(
                f"The layers differ in {field}, of which an adapter's config holds one: {shown}"
            )
        return next(iter(values.values()), getattr(LoHaConfig, field))

    r, alpha = (most_common(getattr(c, f) for c in configs.values()) for f in ("r", "alpha"))
    large = [path for path, t in targets.items() if set(t.layout.sizes("k", t.shape)) - {1}]

    def patterns(field: str, default: float) -> dict[str, Any]:
        values = {
            name: getattr(configs[path], field) for path, t in targets.items() for name in t.names
        }
        return exact_patterns(values, default)

    return LoHaConfig(
        r=r,
        alpha=alpha,
        rank_pattern=patterns("r", r),
        alpha_pattern=patterns("alpha", alpha),
        rank_dropout=common("rank_dropout", list(targets)),
        module_dropout=common("module_dropout", list(targets)),
        init_weights=common("init_weights", list(targets)),
        use_effective_conv2d=common("use_effective_conv2d", large),
        target_modules=list(counted),
    )
