"""Which checkpoints stay: Orbax' policies, on the checkpoints that are whole and with metrics that are numbers."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

from loha_jax.runtime.scalars import plain_scalar


class Retention:
    """The latest `keep` checkpoints stay and, beside them, the best `keep_best`; a preservation policy of Orbax.

    Args:
        keep: None for all.
        best: the name of a metric, or None.
        best_mode: "min" or "max".
        keep_best: how many.
        read_metrics: reads those of a checkpoint; raises where it is broken.

    Attributes:
        broken: what is wrong with checkpoints that cannot be restored, by step. None of them counts as one of the
            latest or best, and each stays until training has come past it.
        metrics: of the checkpoints that were saved or looked at, by step.

    Raises:
        ValueError: `keep`, `keep_best` or `best_mode` is not one of these.

    Example:
        >>> retention = Retention(1, "loss", "min", 1, read_metrics={1: {"loss": 2.0}, 2: {"loss": math.nan}}.get)
        >>> retention.best_step([1, 2])
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
        if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
            raise ValueError(f"`keep` should be a positive integer, or None for all checkpoints, got {keep!r}")
        if isinstance(keep_best, bool) or not isinstance(keep_best, int) or keep_best < 0:
            raise ValueError(f"`keep_best` should be an integer of at least 0, got {keep_best!r}")
        if best_mode not in ("min", "max"):
            raise ValueError(f"`best_mode` should be 'min' or 'max', got {best_mode!r}")
        from orbax.checkpoint import checkpoint_managers

        self.broken: dict[int, str] = {}
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
        """Orbax asks this when it has started to save the last one of `checkpoints`."""
        whole = [dataclasses.replace(c, metrics=self._ranked(c.step)) for c in checkpoints if c.step not in self.broken]
        decided = self._policy.should_preserve(whole, context=context)
        kept = {c.step for c, keep in zip(whole, decided, strict=True) if keep}
        return [c.step in kept or (c.step in self.broken and c.step > checkpoints[-1].step) for c in checkpoints]

    def best_step(self, steps: Sequence[int]) -> int | None:
        """The one with the best metric, the last one of equals; None where none has any."""
        if self._best is None:
            return None
        sign = -1 if self._best_mode == "min" else 1
        ranked = [(sign * metrics[self._best], step) for step in steps if (metrics := self._ranked(step))]
        return max(ranked)[1] if ranked else None

    def _ranked(self, step: int) -> dict[str, float] | None:
        """The metrics of a checkpoint that can be among the best; None of one that can not."""
        if self._best is None or step in self.broken:
            return None
        if step not in self.metrics:
            try:
                self.metrics[step] = self._read_metrics(step) or {}
            except Exception:  # `restore` says what is wrong
                self.metrics[step] = {}
        metrics = self.metrics[step]
        return None if math.isnan(metrics.get(self._best, math.nan)) else metrics
