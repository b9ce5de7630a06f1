"""Peak memory of a training step, in a process that runs nothing else.

    python -m benchmarks.peak_memory CASE METHOD          (llama "loha-jax auto")

The model is made and, in JAX, the step is compiled. Then two steps run, and the figure is the
highest resident memory during them less the resident memory before them: the same for JAX and
PyTorch. malloc is told to give freed memory back to the system at once, or the figure would depend
on its habits. On a GPU it is the allocator's own peak. JAX has XLA's figure beside it, which is
exact, but without the results and what the CPU's kernels take to pack their operands.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from benchmarks import jax_methods
from benchmarks.case import JAX_METHODS, MERGED, TORCH_METHODS, TRAINING, Case, Settings
from benchmarks.measure import compile_program

METHODS = tuple(
    name for name in (*JAX_METHODS, *TORCH_METHODS) if name != MERGED
)  # a merged model is not trained
STEPS = 2
TIME_LIMIT = 1800  # seconds
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def in_new_process(case: str, method: str, settings: Settings) -> dict[str, Any]:
    """Measures in a new process. Where that fails, the result is the error."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.peak_memory",
        case,
        method,
        "--dtype",
        settings.dtype,
    ]
    command += ["--quick"] if settings.quick else []
    try:
        done = subprocess.run(
            command,
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        return {
            "error": (error.stderr.strip() or f"exit status {error.returncode}").splitlines()[-1]
        }
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {TIME_LIMIT} s"}
    return json.loads(done.stdout.splitlines()[-1])


def measure(case: Case, method: str) -> dict[str, Any]:
    """Measures in this process."""
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(
            M_MMAP_THRESHOLD, 1 << 20
        )  # larger blocks are unmapped when they are freed
    return _measure_jax(case, method) if method in JAX_METHODS else _measure_torch(case, method)


def _measure_jax(case: Case, name: str) -> dict[str, Any]:
    model = case.jax_model()
    method = jax_methods.methods(model, case.adapter, TRAINING)[name]
    program = compile_program(method.function, *method.arguments)
    run = jax_methods.runner(program.run, method)
    device = jax.devices()[0]
    if device.platform == "cpu":
        peak = resident_peak(lambda: _steps(run))
    else:
        before = device.memory_stats()["bytes_in_use"]
        _steps(run)
        peak = device.memory_stats()["peak_bytes_in_use"] - before
    return {"peak_bytes": peak, "temporary_bytes": program.counts["temporary_bytes"]}


def _measure_torch(case: Case, name: str) -> dict[str, Any]:
    import torch

    from benchmarks.torch_peers import DEVICE, peer

    run = peer(name, case.torch_model(), case.adapter).step
    if DEVICE == "cpu":
        return {"peak_bytes": resident_peak(lambda: _steps(run))}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _steps(run)
    return {"peak_bytes": torch.cuda.max_memory_allocated() - before}


def _steps(run: Callable[[], Any]) -> None:
    for _ in range(STEPS):
        run()


def resident_peak(run: Callable[[], Any]) -> int:
    """The highest resident memory during a call less that before it, in bytes.

    Linux only: nowhere else can the process' high-water mark be reset.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    """A size in /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def main() -> None:
    from benchmarks.catalogue import find

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case")
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    case = find(args.case, Settings(quick=args.quick, dtype=args.dtype))
    print(json.dumps(measure(case, args.method)))


if __name__ == "__main__":
    main()
