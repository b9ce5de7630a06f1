"""The checkpoints that stay: Orbax' policies, applied to intact checkpoints only."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

from loha_jax.runtime.scalars import is_integer, plain_scalar


class Retention:
    """A preservation policy of Orbax: the latest `keep` checkpoints, and the best `keep_best`.

    Orbax' own policies do not know of corrupted checkpoints, nor of NaN. So they see only the
    intact checkpoints, and a metric that is NaN as a missing one.

    Args:
        keep: the number of latest checkpoints, or None for all.
        best: the name of a metric, or None.
        best_mode: "min" or "max".
        keep_best: the number of best checkpoints.
        read_metrics: reads the metrics of a checkpoint; raises if it is corrupted.

    Attributes:
        corrupted: the errors of checkpoints that cannot be restored, by step. They count neither as
            latest nor as best, and stay until training has passed their step.
        metrics: the metrics of the checkpoints saved or read so far, by step.

    Raises:
        ValueError: `keep`, `keep_best` or `best_mode` is invalid.

    Example:
        >>> metrics = {1: {"loss": 2.0}, 2: {"loss": math.nan}}
        >>> Retention(1, "loss", "min", 1, read_metrics=metrics.get).best_step([1, 2])
        1
    """

    def __init__(
        self,
        keep: int | None,
        best: str | None,
        best_mode: str,
        keep_best: int,
        read_metrics: Callable[[int], dict[str, float] | None],
    ):
        keep, keep_best = plain_scalar(keep), plain_scalar(keep_best)
        if keep is not None and (not is_integer(keep) or keep < 1):
            raise ValueError(
                f"`keep` should be a positive integer, or None for all checkpoints, got {keep!r}"
            )
        if not is_integer(keep_best) or keep_best < 0:
            raise ValueError(f"`keep_best` should be an integer of at least 0, got {keep_best!r}")
        if best_mode not in ("min", "max"):
            raise ValueError(f"`best_mode` should be 'min' or 'max', got {best_mode!r}")
        from orbax.checkpoint import checkpoint_managers

        self.corrupted: dict[int, str] = {}
        self.metrics: dict[int, dict[str, float]] = {}
        self._best, self._best_mode, self._read_metrics = best, best_mode, read_metrics
        policies: list[Any] = [checkpoint_managers.LatestN(keep)]
        if best is not None:
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=operator.itemgetter(best),
                    reverse=best_mode == "min",
                    n=keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._policy = checkpoint_managers.AnyPreservationPolicy(policies)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Return which checkpoints stay; Orbax calls it once it has started to save the last."""
        whole = [
            dataclasses.replace(c, metrics=self._ranked(c.step))
            for c in checkpoints
            if c.step not in self.corrupted
        ]
        decided = self._policy.should_preserve(whole, context=context)
        kept = {c.step for c, keep in zip(whole, decided, strict=True) if keep}
        return [
            c.step in kept or (c.step in self.corrupted and c.step > checkpoints[-1].step)
            for c in checkpoints
        ]

    def best_step(self, steps: Sequence[int]) -> int | None:
        """Return the step with the best metric, the last of equals; None if no step has one."""
        if self._best is None:
            return None
        sign = -1 if self._best_mode == "min" else 1
        ranked = [
            (sign * metrics[self._best], step) for step in steps if (metrics := self._ranked(step))
        ]
        return max(ranked)[1] if ranked else None

    def _ranked(self, step: int) -> dict[str, float] | None:
        """Return the metrics of a checkpoint; None if it cannot be among the best."""
        if self._best is None or step in self.corrupted:
            return None
        if step not in self.metrics:
            try:
                self.metrics[step] = self._read_metrics(step) or {}
            except Exception:  # `restore` raises it
                self.metrics[step] = {}
        metrics = self.metrics[step]
        return None if math.isnan(metrics.get(self._best, math.nan)) else metrics
