"""The share of an update that is lost where merged weights are rounded to few bits."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np

from loha_jax.tree.merge import LOSS_LIMIT

from ..disk.atomic import write_atomically


@dataclasses.dataclass
class Loss:
    """Sums of squares over the values of one merged tensor.

    Attributes:
        dtype: of the merged tensor.
        scaled: whether it has a scale.
        lost: of what is stored, less what was to be stored.
        update: of what was to be stored, less the base.
        size: of what was to be stored.
    """

    dtype: str
    scaled: bool
    lost: float = 0.0
    update: float = 0.0
    size: float = 0.0

    @property
    def share(self) -> float:
        """‖stored − (W + ΔW)‖ / ‖ΔW‖."""
        return math.sqrt(self.lost / self.update) if self.update else 0.0

    @property
    def relative(self) -> float:
        """‖stored − (W + ΔW)‖ / ‖W + ΔW‖."""
        return math.sqrt(self.lost / self.size) if self.size else 0.0


class Losses:
    """The rounding losses of all merged tensors, added up from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.tensors: dict[str, Loss] = {}

    def add(self, key: str, dtype: np.dtype, scaled: bool, sums: Sequence[SupportsFloat]) -> None:
        """Add a block's sums of squares: lost, update, size."""
        lost, update, size = (float(s) for s in sums)
        with self._lock:
            own = self.tensors.setdefault(key, Loss(dtype.name, scaled))
            own.lost, own.update, own.size = own.lost + lost, own.update + update, own.size + size

    def write(self, path: Path) -> None:
        """Write them to a file of a finished shard."""
        write_atomically(path, json.dumps(self.to_json()).encode())

    def to_json(self) -> dict[str, Any]:
        """Return the losses in the form that `add_json` takes."""
        return {key: dataclasses.asdict(loss) for key, loss in self.tensors.items()}

    def add_json(self, values: dict[str, Any]) -> None:
        """Take over the losses of a shard that an earlier run finished."""
        self.tensors.update({key: Loss(**loss) for key, loss in values.items()})


def overall(tensors: Sequence[Loss]) -> float:
    """Return the share that is lost of all the tensors' updates."""
    update = sum(t.update for t in tensors)
    return math.sqrt(sum(t.lost for t in tensors) / update) if update else 0.0


def loss_notes(losses: dict[str, Loss]) -> list[str]:
    """Return sentences on updates of which rounding loses much."""
    notes = []
    for dtype, scaled in sorted({(t.dtype, t.scaled) for t in losses.values()}):
        own = {key: t for key, t in losses.items() if (t.dtype, t.scaled) == (dtype, scaled)}
        if (share := overall(list(own.values()))) > LOSS_LIMIT or any(
            t.share > LOSS_LIMIT for t in own.values()
        ):
            worst = max(own, key=lambda key: own[key].share)
            many = sum(t.share > LOSS_LIMIT for t in own.values())
            notes.append(
                f"rounding to {'scaled ' * scaled}{dtype} loses {share:.0%} of the update (‖stored "
                f"− (W + ΔW)‖/‖ΔW‖); more than {LOSS_LIMIT:.0%} in {many} of {len(own)} tensors, "
                f"most in {worst}, {own[worst].share:.0%}. A base of more bits keeps it"
            )
    return notes


def check_losses(losses: dict[str, Loss], force: bool) -> None:
    """Raise ValueError where rounding to float8 without scales loses too much."""
    own = {key: t for key, t in losses.items() if not t.scaled and t.dtype.startswith("float8")}
    if force or (share := overall(list(own.values()))) <= LOSS_LIMIT:
        return
    worst = max(own, key=lambda key: own[key].share)
    raise ValueError(
        f"Rounding to {own[worst].dtype}, which has no scales here, loses {share:.0%} of the "
        f"update (‖round(W + ΔW) − (W + ΔW)‖/‖ΔW‖), most in {worst} ({own[worst].share:.0%}); "
        "nothing was written. Merge into a base of more bits, choose bfloat16 with `dtype=`, or "
        "accept it with `force=True`"
    )
