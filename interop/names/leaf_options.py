"""`Options`: what a leaf may be, where the contents of a checkpoint leave several possibilities."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from loha_jax.lowrank.layout import Layout

from .leaf_source import Source


@dataclasses.dataclass(frozen=True)
class Correspondence:
    """One way in which a leaf may be made of torch tensors.

    Attributes:
        keys: for each index of the leaf's stack the tensors that have its contents.
        forms: the ways in which axes may correspond, as sources without names.
        constant: whether all values of an index are the same.
    """

    keys: tuple[tuple[str, ...], ...]
    forms: tuple[Source, ...]
    constant: bool

    def holds(self, keys: Sequence[str]) -> bool:
        """Return whether these tensors, one per index of the stack, have the leaf's contents."""
        return len(keys) == len(self.keys) and all(
            key in own for key, own in zip(keys, self.keys, strict=True)
        )

    @property
    def words(self) -> Iterator[str]:
        """One text per option."""
        if len(self.keys) > 1:
            layouts = " or ".join(str(form.layout or form.axes) for form in self.forms)
            yield f"{', '.join(' or '.join(keys) for keys in self.keys)} ({layouts})"
            return
        for key, form in itertools.product(itertools.chain(*self.keys), self.forms):
            yield f"{key} ({form.layout})" if form.layout else key


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of a leaf that contents do not settle."""

    ways: tuple[Correspondence, ...]

    @property
    def words(self) -> tuple[str, ...]:
        """One text per option."""
        return tuple(dict.fromkeys(word for way in self.ways for word in way.words))

    @property
    def keys(self) -> tuple[str, ...]:
        """All torch names that occur."""
        return tuple(dict.fromkeys(key for way in self.ways for own in way.keys for key in own))

    def choose(self, keys: Sequence[str], layout: Layout | None) -> Source:
        """Return the source with these names and this layout.

        Raises:
            ValueError: they are no option, or leave several.
        """
        forms = [form for way in self.ways if way.holds(keys) for form in way.forms]
        if not forms:
            raise ValueError(f"{', '.join(keys)} is none of {'; '.join(self.words)}")
        chosen = [form for form in forms if layout is None or form.layout == layout]
        if len(chosen) != 1:
            known = ", ".join(str(form.layout) for form in forms)
            raise ValueError(f"the layout is one of {known}; give (name, layout)")
        return dataclasses.replace(chosen[0], keys=tuple(keys))
