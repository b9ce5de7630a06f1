"""What differs or does not fit in many places, named once: for messages that fit a screen."""

from __future__ import annotations

from collections.abc import Iterable


def one_line_each(found: Iterable[tuple[str, str]]) -> list[str]:
    """Return one line for each reason, with the first places that have it and their number.

    Args:
        found: places, each with its reason, which follows it in a line.

    Example:
        >>> one_line_each([("q", " is too large"), ("k", " is too large"), ("v", " is missing")])
        ['q is too large (so in 1 more: k)', 'v is missing']
    """
    places: dict[str, list[str]] = {}
    for place, what in found:
        places.setdefault(what, []).append(place)
    lines = []
    for what, (first, *others) in places.items():
        more = "" if len(others) <= 2 else ", …"
        listed = f" (so in {len(others)} more: {', '.join(others[:2])}{more})" if others else ""
        lines.append(f"{first}{what}{listed}")
    return lines
