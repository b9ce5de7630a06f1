"""`Mismatch`: everything that does not fit between a file and a tree, in one error."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from loha_jax.tree.grouped_lines import one_line_each

_SHOWN = 20


@dataclasses.dataclass
class Mismatch:
    """The entries of a file and of a tree that do not fit each other.

    A message shows 20 entries of each kind, and their number.

    Attributes:
        unexpected: entries of the file for which the tree has no place.
        missing: entries that the tree needs and the file lacks.
        misshapen: entries of the file that are of another shape or kind than the tree needs.
        shapes: the same as pairs of an entry and what is wrong with it. A message names what is
            wrong once, with the number of entries.
        titles: what a message calls the three, in this order.
        separator: what a message writes between entries.

    Example:
        >>> mismatch = Mismatch(missing=["k"])
        >>> mismatch.add_shape("q", (2, 5), (2, 4))
        >>> print(mismatch)
        missing keys (1): k. misshapen (1): q: [2, 5] in the file, [2, 4] in the model
    """

    unexpected: list[str] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)
    misshapen: list[str] = dataclasses.field(default_factory=list)
    shapes: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    titles: tuple[str, str, str] = ("unexpected keys", "missing keys", "misshapen")
    separator: str = ", "

    def add_shape(self, key: str, found: Sequence[int], *wanted: Sequence[int] | None) -> None:
        """Add an array of the file if it has none of the shapes that the tree takes for it.

        None for a shape means that the tree has no such array.
        """
        shapes = [list(shape) for shape in wanted if shape is not None]
        if list(found) not in shapes:
            shown = " or ".join(map(str, shapes)) or "none"
            self.shapes.append((key, f": {list(found)} in the file, {shown} in the model"))

    def __bool__(self) -> bool:
        return bool(self.unexpected or self.missing or self.misshapen or self.shapes)

    def __str__(self) -> str:
        counts = (
            len(self.unexpected),
            len(self.missing),
            len(self.shapes) + len(self.misshapen),
        )
        lines = self.unexpected, self.missing, [*one_line_each(self.shapes), *self.misshapen]
        return ". ".join(
            f"{title} ({count}): {self.separator.join(items[:_SHOWN])}"
            + (f"{self.separator}…" if len(items) > _SHOWN else "")
            for title, count, items in zip(self.titles, counts, lines, strict=True)
            if items
        )

    def check(self, sentence: str, hint: str, error: type[ValueError] = ValueError) -> None:
        """Raise an error that names all entries, if there are any.

        Args:
            sentence: what it means for the caller, such as "nothing was loaded".
            hint: what to do.
            error: its type.
        """
        if self:
            raise error(f"{sentence}. {self}. {hint}".rstrip(" "))
