"""A LoHa as a LoRA: `interop.to_lora` beside PEFT's `convert_to_lora`, on one Linear layer.

    python -m benchmarks lora_conversion
    python -m benchmarks.lora_conversion METHOD --width 4096 --r 16 --rank 64        one run

Every run has a process of its own, and the methods take turns. The figures are the seconds of the
conversion alone, the highest resident memory during it less that before it, and the error of the
LoRA measured afterwards: the Frobenius norm of ΔW - B @ A over that of ΔW, in float64 and a few
rows at a time.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks import runner
from benchmarks.case import Settings
from benchmarks.peak_memory import TIME_LIMIT, resident_peak
from benchmarks.workers import Record
from loha_jax import LoHaConfig, interop  # pyright: ignore[reportAttributeAccessIssue]  # pyright sees loha_jax/ alone

SUBJECT = "lora_conversion"
EXACT = "loha-jax to_lora, exact"
BEST = "loha-jax to_lora"
PEFT = "PEFT convert_to_lora"
METHODS = (EXACT, BEST, PEFT)
RANKS = (8, 16)
TURNS = {EXACT: 3, BEST: 3, PEFT: 2}  # PEFT's take minutes

Pair = tuple[np.ndarray, np.ndarray]
"""lora_B and lora_A."""


def records(settings: Settings) -> Iterator[Record]:
    """Measures a record for each rank of the LoHa."""
    width, rank = (128, 16) if settings.quick else (4096, 64)
    methods = METHODS
    if any(importlib.util.find_spec(package) is None for package in ("torch", "peft")):
        runner.say("torch and peft are not installed: PEFT is left out")
        methods = (EXACT, BEST)
    for r in (5,) if settings.quick else RANKS:
        runs: dict[str, list[Record]] = {name: [] for name in methods}
        for turn in range(1 if settings.quick else max(TURNS.values())):
            for name in methods:
                if turn < TURNS[name]:
                    runs[name].append(_in_new_process(name, width, r, rank))
        yield {
            "subject": SUBJECT,
            "case": f"linear-{width}",
            "kind": f"LoHa of r={r} as a LoRA",
            "shape": {"d": width, "r": r, "rank": rank},
            "methods": {name: _summary(results) for name, results in runs.items()},
        }


def _summary(results: list[Record]) -> Record:
    return {
        **runner.timings([result["seconds"] for result in results]),
        "peak_bytes": statistics.median(result["peak_bytes"] for result in results),
        "rank": results[0]["rank"],
        "error": results[0]["error"],
        "reported": results[0]["reported"],
    }


def _in_new_process(method: str, width: int, r: int, rank: int) -> Record:
    command = [sys.executable, "-m", "benchmarks.lora_conversion", method]
    command += ["--width", str(width), "--r", str(r), "--rank", str(rank)]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
        timeout=TIME_LIMIT,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(method: str, width: int, r: int, rank: int) -> Record:
    """Converts once in this process."""
    random = np.random.default_rng(0)
    shapes = {"w1_a": (width, r), "w1_b": (r, width), "w2_a": (width, r), "w2_b": (r, width)}
    factors = {
        f"hada_{part}": random.standard_normal(s).astype(np.float32) for part, s in shapes.items()
    }
    convert = (
        _peft(factors, rank)
        if method == PEFT
        else _loha_jax(factors, None if method == EXACT else rank)
    )
    found: dict[str, Any] = {}

    def run() -> None:
        start = time.perf_counter()
        found["pair"], found["reported"] = convert()
        found["seconds"] = time.perf_counter() - start

    peak = resident_peak(run)
    b, a = found["pair"]
    return {
        "seconds": found["seconds"],
        "peak_bytes": peak,
        "rank": a.shape[0],
        "error": _error(factors, b, a),
        "reported": found["reported"],
    }


def _loha_jax(
    factors: dict[str, np.ndarray], rank: int | None
) -> Callable[[], tuple[Pair, float | None]]:
    width, r = factors["hada_w1_a"].shape
    state = {f"q.{part}": tensor for part, tensor in factors.items()}
    base = {"q": {"kernel": jnp.zeros((width, width))}}
    params = interop.from_peft_state_dict(
        state, LoHaConfig(r=r, alpha=r, target_modules=["q"]), base
    )

    def convert() -> tuple[Pair, float | None]:
        lora = interop.to_lora(params, rank=rank)
        b, a = (lora.tensors[f"base_model.model.q.lora_{part}.weight"] for part in "BA")
        return (b, a), lora.errors["q"]

    return convert


def _peft(factors: dict[str, np.ndarray], rank: int) -> Callable[[], tuple[Pair, float | None]]:
    import peft
    import torch

    width, r = factors["hada_w1_a"].shape
    module = torch.nn.ModuleDict({"q": torch.nn.Linear(width, width, bias=False)})
    model = peft.get_peft_model(module, peft.LoHaConfig(r=r, alpha=r, target_modules=["q"]))  # type: ignore[arg-type]
    state = {f"base_model.model.q.{part}": torch.tensor(tensor) for part, tensor in factors.items()}
    peft.set_peft_model_state_dict(model, state)

    def convert() -> tuple[Pair, float | None]:
        _, state = peft.convert_to_lora(model, rank=rank)
        b, a = (state[f"base_model.model.q.lora_{part}.weight"].numpy() for part in "BA")
        return (b, a), None

    return convert


def _error(factors: dict[str, np.ndarray], b: np.ndarray, a: np.ndarray, rows: int = 256) -> float:
    w1_a, w1_b, w2_a, w2_b = (
        factors[f"hada_{part}"].astype(np.float64) for part in ("w1_a", "w1_b", "w2_a", "w2_b")
    )
    a = a.astype(np.float64)
    difference = total = 0.0
    for start in range(0, len(b), rows):
        block = slice(start, start + rows)
        delta = (w1_a[block] @ w1_b) * (w2_a[block] @ w2_b)
        total += float(np.sum(delta**2))
        difference += float(np.sum((delta - b[block].astype(np.float64) @ a) ** 2))
    return (difference / total) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--r", type=int, default=RANKS[0])
    parser.add_argument("--rank", type=int, default=64)
    args = parser.parse_args()
    print(json.dumps(measure(args.method, args.width, args.r, args.rank)))


if __name__ == "__main__":
    main()
