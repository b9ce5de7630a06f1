"""`ModelLayouts`: what is known of a model's kernels besides their names and shapes."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from loha_jax.lowrank.layout import Layout

Layouts = Mapping[str, "str | Layout"]
"""Layouts for `inject`, by default dotted name or by a regular expression for the whole of it."""


class ModelLayouts(dict[str, "str | Layout"]):
    """The layouts that a user gave for a model, with what its layers say or its function shows.

    Args:
        given: the layouts of the user; of a `ModelLayouts`, what it knows of the model stays.
        own, lookups, heads, transposed, vectors: see the attributes.

    Attributes:
        own: layouts that the layers have, by default dotted name. They come after the layouts that
            `names` has: what is one kernel to a layer (a fused projection) may be several modules
            in torch.
        lookups: modules whose rows are looked up. They are no linear layers to "all-linear".
        heads: output heads, which "all-linear" leaves out too.
        transposed: transposed convolutions.
        vectors: modules whose weight is a scale, even if it has several axes.

    Example:
        >>> ModelLayouts({"q": "ioo"}, lookups=["embed"]).lookups
        frozenset({'embed'})
    """

    def __init__(
        self,
        given: Layouts | None = None,
        own: Mapping[str, Layout] | None = None,
        transposed: Collection[str] = (),
        *,
        lookups: Collection[str] = (),
        heads: Collection[str] = (),
        vectors: Collection[str] = (),
    ):
        super().__init__(given or {})
        known = given if isinstance(given, ModelLayouts) else None
        self.own = {**(own or {}), **(known.own if known is not None else {})}
        self.lookups = frozenset(lookups) | (known.lookups if known is not None else frozenset())
        self.heads = frozenset(heads) | (known.heads if known is not None else frozenset())
        self.transposed = frozenset(transposed) | (
            known.transposed if known is not None else frozenset()
        )
        self.vectors = frozenset(vectors) | (known.vectors if known is not None else frozenset())
