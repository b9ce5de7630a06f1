"""The end of a run on SIGTERM, which a scheduler sends before it takes the machine away."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def sigterm_handler() -> Iterator[Callable[[int], bool]]:
    """Handle SIGTERM inside the block: yields `stop(step)`, which says whether to stop after it.

    A second SIGTERM does what the first would have done without the handler. If `stop` is not
    called after the signal came, the signal is sent again when the block ends. Several processes
    stop after the same step: JAX's preemption service, which has a handler of its own, ensures it.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    if threading.current_thread() is not threading.main_thread():  # only that one handles signals
        yield lambda step: False
        return
    before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
    came = told = False

    def handle(signum: int, frame: object) -> None:
        nonlocal came
        came = True
        signal.signal(signal.SIGTERM, before)

    def stop(step: int) -> bool:
        nonlocal told
        told = came
        return came

    signal.signal(signal.SIGTERM, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
        if came and not told:
            signal.raise_signal(signal.SIGTERM)
