"""`summary`: a table of the adapters in a tree and their numbers of parameters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from loha_jax.tree.containers import takes_model
from loha_jax.tree.factors import EXTRA_NAMES, Factors
from loha_jax.tree.leaves import LoHaWeight, SavedWeight, flatten_whole
from loha_jax.tree.merge import unload
from loha_jax.tree.quantised import QuantisedArray, wrapped
from loha_jax.tree.short_repr import number_range
from loha_jax.tree.text_table import text_table

STATISTICS = "statistics"
"""The kind of a saved leaf that is not trained: a batch norm's mean, variance or counter."""


@dataclasses.dataclass(frozen=True)
class AdapterRow:
    """A row of a `Summary`: one adapter of one leaf, or one saved leaf."""

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
    """The result of `summary`; `print` it for a table.

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
        """The line that PEFT's `print_trainable_parameters` prints."""
        percent = 100 * self.trainable_params / max(self.all_params, 1)
        return (
            f"trainable params: {self.trainable_params:,d} || all params: {self.all_params:,d} || "
            f"trainable%: {percent:.4f}"
        )

    def __str__(self) -> str:
        header = ("module", "kind", "adapter", "shape", "layout", "r", "parameters", "active")
        cells = [
            (
                row.module,
                row.kind,
                row.adapter,
                "x".join(map(str, row.shape)),
                row.layout,
                row.r,
                f"{row.parameters:,}",
                str(row.active),
            )
            for row in self.rows
        ]
        return "\n".join([*text_table([header, *cells]), self.totals])


@takes_model(changes=False)
def summary(params: Any) -> Summary:
    """List the adapters of a tree with their modules, ranks and numbers of parameters.

    The leaves may be arrays, tracers or the shapes of `jax.eval_shape`. A quantised kernel is named
    by its scheme in `kind`, and counts with its shape.

    Example:
        >>> import jax.numpy as jnp, loha_jax
        >>> params = loha_jax.inject({"q": {"kernel": jnp.ones((3, 3))}},
        ...     loha_jax.LoHaConfig(r=2, target_modules=["q"]), key=jax.random.key(0))
        >>> summary(params).totals
        'trainable params: 24 || all params: 33 || trainable%: 72.7273'
    """
    rows = [row for leaf in flatten_whole(params)[0] for row in _rows(leaf)]
    leaves = map(wrapped, flatten_whole(unload(params))[0])
    base = (leaf for leaf in leaves if hasattr(leaf, "shape"))
    frozen = sum(math.prod(leaf.shape) for leaf in base)
    trained = sum(row.parameters for row in rows if row.active and row.kind != STATISTICS)
    return Summary(tuple(rows), trained, frozen + sum(row.parameters for row in rows))


def _rows(leaf: Any) -> list[AdapterRow]:
    if isinstance(leaf, LoHaWeight):
        return [_adapter_row(leaf, name, factors) for name, factors in leaf.adapters.items()]
    if isinstance(leaf, SavedWeight):
        return [_saved_row(leaf, name, copy) for name, copy in leaf.copies.items()]
    return []


def _adapter_row(leaf: LoHaWeight, name: str, factors: Factors) -> AdapterRow:
    ranks, stack = factors.ranks, factors.stack
    sizes = [
        _true_size(t.shape, ranks, stack, n, factors.is_cp) for n, t in factors.tensors.items()
    ]
    extras = [math.prod(x.shape) for n, x in factors.trained.items() if n in EXTRA_NAMES]
    return AdapterRow(
        module=leaf.label,
        kind=_kind(factors) + _scheme(leaf.kernel),
        adapter=name,
        shape=tuple(leaf.shape),
        layout=leaf.layout.word,
        r=number_range(ranks),
        parameters=sum(sizes) + sum(extras),
        active=name in leaf.active,
    )


def _saved_row(leaf: SavedWeight, name: str, copy: Any) -> AdapterRow:
    return AdapterRow(
        module=leaf.name,
        kind=STATISTICS if leaf.is_buffer else "saved",
        adapter=name,
        shape=tuple(copy.shape),
        layout=leaf.layout.word if leaf.layout else "-",
        r="-",
        parameters=copy.size,
        active=name in leaf.active,
    )


def _scheme(kernel: Any) -> str:
    return f" ({kernel.scheme})" if isinstance(kernel, QuantisedArray) else ""


def _kind(factors: Factors) -> str:
    return ", ".join(["loha", *factors.extra_kinds])


def _true_size(
    shape: Sequence[int], ranks: Sequence[int], stack: Sequence[int], name: str, cp: bool
) -> int:
    """Return the number of values without the zeros that pad a stack of unequal ranks."""
    one = shape[len(stack) :]  # of one module
    of_matrix = (0,) if cp or name.endswith("b") else (1,)
    rank_axes = {"hada_t1": (0, 1), "hada_t2": (0, 1)}.get(name, of_matrix)
    return sum(
        math.prod(r if axis in rank_axes else n for axis, n in enumerate(one)) for r in ranks
    )
