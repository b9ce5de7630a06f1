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
        own, lookups, left_out, transposed, vectors, unclear, stacks, scales: see the attributes.

    Attributes:
        own: layouts that the layers have, by default dotted name. They come after the layouts that
            `names` has: what is one kernel to a layer (a fused projection) may be several modules
            in torch.
        lookups: modules whose rows are looked up. They are no linear layers to "all-linear".
        left_out: others that "all-linear" leaves out: output heads, layers that are not linear.
        transposed: transposed convolutions, and others whose axes torch has in an order that no
            layout says (Keras' depthwise ones).
        vectors: modules whose weight is a scale, even if it has several axes.
        unclear: the names of the axes of kernels whose layer is not known. A default by shape would
            be a guess.
        stacks: how many parts of a module's name stand in front of each index of its stack.
        scales: numbers by which layers multiply their weight before they use it.

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
        left_out: Collection[str] = (),
        vectors: Collection[str] = (),
        unclear: Mapping[str, tuple[str, ...]] | None = None,
        stacks: Mapping[str, tuple[int, ...]] | None = None,
        scales: Mapping[str, float] | None = None,
    ):
        super().__init__(given or {})
        self.own = {**(own or {}), **(given.own if isinstance(given, ModelLayouts) else {})}

        def with_known(name: str, modules: Collection[str]) -> frozenset[str]:
            known = getattr(given, name) if isinstance(given, ModelLayouts) else ()
            return frozenset(modules).union(known)

        self.lookups = with_known("lookups", lookups)
        self.left_out = with_known("left_out", left_out)
        self.transposed = with_known("transposed", transposed)
        self.vectors = with_known("vectors", vectors)
        self.unclear = dict(unclear or {})
        self.stacks = dict(stacks or {})
        self.scales = dict(scales or {})
