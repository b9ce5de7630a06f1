"""Warnings that point at the caller's line."""

from __future__ import annotations

import sys
import warnings

_LIBRARIES = ("loha_jax", "jax", "flax", "functools", "contextlib")


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, pointing at the first line outside this package and the libraries that call it."""
    level, frame = 2, sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
