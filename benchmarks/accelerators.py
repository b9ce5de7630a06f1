"""What the compilers of TPUs and GPUs say of adapted layers, beside the frozen ones and LoRA.

    python -m benchmarks accelerators [--quick] [--only CASE] [--methods ...] [--devices ...]
    python -m benchmarks accelerators --linear IN OUT TOKENS [--rank R] [...]
    python -m benchmarks accelerators --show benchmarks/accelerators.json

Each program is a layer's forward and backward pass: its result, and the gradients of the factors
and of its input for a given gradient of its result, which waits for the result. Kernels and inputs
are bfloat16, factors float32. LoRA has the parameters of the LoHa: rank 2r. "dense" is PEFT's way
in JAX. On a mesh all figures are for one device; collectives are counted with the bytes of their
results. No TPU is needed, the `tpu` extra is, and JAX_PLATFORMS=cpu where there is none; for an
H100 it is the `gpucompiler` extra.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax import lax

import loha_jax
from benchmarks import results
from benchmarks.accelerator_cases import Case, LoraKernel, cases, linear, lora_factors
from benchmarks.accelerator_compilers import TOPOLOGIES, compile_for, figures, gpu, tpu
from benchmarks.case import NotInstalled
from benchmarks.measure import machine
from benchmarks.report import megabytes, ratio, table
from benchmarks.runner import say
from benchmarks.workers import Record

RANK = 8
FROZEN, LORA = "frozen", "LoRA 2r"
STRATEGIES = ("auto", "factored", "fused", "dense")
METHODS = (FROZEN, LORA, *STRATEGIES)
GPU = "H100"
DEVICES = (*TOPOLOGIES, GPU)

ABOUT = """Estimates of the compilers, not a clock: LoHa r={rank} of bfloat16 layers. Forward and
backward, but for 1 to 8 tokens, which are decoded. With few tokens the cycles say little: W is
loaded beside other work, and that is not counted."""


def program(
    case: Case, method: str, rank: int = RANK
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return the function to compile, and its arguments as shapes."""
    trained, frozen, apply = _method(case, method, rank)
    if not case.training:
        return apply, (trained, frozen, case.x)

    shapes = trained

    def step(trained: Any, frozen: Any, x: jax.Array, gradient: jax.Array) -> Any:
        def layer(trained: Any, x: jax.Array) -> jax.Array:
            return apply(trained, frozen, x)

        y, pull_back = jax.vjp(layer, trained, x)
        y, gradient = lax.optimization_barrier((y, gradient))  # as in a model of several layers
        return y, jax.tree.map(_split_as, pull_back(gradient), (shapes, case.x))

    return step, (trained, frozen, case.x, case.result)


def _method(case: Case, method: str, rank: int) -> tuple[Any, Any, Callable[..., jax.Array]]:
    """Return the trained and the frozen parameters, and the layer as a function of both and x."""
    if method == FROZEN:
        return (), case.params, lambda _, frozen, x: case.layer(frozen, x)
    kernels = {name: module["kernel"] for name, module in case.params.items() if "kernel" in module}
    if method == LORA:
        pairs = {name: lora_factors(kernel, 2 * rank) for name, kernel in kernels.items()}

        def with_lora(trained: Any, frozen: Any, x: jax.Array) -> jax.Array:
            adapted = {
                name: {"kernel": LoraKernel(frozen[name]["kernel"], *pair)}
                for name, pair in trained.items()
            }
            return case.layer(frozen | adapted, x)

        return pairs, case.params, with_lora
    config = loha_jax.LoHaConfig(r=rank, alpha=rank, target_modules=list(kernels))
    layouts = {name: "kkio" for name, kernel in kernels.items() if len(kernel.shape) == 4}
    tree = loha_jax.inject(case.params, config, key=jax.random.key(0), layouts=layouts)
    adapted = loha_jax.adapt(case.layer, strategy=method, training=case.training)
    trained, frozen = loha_jax.partition(tree)
    return trained, frozen, lambda t, f, x: adapted(loha_jax.combine(t, f), x)


