"""Sizes that may be unknown.

`jax.export` traces with symbolic dimensions, and refuses to compare them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeGuard


def is_known(size: object) -> TypeGuard[int]:
    """Return whether a size is a number, and not a symbol."""
    return isinstance(size, int)


def nominal(sizes: Iterable[object], unknown: int = 1) -> int:
    """Return the product of some sizes, for estimates of costs.

    Those that are not known count as `unknown`.
    """
    return math.prod(size if is_known(size) else unknown for size in sizes)


def is_empty(shape: Iterable[object]) -> bool:
    """Return whether an array of this shape is known to hold no elements."""
    return any(is_known(size) and size == 0 for size in shape)
