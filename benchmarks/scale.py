"""Llama-3 on 8 to 2,048 devices, on paper: bytes and FLOPs per device, beside what XLA compiles.

    python -m benchmarks.scale [--quick] [--json FILE]

Every linear module has a LoHa, the base is bfloat16, the rest float32; a step has one sequence of
8,192 tokens per index of the mesh's fsdp axis, recomputes each layer in its backward pass (remat)
and ends with AdamW. Bytes come from `jax.eval_shape` and the rules of benchmarks/llama3.py, FLOPs
from XLA's count of one layer, and of the loss, compiled for one device. Then one layer of each size
is compiled for meshes of 8 virtual CPU devices, and XLA's own figures stand beside the predicted
ones. Nothing is allocated or run.

Exit status 1 where a prediction is off by more than 10 %.
"""

import argparse
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from benchmarks import llama3, results
from benchmarks import scale_layer as one
from benchmarks.llama3 import MODELS, Llama3
from benchmarks.measure import machine, xla_counts
from benchmarks.report import megabytes, number, ratio, table
from benchmarks.runner import say
from benchmarks.workers import Record

DEVICES = (8, 32, 128, 512, 2048)
VIRTUAL_DEVICES = 8
RANKS = (8, 16)
LENGTH = 8192
CLOSE = 0.1
"""How far a prediction may be off."""

PARAMETERS, PREDICTION, CHECK = "parameters", "prediction", "check"


@functools.cache
def _adapted_flops(model: Llama3, rank: int) -> float:
    """FLOPs of one sequence in one layer, on one device, by XLA's count; likewise the others."""
    return one.flops(one.compile_step(one.adapted_step(model, rank, 1, LENGTH)))


@functools.cache
def _frozen_flops(model: Llama3) -> float:
    return one.flops(one.compile_step(one.frozen_step(model, 1, LENGTH)))


@functools.cache
def _loss_flops(model: Llama3) -> float:
    return one.flops(one.compile_head(model, 1, LENGTH))


def predict(model: Llama3, rank: int, devices: int) -> Record:
    """One row of the first table."""
    fsdp, tensor = devices // model.tensor, model.tensor
    mesh = AbstractMesh((fsdp, tensor), ("fsdp", "tensor"), (AxisType.Auto, AxisType.Auto))
    step = one.adapted_step(model, rank, fsdp, LENGTH, mesh, remat=False)
    kernels = sum(into * out for into, out, _ in model.kernels.values())
    held = {
        "base": model.layers * one.bytes_per_device(step.frozen)
        + one.bytes_per_device(llama3.outer_params(model, mesh)),
        "factors": model.layers * one.bytes_per_device(step.trainable),
        "gradients": model.layers * one.bytes_per_device(step.trainable),
        "optimizer": model.layers * one.bytes_per_device(step.state),
        "layer_inputs": model.layers * one.bytes_per_device(step.x),
        "layer_or_logits": max(
            one.kept_bytes(model, step, fsdp, tensor), 2 * 4 * LENGTH * llama3.VOCABULARY // tensor
        ),
        "gathered": 2 * kernels // tensor,
    }
    adapted, frozen = (
        (model.layers * of_layer + _loss_flops(model)) / tensor
        for of_layer in (_adapted_flops(model, rank), _frozen_flops(model))
    )
    return {
        "kind": PREDICTION,
        "model": model.name,
        "rank": rank,
        "devices": devices,
        "fsdp": fsdp,
        "tensor": tensor,
        "bytes": held,
        "total_bytes": sum(held.values()),
        "flops": adapted,
        "frozen_flops": frozen,
        "peft_layer_bytes": 4 * kernels // tensor,
        "peft_all_layers_bytes": model.layers * 4 * kernels // tensor,
        "peft_flops": frozen + model.layers * _peft_layer_flops(kernels, rank) / tensor,
    }


def _peft_layer_flops(kernels: int, rank: int) -> float:
    """The FLOPs that PEFT's LoHa adds to a layer's step of one sequence.

    ΔW is built in both forward passes, from two products and two Hadamard products; its backward
    pass builds both products again and has four more, one per factor. x·ΔW is as large as the
    frozen product: in both forward passes, and for the gradients of x and of ΔW.
    """
    builds = 2 * (4 * rank + 2) + 12 * rank + 3
    return kernels * (builds + (2 + 2) * 2.0 * LENGTH)


def check(model: Llama3, rank: int, fsdp: int, tensor: int) -> Record:
    """Compiles a layer for a mesh of virtual devices: predicted and compiled figures per device."""
    mesh = llama3.make_mesh(fsdp, tensor)
    step = one.adapted_step(model, rank, fsdp, LENGTH, mesh)
    whole = one.adapted_step(model, rank, fsdp, LENGTH, mesh, remat=False)
    trained, x = one.bytes_per_device((step.trainable, step.state)), one.bytes_per_device(step.x)
    compiled, kept = xla_counts(one.compile_step(step)), xla_counts(one.compile_kept(whole))
    figures = {
        "arguments": (
            one.bytes_per_device(step.frozen) + trained + 2 * x,
            compiled["argument_bytes"],
        ),
        "results": (trained + x, compiled["output_bytes"]),
        "kept": (one.kept_bytes(model, whole, fsdp, tensor), kept["output_bytes"]),
        "flops": (_adapted_flops(model, rank) / tensor, compiled["xla_flops"]),
    }
    return {
        "kind": CHECK,
        "model": model.name,
        "rank": rank,
        "fsdp": fsdp,
        "tensor": tensor,
        **{
            name: {"predicted": a, "compiled": b, "ratio": b / a}
            for name, (a, b) in figures.items()
        },
        "temporary_bytes": compiled["temporary_bytes"],
        "off": [name for name, (a, b) in figures.items() if abs(b / a - 1) > CLOSE],
    }


