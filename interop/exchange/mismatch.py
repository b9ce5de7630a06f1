"""`Mismatch`: everything that does not fit between a file and a tree, in one error."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from jax.typing import ArrayLike


@dataclasses.dataclass
class Mismatch:
    """The entries of a file and of a tree that do not fit each other.

    Attributes:
        unexpected: entries of the file for which the tree has no place.
        missing: entries that the tree needs and the file lacks.
        misshapen: entries of the file that are of another shape or kind than the tree needs.
        titles: what a message calls the three, in this order.
        separator: what a message writes between entries.

    Example:
        >>> print(Mismatch(missing=["q.hada_w1_a"]))
        missing keys (1): q.hada_w1_a
    """

    unexpected: list[str] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)
    misshapen: list[str] = dataclasses.field(default_factory=list)
    titles: tuple[str, str, str] = ("unexpected keys", "missing keys", "misshapen")
    separator: str = ", "

    def add_shapes(
        self,
        arrays: Mapping[str, ArrayLike],
        wanted: Mapping[str, tuple[int, ...]],
        keys: Mapping[str, str],
    ) -> None:
        """Add the arrays whose shapes differ from the wanted ones.

        Args:
            arrays: of the file, by name.
            wanted: the shapes in the model, by name; names that the file lacks are passed over.
            keys: what the file calls each array.
        """
        self.misshapen += [
            f"{keys[name]}: {list(np.shape(arrays[name]))} in the file, {list(shape)} in the model"
            for name, shape in wanted.items()
            if name in arrays and tuple(np.shape(arrays[name])) != shape
        ]

    def __bool__(self) -> bool:
        return bool(self.unexpected or self.missing or self.misshapen)

    def __str__(self) -> str:
        found = zip(self.titles, (self.unexpected, self.missing, self.misshapen), strict=True)
        return ". ".join(
            f"{title} ({len(items)}): {self.separator.join(items)}"
            for title, items in found
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
