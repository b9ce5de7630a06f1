"""`summary`: what an adapted tree holds, and how much of it is trained."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from loha_jax.tree.containers import takes_model
from loha_jax.tree.leaves import EXTRA_NAMES, Factors, LoHaWeight, SavedWeight, is_adapted
from loha_jax.tree.merge import unload

STATISTICS = "statistics"
"""The kind of a saved leaf that is not trained: a batch norm's mean, variance or counter."""


@dataclasses.dataclass(frozen=True)
class AdapterRow:
    """One adapter of one leaf, or one saved leaf, in a `Summary`."""

    module: str
    kind: str
    adapter: str
    shape: tuple[int, ...]
    layout: str
    r: str
    parameters: int
    active: bool


@dataclasses.dataclass(frozen=True)
class Summary:
    """Returned by `summary`; `print` it for a table.

    Attributes:
        rows: one per adapter and leaf.
        trainable_params: number of trained values.
        all_params: number of values in the tree: base, adapters and saved copies (as PEFT counts).
    """

    rows: tuple[AdapterRow, ...]
    trainable_params: int
    all_params: int

    @property
    def totals(self) -> str:
        """PEFT's line of `print_trainable_parameters`."""
        percent = 100 * self.trainable_params / max(self.all_params, 1)
        return (
            f"trainable params: {self.trainable_params:,d} || all params: {self.all_params:,d} || "
            f"trainable%: {percent:.4f}"
        )

    def __str__(self) -> str:
        header = ("module", "kind", "adapter", "shape", "layout", "r", "parameters", "active")
        cells = [
            (
                r.module,
                r.kind,
                r.adapter,
                "x".join(map(str, r.shape)),
                r.layout,
                r.r,
                f"{r.parameters:,}",
                str(r.active),
            )
            for r in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in (header, *cells)]
        return "\n".join([*lines, self.totals])


@takes_model(changes=False)
def summary(params: Any) -> Summary:
    """Lists the adapters of a tree with their modules, ranks and parameter counts.

    Works on arrays, tracers and the shapes of `jax.eval_shape` alike.

    Example:
        >>> import jax.numpy as jnp, loha_jax
        >>> params = loha_jax.inject({"q": {"kernel": jnp.ones((3, 3))}},
        ...     loha_jax.LoHaConfig(r=2, target_modules=["q"]), key=jax.random.key(0))
        >>> summary(params).totals
        'trainable params: 24 || all params: 33 || trainable%: 72.7273'
    """
    rows: list[AdapterRow] = []
    for leaf in jax.tree.leaves(params, is_leaf=is_adapted):
        if isinstance(leaf, LoHaWeight):
            for name, factors in leaf.adapters.items():
                ranks = sorted(set(factors.ranks))
                rows.append(
                    AdapterRow(
                        leaf.label,
                        _kind(factors),
                        name,
                        tuple(leaf.shape),
                        leaf.layout.word,
                        str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}",
                        sum(
                            _true_size(t.shape, factors.ranks, factors.stack, n, factors.is_cp)
                            for n, t in factors.tensors.items()
                        )
                        + sum(math.prod(factors.trained[n].shape) for n in EXTRA_NAMES if n in factors.trained),
                        name in leaf.active,
                    )
                )
        elif isinstance(leaf, SavedWeight):
            for name, copy in leaf.copies.items():
                word = leaf.layout.word if leaf.layout else "-"
                rows.append(
                    AdapterRow(
                        leaf.name,
                        STATISTICS if leaf.is_buffer else "saved",
                        name,
                        tuple(copy.shape),
                        word,
                        "-",
                        copy.size,
                        name in leaf.active,
                    )
                )
    frozen = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(unload(params)) if hasattr(leaf, "shape"))
    trained = sum(row.parameters for row in rows if row.active and row.kind != STATISTICS)
    return Summary(tuple(rows), trained, frozen + sum(row.parameters for row in rows))


def _kind(factors: Factors) -> str:
    extras = {"cores": factors.hada_t1, "scalar": factors.scalar, "norms": factors.dora_scale}
    return ", ".join(["loha", *(name for name, array in extras.items() if array is not None)])


def _true_size(shape, ranks, stack, name, cp) -> int:
    """Values that count: without the zeros that pad a stack of unequal ranks."""
    one = shape[len(stack) :]
    rank_axes = {"hada_t1": (0, 1), "hada_t2": (0, 1)}.get(name, (0,) if cp or name.endswith("b") else (1,))
    return sum(math.prod(r if axis in rank_axes else n for axis, n in enumerate(one)) for r in ranks)