def records(quick: bool) -> Iterator[Record]:
    """All figures; of the smallest model alone where it has to be quick."""
    for model in MODELS.values():
        yield {"kind": PARAMETERS, "model": model.name, "parameters": _parameters(model)}
    models = list(MODELS.values())[: 1 if quick else None]
    ranks = RANKS[: 1 if quick else None]
    for model in models:
        for rank in ranks:
            for devices in DEVICES:
                yield predict(model, rank, devices)
    for model in models:
        meshes = dict.fromkeys(
            [model.tensor, 4]
        )  # the tables' own mesh, and one that has both axes for all sizes
        for tensor in list(meshes)[: 1 if quick else None]:
            for rank in ranks:
                yield check(model, rank, VIRTUAL_DEVICES // tensor, tensor)


def _parameters(model: Llama3) -> int:
    of_layer, outer = llama3.layer_params(model), llama3.outer_params(model)
    return sum(leaf.size for leaf in jax.tree.leaves(of_layer)) * model.layers + sum(
        leaf.size for leaf in jax.tree.leaves(outer)
    )


# --- tables ---------------------------------------------------------------------------------------


def report(found: list[Record]) -> str:
    """Both tables."""
    predictions, checks = ([r for r in found if r["kind"] == kind] for kind in (PREDICTION, CHECK))
    return "\n\n".join(
        (
            "## Predicted, per device",
            table(list(map(_prediction_row, predictions))),
            "## One layer, compiled for 8 virtual CPU devices: predicted, and compiled over "
            "predicted",
            table(list(map(_check_row, checks))),
        )
    )


def _prediction_row(r: Record) -> Record:
    held = r["bytes"]
    return {
        "model": r["model"],
        "r": r["rank"],
        "devices": r["devices"],
        "fsdp x tensor": f"{r['fsdp']} x {r['tensor']}",
        "base GB": _gigabytes(held["base"]),
        "factors MB": megabytes(held["factors"]),
        "gradients MB": megabytes(held["gradients"]),
        "optimizer MB": megabytes(held["optimizer"]),
        "activations GB": _gigabytes(held["layer_inputs"] + held["layer_or_logits"]),
        "gathered GB": _gigabytes(held["gathered"]),
        "total GB": _gigabytes(r["total_bytes"]),
        "TFLOP": number(r["flops"] / 1e12, 4),
        "over frozen": ratio(r["flops"] / r["frozen_flops"], 3),
        "PEFT: ΔW of one layer GB": _gigabytes(r["peft_layer_bytes"]),
        "of all layers GB": _gigabytes(r["peft_all_layers_bytes"]),
        "FLOPs over frozen": ratio(r["peft_flops"] / r["frozen_flops"], 3),
    }


def _check_row(r: Record) -> Record:
    def over(name: str) -> str:
        return ratio(r[name]["ratio"], 4)

    return {
        "model": r["model"],
        "r": r["rank"],
        "fsdp x tensor": f"{r['fsdp']} x {r['tensor']}",
        "arguments MB": megabytes(r["arguments"]["predicted"]),
        "compiled arguments": over("arguments"),
        "results MB": megabytes(r["results"]["predicted"]),
        "compiled results": over("results"),
        "kept activations MB": megabytes(r["kept"]["predicted"]),
        "compiled kept": over("kept"),
        "GFLOP": number(r["flops"]["predicted"] / 1e9, 5),
        "compiled FLOPs": over("flops"),
        "temporary MB (not predicted)": megabytes(r["temporary_bytes"]),
        "within 10 %": f"no: {', '.join(r['off'])}" if r["off"] else "yes",
    }


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="8B, rank 8 and one mesh")
    parser.add_argument(
        "--json", type=Path, default=Path("out/scale.json"), help="the figures (%(default)s)"
    )
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", VIRTUAL_DEVICES)
    about: dict[str, Any] = machine() | {
        "command": " ".join(["python -m benchmarks.scale", *sys.argv[1:]])
    }
    found: list[Record] = []
    for record in records(args.quick):
        found.append(record)
        results.write(args.json, about, {"quick": args.quick, "length": LENGTH}, found)
        say(
            " ".join(
                str(record[key])
                for key in ("kind", "model", "rank", "devices", "fsdp")
                if key in record
            )
        )
    print(report(found))
    print(f"\nwritten to {args.json}")
    return 1 if any(record.get("off") for record in found) else 0


if __name__ == "__main__":
    sys.exit(main())
