"""Two processes, one with JAX's methods and one with PyTorch's, which the main one runs in turn.

Nobody trains with both frameworks in one process: there, the threads and the heap of one slow the
other down. A worker that waits for its turn takes no time from the other.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

from benchmarks.case import AUTO, CHOICES, TORCH_METHODS, Case, NotInstalled, Settings
from benchmarks.measure import Timer

if TYPE_CHECKING:
    from benchmarks.torch_peers import Peer

Record = dict[str, Any]


class Workers:
    """The two processes, or only JAX's where torch is missing. They end with the `with` block."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._sides: dict[str, type[_Side]] = {"jax": _JaxSide}
        if importlib.util.find_spec("torch") is not None:
            self._sides["torch"] = _TorchSide
        self._pools = {
            name: ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
            for name in self._sides
        }

    @property
    def has_torch(self) -> bool:
        """True if PyTorch's methods are measured."""
        return "torch" in self._pools

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: Any) -> None:
        for pool in self._pools.values():
            pool.shutdown()

    def open(self, case: Case) -> list[str]:
        """Has both make the case's models, in place of the last ones.

        Returns:
            What is left out, each with the reason.

        Raises:
            NotInstalled: a model itself needs something that is missing.
        """
        missing = []
        for name, side in self._sides.items():
            missing += self._ask(name, _open, side, case.name, self._settings)
        return missing

    def prepare(self, kind: str) -> tuple[dict[str, Record], dict[str, Timer], Record]:
        """Compiles and counts all methods for a kind of run.

        Returns:
            What is known of each method, how to time those that are to be run, and of "auto" what
            it chose.
        """
        methods: dict[str, Record] = {}
        timers: dict[str, Timer] = {}
        auto: Record = {}
        for name in self._pools:
            found, runs, about = self._ask(name, _prepare, kind)
            methods |= found
            timers |= {run: self._timer(name, run) for run in runs}
            auto |= about
        return methods, timers, auto

    def _timer(self, side: str, run: str) -> Timer:
        return lambda times: self._ask(side, _seconds, run, times)

    def _ask(self, side: str, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._pools[side].submit(function, *arguments).result()


# --- what runs in a worker ------------------------------------------------------------------------


class _Side(Protocol):
    """The methods of one framework on one case."""

    timers: dict[str, Timer]
    missing: list[str]

    def __init__(self, case: Case) -> None: ...

    def prepare(self, kind: str) -> tuple[dict[str, Record], Record]:
        """Fills `timers`, and returns what is known of each method and of auto's choice."""
        ...


_side: _Side | None = None


def _open(side: type[_Side], case: str, settings: Settings) -> list[str]:
    from benchmarks.catalogue import find

    global _side
    _side = None  # the last case's arrays are freed first
    _side = side(find(case, settings))
    return _side.missing


def _prepare(kind: str) -> tuple[dict[str, Record], list[str], Record]:
    assert _side is not None
    methods, auto = _side.prepare(kind)
    return methods, list(_side.timers), auto


def _seconds(run: str, times: int) -> float:
    assert _side is not None
    return _side.timers[run](times)


class _JaxSide:
    def __init__(self, case: Case) -> None:
        import jax

        jax.clear_caches()
        self.case, self.model = case, case.jax_model()
        self.timers: dict[str, Timer] = {}
        self.missing: list[str] = []

    def prepare(self, kind: str) -> tuple[dict[str, Record], Record]:
        from benchmarks import jax_methods
        from benchmarks.measure import compile_program, timer

        methods, programs, twins = {}, {}, []
        self.timers.clear()
        for name, method in jax_methods.methods(self.model, self.case.adapter, kind).items():
            programs[name] = program = compile_program(method.function, *method.arguments)
            methods[name] = {"trained_parameters": method.trained_parameters, **program.counts}
            # What "auto" chose is one program with it, run once, or its ratio to itself would be
            # noise.
            if name in CHOICES and program.text == programs[AUTO].text:
                twins.append(name)
            else:
                self.timers[name] = timer(jax_methods.runner(program.run, method))
        strategies = jax_methods.chosen_strategies(self.model, self.case.adapter, kind)
        return methods, {"same_programs": twins, "strategies": strategies}


class _TorchSide:
    def __init__(self, case: Case) -> None:
        from benchmarks.torch_peers import peer

        model = case.torch_model()
        self.timers: dict[str, Timer] = {}
        self.missing: list[str] = []
        self.peers: dict[str, Peer] = {}
        for name in TORCH_METHODS:
            try:
                self.peers[name] = peer(name, model, case.adapter)
            except NotInstalled as missing:
                self.missing.append(str(missing))

    def prepare(self, kind: str) -> tuple[dict[str, Record], Record]:
        from benchmarks.measure import timer

        self.timers = {name: timer(peer.runner(kind)) for name, peer in self.peers.items()}
        return {
            name: {"trained_parameters": peer.trained_parameters, "flops": peer.flops(kind)}
            for name, peer in self.peers.items()
        }, {}
