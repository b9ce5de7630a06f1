"""Quantising merged kernels again, and what that loses of their updates."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import PyTree

from loha_jax.runtime.caller import warn_caller
from loha_jax.tree.leaves import LoHaWeight, leaves_of
from loha_jax.tree.quantised import QuantisedArray, as_array

_NOTED = 0.1
"""The share of all updates from which on a merge warns."""


class Requantised(NamedTuple):
    """The loss of quantising one merged kernel again, as Euclidean norms squared.

    Attributes:
        scheme: of the numbers that are stored, such as "int4".
        lost: of the difference between the kernel that is stored and the merged one.
        update: of ΔW.
    """

    scheme: str
    lost: float
    update: float

    @property
    def share(self) -> float:
        """The share of the update that is lost: ‖stored − (W + ΔW)‖ / ‖ΔW‖; 0 without an update."""
        return float(np.sqrt(self.lost / self.update)) if self.update else 0.0


def requantised_like(leaf: LoHaWeight, kernel: jax.Array) -> QuantisedArray:
    """Return a merged kernel as a quantised array of the scheme of the leaf's own.

    Raises:
        ValueError: its type has no way back.
    """
    old, name = leaf.kernel, leaf.label
    if (way := old.kind.requantise) is None:
        raise ValueError(
            f"The kernel of {name} is a {type(old.node).__name__}, which cannot be made again of a "
            "float kernel: register_quantised(type, dequantise, requantise) says how. Or merge "
            "into float kernels, without requantise=True, and quantise these"
        )
    return QuantisedArray(way(kernel, old.node))


def loss(leaf: LoHaWeight, adapters: tuple[str, ...], new: QuantisedArray) -> Requantised | None:
    """Measure what a merged kernel loses; None where values are traced."""
    assert isinstance(leaf.kernel, QuantisedArray)
    base = as_array(leaf.kernel).astype(jnp.float32)
    exact = dataclasses.replace(leaf, kernel=base).dense(adapters)
    return _measured(leaf.kernel.scheme, as_array(new), exact, base)


def _measured(
    scheme: str, stored: ArrayLike, exact: ArrayLike, base: ArrayLike
) -> Requantised | None:
    if any(isinstance(x, jax.core.Tracer) for x in (stored, exact, base)):
        return None
    stored, exact, base = (np.asarray(x, np.float32) for x in (stored, exact, base))
    lost, update = stored - exact, exact - base
    return Requantised(scheme, float(np.vdot(lost, lost)), float(np.vdot(update, update)))


def requantising_losses(params: PyTree, adapters: Sequence[str] | None = None) -> dict[str, float]:
    """Return what `merge(params, adapters, requantise=True)` would lose of each update.

    Rounding to few bits may lose most of an update, since an update is small beside its kernel.

    Args:
        params: an adapted tree with quantised kernels.
        adapters: as for `merge`.

    Returns:
        By module name (of a stack, the first and the last one), ‖stored − (W + ΔW)‖ / ‖ΔW‖.

    Example:
        >>> import loha_jax
        >>> kernel = loha_jax.ScaledArray(jnp.ones((4, 4), jnp.int8), jnp.full((1, 4), 0.01))
        >>> config = loha_jax.LoHaConfig(r=2, init_weights=False, target_modules=["q"])
        >>> params = loha_jax.inject({"q": {"kernel": kernel}}, config, key=jax.random.key(0))
        >>> requantising_losses(params)["q"] < 0.01
        True
    """
    losses: dict[str, float] = {}
    for leaf in leaves_of(LoHaWeight, params):
        chosen = leaf.active if adapters is None else adapters
        own = tuple(name for name in chosen if name in leaf.adapters)
        if own and isinstance(leaf.kernel, QuantisedArray):
            new = requantised_like(leaf, leaf.dense(own))
            if (found := loss(leaf, own, new)) is not None:
                losses[leaf.label] = found.share
    return losses


def warn_of_requantising(losses: Mapping[str, Requantised]) -> None:
    """Warn, kernel by kernel, where quantising again loses more than a tenth of the updates."""
    update = sum(own.update for own in losses.values())
    share = np.sqrt(sum(own.lost for own in losses.values()) / update) if update else 0.0
    if share > _NOTED:
        worst = sorted(losses, key=lambda name: -losses[name].share)
        shown = ", ".join(
            f"{name} {losses[name].share:.0%} ({losses[name].scheme})" for name in worst[:10]
        )
        more = f" and {len(worst) - 10} more" if len(worst) > 10 else ""
        warn_caller(
            f"Quantising the merged weights again loses {share:.0%} of the update "
            f"(‖stored − (W + ΔW)‖/‖ΔW‖): {shown}{more}. Merge without requantise=True to keep it"
        )
