"""The settings under which this library's own arithmetic runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import jax

_MORE: list[Callable[[], AbstractContextManager[object]]] = []


def also_enter(context: Callable[[], AbstractContextManager[object]]) -> None:
    """Let `standard_promotion` enter another context, too.

    For a library that changes what JAX's functions do while a model runs: they do here what JAX
    says, also in derivatives, which JAX may trace while the model runs.
    """
    _MORE.append(context)


@contextlib.contextmanager
def standard_promotion() -> Iterator[None]:
    """Use JAX's defaults for dtypes and ranks, as a context or a decorator.

    Callers may have `jax_numpy_dtype_promotion="strict"` or `jax_numpy_rank_promotion="raise"`,
    which are meant for the model's code: that is traced outside of this.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
        stack.enter_context(jax.numpy_rank_promotion("allow"))
        for context in _MORE:
            stack.enter_context(context())
        yield
