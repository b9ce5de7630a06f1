"""Runs a case: forward pass and training step, each with all methods in turn, and their peak memory. Makes records."""

from __future__ import annotations

import functools
import importlib.util
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax

from benchmarks import jax_methods, peak_memory
from benchmarks.case import (
    AUTO,
    CHOICES,
    JAX_FROZEN,
    JAX_METHODS,
    KINDS,
    PEFT_LOHA,
    TORCH_FROZEN,
    TORCH_METHODS,
    Case,
    NotInstalled,
    Settings,
    frozen_of,
)
from benchmarks.measure import Program, compile_program, interleaved_seconds, median_ratio

if TYPE_CHECKING:
    from benchmarks.torch_peers import Peer

Record = dict[str, Any]

MEMORY = "peak memory"
"""The third kind of record, beside the two of `KINDS`."""


def records(case: Case, settings: Settings) -> Iterator[Record]:
    """Measures a case, one record at a time.

    Raises:
        NotInstalled: the model itself needs something that is missing. Missing peers are left out.
    """
    model = case.jax_model()
    peers = torch_peers(case)
    about = {"subject": case.subject, "case": case.name, "shape": case.shape}
    for kind in KINDS:
        yield about | {"kind": kind} | _measured(model, peers, case, kind, settings)
    jax.clear_caches()
    if case.process_memory:
        yield about | {"kind": MEMORY, "methods": _peaks(list(peers), case, settings)}


def torch_peers(case: Case) -> dict[str, Peer]:
    """Those whose packages are installed."""
    if importlib.util.find_spec("torch") is None:
        say("torch is not installed: only JAX is measured", once=True)
        return {}
    from benchmarks.torch_peers import peer

    model = case.torch_model()
    peers = {}
    for name in TORCH_METHODS:
        try:
            peers[name] = peer(name, model, case.adapter)
        except NotInstalled as missing:
            say(f"left out: {missing}", once=True)
    return peers


def _measured(
    model: jax_methods.JaxModel, peers: Mapping[str, Peer], case: Case, kind: str, settings: Settings
) -> Record:
    """Counts and times of all methods, and how well "auto" chose."""
    methods: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], Any]] = {}
    programs: dict[str, Program] = {}
    twins: dict[str, str] = {}  # what "auto" chose: one program, run once, or its ratio to itself would be noise
    for name, method in jax_methods.methods(model, case.adapter, kind).items():
        programs[name] = program = compile_program(method.function, *method.arguments)
        methods[name] = {"trained_parameters": method.trained_parameters, **program.counts}
        if name in CHOICES and program.text == programs[AUTO].text:
            twins[name] = AUTO
        else:
            runs[name] = jax_methods.runner(program.run, method)
    for name, peer in peers.items():
        methods[name] = {"trained_parameters": peer.trained_parameters, "flops": peer.flops(kind)}
        runs[name] = peer.runner(kind)
    seconds = interleaved_seconds(runs, repeats=settings.repeats, budget=settings.budget)
    seconds |= {name: seconds[twin] for name, twin in twins.items()}
    for name, times in seconds.items():
        methods[name] |= timings(times)
        for key, reference in {"over_frozen": frozen_of(name), "over_peft_loha": PEFT_LOHA}.items():
            if reference in seconds:
                methods[name][key] = median_ratio(times, seconds[reference])
    by_flops = min(CHOICES, key=lambda name: methods[name]["flops"])
    by_time = min(CHOICES, key=lambda name: methods[name]["median"])
    auto = {
        "same_programs": list(twins),
        "strategies": jax_methods.chosen_strategies(model, case.adapter, kind),
        "best_by_flops": by_flops,
        "flops_over_best": methods[AUTO]["flops"] / methods[by_flops]["flops"],
        "best_by_time": by_time,
        "time_over_best": median_ratio(seconds[AUTO], seconds[by_time]),
    }
    return {"methods": methods, "auto": auto}


def timings(seconds: list[float]) -> Record:
    """Wall times with their median."""
    return {"median": statistics.median(seconds), "seconds": [float(f"{s:.4g}") for s in seconds]}


def _peaks(peers: list[str], case: Case, settings: Settings) -> dict[str, Record]:
    """Peak memory of a training step with each method, in a process of its own."""
    names = [name for name in peak_memory.METHODS if name in (*JAX_METHODS, *peers)]
    if settings.quick:
        names = [name for name in names if name in (JAX_FROZEN, AUTO, TORCH_FROZEN, PEFT_LOHA)]
    peaks = {}
    for name in names:
        say(f"    peak memory: {name}")
        peaks[name] = peak_memory.in_new_process(case.name, name, settings)
    return peaks


def say(line: str, *, once: bool = False) -> None:
    """Prints a line of progress."""
    (_say_once if once else _say)(line)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


_say_once = functools.cache(_say)