def _split_as(array: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Return an array split as the argument whose gradient it is."""
    return lax.with_sharding_constraint(array, like.sharding) if like.sharding else array


def records(
    devices: Sequence[str], methods: Sequence[str], chosen: Callable[[str], Iterator[Case]], r: int
) -> Iterator[Record]:
    """Return the figures of methods of rank r for the chosen cases of each kind of device."""
    for kind in devices:
        device = gpu() if kind == GPU else tpu(kind)
        for case in chosen(kind):
            if kind == GPU and case.only_tpus:
                continue
            for method in methods:
                function, arguments = program(case, method, r)
                found = figures(compile_for(case.mesh or device, function, *arguments))
                yield {"device": kind, "case": case.name, "method": method, **found}


def report(found: list[Record], rank: int) -> str:
    """Return one table for each device."""
    parts = [ABOUT.format(rank=rank)]
    for kind in dict.fromkeys(record["device"] for record in found):
        rows = [record for record in found if record["device"] == kind]
        frozen = {record["case"]: record for record in rows if record["method"] == FROZEN}
        meshes = any(record.get("collectives") for record in rows)
        lines = [_row(record, frozen[record["case"]], meshes) for record in rows]
        parts += [f"## {kind}", table(lines)]
    return "\n\n".join(parts)


def _row(record: Record, frozen: Record, meshes: bool) -> dict[str, Any]:
    row = {"case": record["case"], "method": record["method"]}
    if "cycles" in record:
        row |= {
            "million cycles": f"{record['cycles'] / 1e6:.3f}",
            "x frozen's": ratio(record["cycles"] / frozen["cycles"]),
            "GB moved": f"{record['bytes'] / 1e9:.3f}",
            "x frozen's GB": ratio(record["bytes"] / frozen["bytes"]),
        }
    row["temporary MB"] = megabytes(record["temporary_bytes"])
    if meshes:
        row["collectives"] = record.get("collectives", 0)
        row["MB collected"] = megabytes(record.get("collected_bytes", 0))
    return row


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks accelerators",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="one small layer for one kind of TPU")
    parser.add_argument("--only", default="", metavar="CASE", help="cases with this in their names")
    parser.add_argument(
        "--linear",
        nargs=3,
        type=int,
        metavar=("IN", "OUT", "TOKENS"),
        help="this Linear layer alone, in training",
    )
    parser.add_argument("--rank", type=int, default=RANK, help="LoHa's r (%(default)s)")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS[1:],
        default=METHODS[1:],
        metavar="METHOD",
        help="beside the frozen layer, which is always there: %(choices)s (all)",
    )
    parser.add_argument(
        "--devices",
        nargs="+",
        choices=DEVICES,
        default=list(TOPOLOGIES),
        metavar="DEVICE",
        help="some of %(choices)s (the TPUs)",
    )
    parser.add_argument(
        "--json", type=Path, default=Path("out/accelerators.json"), help="results (%(default)s)"
    )
    parser.add_argument("--show", type=Path, metavar="FILE", help="print such results, no more")
    return parser


def main(arguments: list[str]) -> int:
    """Compile, write and print everything."""
    args = _parser().parse_args(arguments)
    if args.show:
        shown = results.read(args.show)
        print(report(shown["records"], shown["settings"]["rank"]))
        return 0

    def chosen(kind: str) -> Iterator[Case]:
        if args.linear:
            return iter([linear(*args.linear, training=True)])
        return (case for case in cases(kind, args.quick) if args.only in case.name)

    found: list[Record] = []
    devices = args.devices[: 1 if args.quick else None]
    try:
        for record in records(devices, [FROZEN, *args.methods], chosen, args.rank):
            found.append(record)
            results.write(args.json, machine(), {"rank": args.rank}, found)
            say(f"{record['device']}, {record['case']}, {record['method']}")
        if not found:
            names = dict.fromkeys(case.name for kind in devices for case in cases(kind, False))
            print(f"No case is called so: {'; '.join(names)}", file=sys.stderr)
            return 2
    except NotInstalled as missing:
        print(f"Not installed: {missing}", file=sys.stderr)
        return 1
    print(report(found, args.rank))
    return 0
