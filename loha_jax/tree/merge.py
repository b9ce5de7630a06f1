"""`merge` and `unload`: from an adapted tree back to plain arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from loha_jax.runtime.caller import warn_caller
from loha_jax.tree.adapters import adapter_names, check_adapters, without_adapters
from loha_jax.tree.containers import takes_model
from loha_jax.tree.kernel_samples import sample_kernels
from loha_jax.tree.leaves import AdaptedLeaf, LoHaWeight, map_adapted
from loha_jax.tree.quantised import QuantisedArray, as_array, unwrapped
from loha_jax.tree.requantise import (
    Requantised,
    loss,
    requantised_like,
    warn_of_requantising,
)

T = TypeVar("T")

LOSS_LIMIT = 0.5
"""The share of an update that rounding to a float8 without scales may lose."""
_LOSS_NOTED = 0.1


@takes_model
def merge(
    params: T,
    adapters: Sequence[str] | None = None,
    *,
    safe: bool = False,
    unload: bool = True,
    force: bool = False,
    requantise: bool = False,
) -> T:
    """Add adapters into the weights: `W + Σ ΔW` in W's dtype, added in float32 or better.

    Args:
        params: an adapted tree.
        adapters: names of the adapters to merge, in order; the active ones by default.
        safe: refuse results that are not finite. This reads the values, so not under `jax.jit`.
        unload: leave out the other adapters; the result holds plain arrays, ready to serve. With
            False only the merged adapters leave the tree. The others adapt the merged weights, and
            those that were active stay active.
        force: merge into float8 kernels although rounding loses more than half of an update. Under
            `jax.jit`, where values cannot be read, this is not checked.
        requantise: quantise the merged kernels of a quantised base again, by the same scheme. By
            default they are floating arrays then. Kernels without an adapter stay as they are.

    Returns:
        The merged tree. Leaves of `modules_to_save` are the trained copies. To unmerge, keep the
        tree you had.

    Raises:
        ValueError: no leaf has an adapter of that name; two adapters hold a copy of one module; a
            merged weight holds NaN or infinity (`safe`); or rounding to float8 loses more than half
            of an update. The message names the modules.

    Warns:
        UserWarning: rounding to float8 loses more than a tenth of an update. The message has the
            largest share.
        UserWarning: quantising again loses more than a tenth of the updates. The message has the
            share by kernel, as `loha_jax.requantising_losses` returns it.

    Mirrors PEFT's `merge_and_unload(safe_merge=, adapter_names=)` and, with `unload=False`, its
    `merge_adapter`, after which PEFT's layers ignore active adapters that are not merged.

    Example:
        >>> import loha_jax
        >>> params = loha_jax.inject({"q": {"kernel": jnp.ones((3, 3))}},
        ...     loha_jax.LoHaConfig(r=2, target_modules=["q"]), key=jax.random.key(0))
        >>> merge(params)["q"]["kernel"].tolist()[0]
        [1.0, 1.0, 1.0]
    """
    if isinstance(adapters, str):
        raise TypeError(f"adapters should be a list of strings, got {adapters!r}.")
    check_adapters(params, adapters or ())
    broken: list[str] = []
    losses = Losses()

    def merged(leaf: AdaptedLeaf) -> Any:
        chosen = leaf.active if adapters is None else tuple(dict.fromkeys(adapters))
        if isinstance(leaf, LoHaWeight):
            own = tuple(name for name in chosen if name in leaf.adapters)
            weight = _merged_kernel(leaf, own, losses, force)
            if safe and not jnp.isfinite(as_array(weight)).all():
                broken.extend(leaf.names)
            if requantise and own and isinstance(leaf.kernel, QuantisedArray):
                weight = losses.requantised(leaf, own, as_array(weight))
            sample = None if unload else sample_kernels({"kernel": weight}).get("kernel")
            others = {
                name: dataclasses.replace(f, base=sample) for name, f in leaf.adapters.items()
            }
            new = dataclasses.replace(leaf, kernel=weight, adapters=others)
        else:
            name = leaf.copy_of(chosen)
            weight = leaf.original if name is None else leaf.copies[name]
            new = dataclasses.replace(leaf, original=weight)
        return unwrapped(weight) if unload else without_adapters(new, chosen)

    result = map_adapted(merged, params)
    if broken:
        suspects = adapters if adapters is not None else adapter_names(params)
        raise ValueError(
            f"NaNs or infinities detected in the merged weights of {', '.join(broken)}. The "
            f"adapter {', '.join(suspects)} seems to be broken; the tree is unchanged."
        )
    losses.warn()
    return result


@dataclasses.dataclass
class Losses:
    """The losses of rounding and quantising the merged kernels of a tree, by their names."""

    rounding: dict[str, float] = dataclasses.field(default_factory=dict)
    quantising: dict[str, Requantised] = dataclasses.field(default_factory=dict)

    def requantised(
        self, leaf: LoHaWeight, adapters: tuple[str, ...], weight: jax.Array
    ) -> QuantisedArray:
        """Return a merged kernel, quantised as the one before, and note what that loses."""
        new = requantised_like(leaf, weight)
        if (found := loss(leaf, adapters, new)) is not None:
            self.quantising[leaf.label] = found
        return new

    def warn(self) -> None:
        """Warn of large losses."""
        if (share := max(self.rounding.values(), default=0.0)) > _LOSS_NOTED:
            worst = max(self.rounding, key=self.rounding.__getitem__)
            warn_caller(
                f"Rounding the merged weight of {worst} to float8 loses {share:.0%} of the update."
            )
        warn_of_requantising(self.quantising)


def _merged_kernel(
    leaf: LoHaWeight, adapters: tuple[str, ...], losses: Losses, force: bool
) -> jax.Array | QuantisedArray:
    """Return a kernel with adapters added; a quantised one without any as it is."""
    leaf.require_whole()
    if isinstance(leaf.kernel, QuantisedArray) and not adapters:
        return leaf.kernel
    weight = leaf.dense(adapters)
    if adapters and weight.dtype.itemsize < 2 and not isinstance(weight, jax.core.Tracer):
        base = as_array(leaf.kernel)
        wide = dataclasses.replace(leaf, kernel=base.astype(jnp.float32)).dense(adapters)
        name = ", ".join(leaf.names[:3])
        losses.rounding[name] = check_rounding(weight, wide, base, name, force)
    return weight


def check_rounding(
    stored: ArrayLike, exact: ArrayLike, base: ArrayLike, name: str, force: bool
) -> float:
    """Measure what rounding a merged weight to float8 loses of the update; refuse more than half.

    Args:
        stored, exact, base: the merged weight as it is stored and before rounding, and the weight
            without the update.
        name: of the weight, for the message.
        force: whether to allow more.

    Returns:
        The share of the update that is lost, ‖stored − exact‖ / ‖exact − base‖; 0 without an
        update.

    Raises:
        ValueError: ‖stored − exact‖ is more than half of ‖exact − base‖.
    """
    stored, exact, base = (
        np.asarray(array).astype(np.float32).reshape(-1) for array in (stored, exact, base)
    )
    lost, update = np.linalg.norm(stored - exact), np.linalg.norm(exact - base)
    if lost > LOSS_LIMIT * update and not force:
        raise ValueError(
            f"Rounding the merged weight of {name} to float8 loses {lost / update:.0%} of the "
            "update. Merge into a kernel of more bits (tree.map(lambda w: w.astype(jnp.bfloat16), "
            "…) before inject), or pass force=True"
        )
    return float(lost / update) if update else 0.0


@takes_model
def unload(params: T) -> T:
    """Return the base model's tree, as it was before `inject`: the very same arrays.

    PEFT's `unload` keeps the trained copies of `modules_to_save`; `merge(params)` has those.

    Example:
        >>> import loha_jax
        >>> base = {"q": {"kernel": jnp.ones((3, 3))}}
        >>> config = loha_jax.LoHaConfig(r=2, target_modules=["q"])
        >>> params = loha_jax.inject(base, config, key=jax.random.key(0))
        >>> unload(params)["q"]["kernel"] is base["q"]["kernel"]
        True
    """
    return map_adapted(lambda leaf: unwrapped(leaf.original), params)
