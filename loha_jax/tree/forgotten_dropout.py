"""A warning, once, if a config asks for dropout and gradients are taken without it."""

from __future__ import annotations

from collections.abc import Iterable

from jax.core import Tracer

from loha_jax.runtime.caller import warn_caller
from loha_jax.tree.factors import Factors

_done: set[str] = set()  # "called": `dropout` was called in this process; "warned"


def note_dropout() -> None:
    """Note that `dropout` was called: no warning is needed any more."""
    _done.add("called")


def warn_of_forgotten_dropout(adapters: Iterable[Factors]) -> None:
    """Warn once if factors are differentiated without the dropout that their config asks for.

    Inside `jax.jit` within `jax.grad` this does not show; then there is no warning.
    """
    if _done:
        return
    for factors in adapters:
        rank_dropout, module_dropout, _ = factors.config.computing
        if (rank_dropout or module_dropout) and is_differentiated(factors.hada_w1_a):
            _done.add("warned")
            warn_caller(
                f"The adapter's config has rank_dropout={rank_dropout} and "
                f"module_dropout={module_dropout}, and nothing applies them: call `params = "
                "loha_jax.dropout(params, key)` in the loss, with a new key for each step (of an "
                "NNX model: `loha_jax.nnx.set_dropout(model, rngs)`), or set both to 0."
            )
            return


def is_differentiated(x: object) -> bool:
    """Return whether an array is one that gradients are taken of, as far as JAX shows it here."""
    return isinstance(x, Tracer) and type(x).__name__ in ("JVPTracer", "LinearizeTracer")
