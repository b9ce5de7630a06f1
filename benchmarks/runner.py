"""Runs a case, all methods in turn: forward pass, training step, peak memory. Makes records."""

from __future__ import annotations

import functools
import statistics
import sys
from collections.abc import Iterator

from benchmarks import peak_memory
from benchmarks.case import (
    AUTO,
    CHOICES,
    JAX_FROZEN,
    JAX_METHODS,
    KINDS,
    PALLAS,
    PEFT_LOHA,
    TORCH_FROZEN,
    Case,
    Settings,
    frozen_of,
)
from benchmarks.measure import interleaved_seconds, median_ratio
from benchmarks.workers import Record, Workers

MEMORY = "peak memory"
"""The third kind of record, beside the two of `KINDS`."""


def records(case: Case, settings: Settings, workers: Workers) -> Iterator[Record]:
    """Measures a case, one record at a time.

    Raises:
        NotInstalled: the model itself needs something that is missing. Missing peers are left out.
    """
    if not workers.has_torch:
        say("torch is not installed: only JAX is measured", once=True)
    for missing in workers.open(case):
        say(f"left out: {missing}", once=True)
    about = {"subject": case.subject, "case": case.name, "shape": case.shape}
    names: list[str] = []
    for kind in KINDS:
        measured = _measured(workers, kind, settings)
        names = list(measured["methods"])
        yield about | {"kind": kind} | measured
    if case.process_memory:
        yield about | {"kind": MEMORY, "methods": _peaks(names, case, settings)}


def _measured(workers: Workers, kind: str, settings: Settings) -> Record:
    """Counts and times of all methods, and how well "auto" chose."""
    methods, timers, auto = workers.prepare(kind)
    seconds = interleaved_seconds(timers, repeats=settings.repeats, budget=settings.budget)
    seconds |= dict.fromkeys(auto["same_programs"], seconds[AUTO])
    for name, times in seconds.items():
        methods[name] |= timings(times)
        for key, reference in {"over_frozen": frozen_of(name), "over_peft_loha": PEFT_LOHA}.items():
            if reference in seconds:
                methods[name][key] = median_ratio(times, seconds[reference])
    by_flops = min(CHOICES, key=lambda name: methods[name]["flops"])
    by_time = min(CHOICES, key=lambda name: methods[name]["median"])
    auto |= {
        "best_by_flops": by_flops,
        "flops_over_best": methods[AUTO]["flops"] / methods[by_flops]["flops"],
        "best_by_time": by_time,
        "time_over_best": median_ratio(seconds[AUTO], seconds[by_time]),
    }
    return {"methods": methods, "auto": auto}


def timings(seconds: list[float]) -> Record:
    """Wall times with their median."""
    return {"median": statistics.median(seconds), "seconds": [float(f"{s:.4g}") for s in seconds]}


def _peaks(measured: list[str], case: Case, settings: Settings) -> dict[str, Record]:
    """Peak memory of a training step with each method, in a process of its own."""
    jax_methods = set(JAX_METHODS) - {PALLAS}  # which runs on some accelerators alone
    names = [name for name in peak_memory.METHODS if name in jax_methods.union(measured)]
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
