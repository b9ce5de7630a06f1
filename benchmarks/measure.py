"""What every benchmark shares: XLA's counts, interleaved wall times, the machine's description, tables."""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax


def compiled_counts(fn: Callable[..., Any], *args: Any) -> dict[str, float]:
    """XLA's own analysis of a compiled function: FLOPs, bytes accessed, temporary bytes; and seconds to get there."""
    jax.clear_caches()
    start = time.perf_counter()
    traced = jax.jit(fn).trace(*args)
    traced_at = time.perf_counter()
    compiled = traced.lower().compile()
    compiled_at = time.perf_counter()
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    assert cost is not None
    assert memory is not None
    return {
        "flops": cost["flops"],
        "bytes": cost["bytes accessed"],
        "temporary_bytes": memory.temp_size_in_bytes,
        "trace_seconds": traced_at - start,
        "compile_seconds": compiled_at - traced_at,
    }


def interleaved_seconds(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Wall times of several functions, taken in turn so that a busy machine slows all of them alike.

    The first turn compiles and warms up and is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(seconds: list[float], reference: list[float]) -> float:
    """Median over the turns of one time over the other's in the same turn."""
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=True))


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next(
            (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu
        )
    packages = {}
    for name in ("jax", "jaxlib", "flax", "torch", "peft", "loha-jax"):
        try:
            packages[name] = version(name)
        except ModuleNotFoundError:
            packages[name] = None
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "devices": [d.device_kind for d in jax.devices()],
        "python": platform.python_version(),
        "packages": packages,
        "command": " ".join([f"python -m benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of equal keys as a Markdown table."""
    header = list(rows[0])
    cells = [[str(row[key]) for key in header] for row in rows]
    widths = [max(len(key), *(len(row[n]) for row in cells)) for n, key in enumerate(header)]
    lines = [header, ["-" * w for w in widths], *cells]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def write_json(path: str | None, result: Mapping[str, Any]) -> None:
    """Writes a result beside the printed table, where a path is given."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(result, indent=2) + "\n")
        print(f"\nwritten to {path}")
