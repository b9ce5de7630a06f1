"""`summary`: a table of the adapters in a tree and their numbers of parameters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from jaxtyping import PyTree

from loha_jax.lowrank.initial_values import factor_shapes
from loha_jax.tree.containers import takes_model
from loha_jax.tree.factors import EXTRA_NAMES, Factors
from loha_jax.tree.leaves import AdaptedLeaf, LoHaWeight, flatten_whole, is_adapted
from loha_jax.tree.merge import unload
from loha_jax.tree.quantised import QuantisedArray, wrapped
from loha_jax.tree.short_repr import rank_range
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
                *(x.module, x.kind, x.adapter, "x".join(map(str, x.shape)), x.layout, x.r),
                *(f"{x.parameters:,}", str(x.active)),
            )
            for x in self.rows
        ]
        return "\n".join([*text_table([header, *cells]), self.totals])


@takes_model(changes=False)
def summary(params: PyTree) -> Summary:
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
    leaves = flatten_whole(params)[0]
    rows = [row for leaf in filter(is_adapted, leaves) for row in _rows(leaf)]
    whole = map(wrapped, flatten_whole(unload(params))[0])
    base = (leaf for leaf in whole if hasattr(leaf, "shape"))
    frozen = sum(math.prod(leaf.shape) for leaf in base)
    trained = sum(row.parameters for row in rows if row.active and row.kind != STATISTICS)
    return Summary(tuple(rows), trained, frozen + sum(row.parameters for row in rows))


def _rows(leaf: AdaptedLeaf) -> Iterator[AdapterRow]:
    held: dict[str, Any] = leaf.adapters if isinstance(leaf, LoHaWeight) else leaf.copies
    for name, adapter in held.items():
        if isinstance(leaf, LoHaWeight):
            kind = ", ".join(("loha", *adapter.extra_kinds)) + _scheme(leaf.original)
            parameters = _parameters(leaf, adapter)
            shape, r = leaf.shape, rank_range(adapter.ranks)
        else:
            kind = STATISTICS if leaf.is_buffer else "saved"
            shape, r, parameters = adapter.shape, "-", adapter.size
        yield AdapterRow(
            module=leaf.label,
            kind=kind,
            adapter=name,
            shape=tuple(shape),
            layout=leaf.layout.word if leaf.layout else "-",
            r=r,
            parameters=parameters,
            active=name in leaf.active,
        )


def _scheme(kernel: object) -> str:
    return f" ({kernel.scheme})" if isinstance(kernel, QuantisedArray) else ""


def _parameters(leaf: LoHaWeight, factors: Factors) -> int:
    """Return the number of trained values, without the zeros that pad a stack of unequal ranks."""
    out, in_, *spatial = leaf.layout.torch_shape(leaf.shape)[len(leaf.layout.axes("s")) :]
    per_module = [factor_shapes(out, in_, spatial, r, factors.is_cp) for r in factors.ranks]
    return sum(
        x.size if name in EXTRA_NAMES else sum(math.prod(shapes[name]) for shapes in per_module)
        for name, x in factors.trained.items()
    )
