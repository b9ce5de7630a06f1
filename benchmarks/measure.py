"""How each figure is taken: XLA's counts, wall times in turn, medians, and the machine."""

import dataclasses
import math
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import psutil

LEAST_TURNS = 3
BURST_SECONDS = 0.01
"""Shorter runs are repeated within a turn up to this time; the turn's figure is their mean."""

PACKAGES = ("jax", "jaxlib", "flax", "transformers", "torch", "peft", "lycoris-lora", "loha-jax")


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled function.

    Attributes:
        run: the function.
        text: what XLA was given. Programs of equal text are the same one.
        counts: what XLA says it costs, and the seconds it took to get there. XLA counts the body of
            a loop once; "flops" has the products and convolutions of a scan's other turns added to
            "xla_flops".
    """

    run: Callable[..., Any]
    text: str
    counts: dict[str, float]


def compile_program(function: Callable[..., Any], *arguments: Any) -> Program:
    """Compiles and counts."""
    start = time.perf_counter()
    traced = jax.jit(function).trace(*arguments)
    traced_at = time.perf_counter()
    lowered = traced.lower()
    compiled = lowered.compile()
    seconds = {
        "trace_seconds": traced_at - start,
        "compile_seconds": time.perf_counter() - traced_at,
    }
    counts = xla_counts(compiled)
    counts["flops"] = counts["xla_flops"] + _flops_of_repeats(traced.jaxpr)
    return Program(compiled, lowered.as_text(), counts | seconds)


def xla_counts(compiled: jax.stages.Compiled) -> dict[str, float]:
    """XLA's own analysis: FLOPs, bytes accessed, bytes of temporaries, arguments and results."""
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    assert cost is not None
    assert memory is not None
    return {
        "xla_flops": cost.get("flops", float("nan")),
        "bytes_accessed": cost.get("bytes accessed", float("nan")),
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
    }


def _flops_of_repeats(jaxpr: Any) -> float:
    """FLOPs of the products and convolutions in scans, less those of one turn each."""
    return _product_flops(jaxpr, whole_loops=True) - _product_flops(jaxpr, whole_loops=False)


def _product_flops(jaxpr: Any, *, whole_loops: bool) -> float:
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        shapes = [variable.aval.shape for variable in (*equation.invars, *equation.outvars)]
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2 * math.prod(shapes[-1]) * math.prod(shapes[0][axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            out_features = shapes[1][equation.params["dimension_numbers"].rhs_spec[0]]
            total += 2 * math.prod(shapes[-1]) * math.prod(shapes[1]) / out_features
        turns = (
            equation.params["length"] if equation.primitive.name == "scan" and whole_loops else 1
        )
        for inner in _inner_jaxprs(equation.params):
            total += turns * _product_flops(inner, whole_loops=whole_loops)
    return total


def _inner_jaxprs(params: dict[str, Any]) -> list[Any]:
    """The jaxprs in an equation; of branches for different platforms, the one for this platform."""
    if platforms := params.get("branches_platforms"):
        chosen = next(
            n
            for n, names in enumerate(platforms)
            if names is None or jax.default_backend() in names
        )
        return [params["branches"][chosen]]
    values = [
        v for value in params.values() for v in (value if isinstance(value, tuple) else (value,))
    ]
    return [value for value in values if hasattr(getattr(value, "jaxpr", value), "eqns")]


Timer = Callable[[int], float]
"""Runs something so many times and returns the mean seconds of a run."""


def timer(run: Callable[..., Any], prepare: Callable[[], Any] | None = None) -> Timer:
    """Times a function that returns when its work is done.

    Args:
        run: the function.
        prepare: makes something for each run: called before it, untimed, and its result is the
            function's argument.
    """

    def seconds(times: int) -> float:
        total = 0.0
        for _ in range(times):
            arguments = (prepare(),) if prepare is not None else ()
            start = time.perf_counter()
            run(*arguments)
            total += time.perf_counter() - start
        return total / times

    return seconds


def interleaved_seconds(
    timers: Mapping[str, Timer], *, repeats: int, budget: float
) -> dict[str, list[float]]:
    """Wall times of several functions, in turns: a busy machine slows all of them alike.

    The order changes from turn to turn. Each timed run follows an untimed one of the same function,
    as in a training loop: after another one, and a pause, a virtual machine has to be given the
    freed memory again. The first turn warms up and is not counted. `repeats` turns follow, fewer
    where `budget` seconds are spent, but not fewer than three. With `repeats=0` the first turn is
    the only one, and counts: enough to see that everything runs.
    """
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    bursts: dict[str, int] = {}
    order = random.Random(0)
    start = time.perf_counter()
    for turn in range(repeats + 1):
        for name in order.sample(list(timers), len(timers)):
            timers[name](1)
            elapsed = timers[name](bursts.get(name, 1))
            if turn or not repeats:
                seconds[name].append(elapsed)
            if not turn:
                bursts[name] = max(1, int(BURST_SECONDS / elapsed))
        if turn >= LEAST_TURNS and time.perf_counter() - start > budget:
            break
    return seconds


def median_ratio(seconds: Sequence[float], reference: Sequence[float]) -> float:
    """Median over the turns of one time over the other's in the same turn."""
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=True))


class Neighbours:
    """CPU time of processes other than this one and its children since `cores` was last called."""

    def __init__(self) -> None:
        self._last = self._read()

    def cores(self) -> float | None:
        """How many cores they used on average; None where there is no /proc/stat."""
        busy, own, now = (
            current - last for current, last in zip(self._read(), self._last, strict=True)
        )
        self._last = self._read()
        return None if math.isnan(busy) else round(max(busy - own, 0) / now, 2)

    def _read(self) -> tuple[float, float, float]:
        """Seconds of all processes, and of this one with its children; and the time.

        Of a child that has ended, the time moves to its parent.
        """
        stat = Path("/proc/stat")
        busy = float("nan")
        if stat.exists():
            user, nice, system, _, _, *interrupts_and_stolen = map(
                int, stat.read_text().split(maxsplit=9)[1:9]
            )
            busy = (user + nice + system + sum(interrupts_and_stolen)) / os.sysconf("SC_CLK_TCK")
        this = psutil.Process()
        own = sum(
            sum(process.cpu_times()[:4]) for process in (this, *this.children(recursive=True))
        )
        return busy, own, time.perf_counter()


def machine() -> dict[str, Any]:
    """The machine that the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        cpu = next(
            (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu
        )
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "devices": [device.device_kind for device in jax.devices()],  # a GPU's name
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
