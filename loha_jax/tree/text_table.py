"""Plain-text tables, as `print` shows them."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def text_table(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Return the lines of a table, its columns two spaces apart.

    Args:
        rows: the header and the other rows, all of one length.
        right: numbers of the columns that are aligned to the right.

    Example:
        >>> text_table([("module", "r"), ("q", "10")], right=[1])
        ['module   r', 'q       10']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(_cells(row, widths, right)).rstrip() for row in rows]


def _cells(row: Sequence[str], widths: Sequence[int], right: Collection[int]) -> list[str]:
    cells = enumerate(zip(row, widths, strict=True))
    return [cell.rjust(w) if n in right else cell.ljust(w) for n, (cell, w) in cells]
