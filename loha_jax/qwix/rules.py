"""Which kernels get an adapter, and of what rank: rules as qwix has them, or PEFT's config."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import qwix

from loha_jax.qwix.storage import ADAPTER
from loha_jax.targets.config import LoHaConfig
from loha_jax.targets.lycoris_config import LycorisConfig
from loha_jax.targets.matching import ALL_LINEAR, Match, match_target
from loha_jax.targets.module_names import Names, UnknownNameError, all_names
from loha_jax.tree.leaves import LoHaWeight
from loha_jax.tree.plan import make_target, warn_unmatched


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoHaRule(qwix.QuantizationRule):
    """A rule for modules whose kernels get a LoHa adapter, and for how their base is quantised.

    The fields of `qwix.QuantizationRule` (`module_path`, `weight_qtype`, `act_qtype`, `tile_size`,
    …) mean what they mean there. The others are those of `loha_jax.LoHaConfig`.

    Attributes:
        rank: of each of the two factor pairs; the update has rank up to rank².
        alpha: the update is scaled by alpha/rank.
        rank_dropout: probability that a row (an output) of the update is dropped in training.
        module_dropout: probability that a module's whole update is dropped in training.
        use_effective_conv2d: convolution kernels larger than 1 get a CP core.
        init_weights: the distribution of the initial factors; see `LoHaConfig`.

    Example:
        >>> LoHaRule(module_path=".*q_proj", rank=4, alpha=8.0, weight_qtype="int8").config.r
        4
    """

    rank: int
    alpha: float
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool | str = True

    def __post_init__(self) -> None:
        self.config  # noqa: B018  # its checks

    @property
    def config(self) -> LoHaConfig:
        """The adapter's settings; the rule's module path says what they are for."""
        return LoHaConfig(
            r=self.rank,
            alpha=self.alpha,
            rank_dropout=self.rank_dropout,
            module_dropout=self.module_dropout,
            use_effective_conv2d=self.use_effective_conv2d,
            init_weights=self.init_weights,
        )


def checked_config(config: LoHaConfig) -> LoHaConfig:
    """Return a config that a provider can apply while the model runs.

    Raises:
        ValueError: it needs the whole model at once, or arrays besides the factors.
    """
    if config.target_modules is None or config.target_modules == ALL_LINEAR:
        raise ValueError(
            f"target_modules={config.target_modules!r} needs the list of all modules, which a "
            "provider does not have. Give names, name endings or a regular expression."
        )
    if config.all_modules_to_save:
        raise ValueError(
            f"modules_to_save={list(config.all_modules_to_save)}: a provider adapts kernels and "
            "saves no module whole. Leave it out, or use loha_jax.nnx.inject on a float model."
        )
    if isinstance(config, LycorisConfig) and (config.use_scalar or config.weight_decompose):
        raise ValueError(
            "use_scalar and weight_decompose need the values of the float kernel. Use "
            "loha_jax.nnx.inject on a float model."
        )
    return config


def check_stack(config: LoHaConfig, leaf: LoHaWeight) -> None:
    """Check that a config says the same of all modules of a stack.

    A scan adapts its layers all at once, before their numbers are known.

    Raises:
        ValueError: it leaves out some of them, or gives them other ranks or alphas.
    """
    own = leaf.adapters[ADAPTER]
    each = make_target(config, (), leaf.names, leaf.layout, leaf.kernel)
    targeted = all(match_target(name, config) is Match.TARGETED for name in leaf.names)
    if not targeted or (each.ranks, each.alphas) != (own.ranks, own.alphas):
        raise ValueError(
            f"The config does not say the same of all modules of the stack {leaf.label}, which a "
            "provider adapts at once: all layers of a scan, before they have numbers. Remove what "
            "is said of single ones (target_modules, layers_to_transform, exclude_modules, "
            "rank_pattern, alpha_pattern), write patterns that match the name without a number, or "
            "use loha_jax.nnx.inject on a float model."
        )


def is_target(config: LoHaConfig, name: str, names: Names | None) -> bool:
    """Return whether a config adapts the modules of a kernel with this default name.

    Raises:
        ValueError: it adapts some modules of a stack and not the others.
    """
    known = _known_names(name, names)
    found = {match_target(own, config) is Match.TARGETED for own in known}
    if len(found) > 1:
        raise ValueError(
            f"The config targets some of {', '.join(known)}, which are one kernel, {name}, and not "
            "the others. A provider adapts all modules of a stack, or none: change target_modules."
        )
    return True in found


def warn_of_unmatched(config: LoHaConfig, seen: Iterable[str], names: Names | None) -> None:
    """Warn of what a config says of no module, as `loha_jax.inject` does.

    Args:
        config: of a provider.
        seen: the default names of all kernels with a product.
        names: torch names by default name.
    """
    modules = sorted({own for name in seen for own in _known_names(name, names)})
    found = {name: match_target(name, config) for name in modules}
    targeted, excluded = (
        [name for name, match in found.items() if match is kind]
        for kind in (Match.TARGETED, Match.EXCLUDED)
    )
    warn_unmatched(config, config, modules, targeted, excluded)


def _known_names(name: str, names: Names | None) -> tuple[str, ...]:
    try:
        return all_names(name, names)
    except UnknownNameError:
        return (name,)
