"""Time and memory of merging an adapter into a checkpoint, beside the time of copying it.

    python -m benchmarks.merge_checkpoint [--quick | --full] [--turns N] [--dtype bfloat16]
                                          [--json FILE]

A checkpoint of Llama-2's shapes is made of random numbers in a temporary folder, with a LoHa of
rank 8 for all seven linear modules of every layer. Then, in turns: `cp -r` and a flush of every
file to disk, and a merge in a new process, whose highest resident memory is its own
(`resource.getrusage`). Results are removed after each. `--full` is the whole 7B model (13.5 GB, and
as much again for each result); by default two of its layers; `--quick` shows that it runs.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from loha_jax import LoHaConfig
from loha_jax.interop.disk.checkpoint_writer import CheckpointWriter  # pyright: ignore[reportMissingImports]
from loha_jax.interop.disk.tensor_files import safetensors_bytes  # pyright: ignore[reportMissingImports]

HIDDEN, INTERMEDIATE, VOCABULARY, LAYERS = 4096, 11008, 32000, 32
SHARD = 9_900_000_000  # the 7B model's first shard
RANK = 8

_MERGE = """
import json, resource, sys, time
start = time.perf_counter()
from loha_jax.interop.merge.files import merge_checkpoint
imported = time.perf_counter()
report = merge_checkpoint(sys.argv[1], [(sys.argv[2], 1.0)], sys.argv[3])
done = time.perf_counter()
used = resource.getrusage(resource.RUSAGE_SELF)
cpu = used.ru_utime + used.ru_stime
result = {"import_s": imported - start, "merge_s": done - imported, "cpu_s": cpu}
print(json.dumps({**result, "peak_bytes": used.ru_maxrss * 1024, "merged": report.merged}))
"""


def shapes(layers: int, scale: int) -> dict[str, tuple[int, ...]]:
    """Tensors of a Llama-2-7B with so many layers, its widths divided by a number."""
    hidden, inner, vocabulary = HIDDEN // scale, INTERMEDIATE // scale, VOCABULARY // scale
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for n in range(layers):
        prefix = f"model.layers.{n}"
        result |= {f"{prefix}.self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
        result |= {f"{prefix}.mlp.{p}_proj.weight": (inner, hidden) for p in ("gate", "up")}
        result[f"{prefix}.mlp.down_proj.weight"] = (hidden, inner)
        result |= {f"{prefix}.{p}_layernorm.weight": (hidden,) for p in ("input", "post_attention")}
    return result | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def make_base(folder: Path, tensors: dict[str, tuple[int, ...]], dtype: np.dtype) -> None:
    """Random values, the same few million again and again: which ones does not matter."""
    folder.mkdir()
    random = np.random.default_rng(0).standard_normal(1 << 22).astype(np.float32)
    values = (0.02 * random).astype(dtype)
    with CheckpointWriter(
        folder, [(k, dtype, s) for k, s in tensors.items()], SHARD, metadata={"format": "pt"}
    ) as writer:
        for key, shape in tensors.items():
            writer.write(key, np.resize(values, shape))
        writer.commit()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "torch_dtype": dtype.name})
    )


def make_adapter(folder: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """A PEFT folder for every linear module of the layers."""
    folder.mkdir()
    random = np.random.default_rng(1)
    state = {}
    for key, shape in tensors.items():
        if "_proj" in key:
            for n in "12":
                name = f"base_model.model.{key.removesuffix('.weight')}.hada_w{n}"
                state[f"{name}_a"] = random.normal(0, 0.1, (shape[0], RANK)).astype(np.float32)
                state[f"{name}_b"] = random.normal(0, 0.1, (RANK, shape[1])).astype(np.float32)
    modules = [f"{p}_proj" for p in ("q", "k", "v", "o", "gate", "up", "down")]
    (folder / "adapter_config.json").write_text(
        LoHaConfig(r=RANK, alpha=RANK, target_modules=modules).to_json()
    )
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(state, {"format": "pt"}))


def flush(folder: Path) -> None:
    """Every file of a folder to disk."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def copy(base: Path, out: Path) -> float:
    """Seconds of `cp -r` and a flush."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(base), str(out)], check=True)
    flush(out)
    return time.perf_counter() - start


def merge(base: Path, adapter: Path, out: Path) -> dict[str, float]:
    """Seconds and peak memory of a merge in a new process, its start included in `total_s`."""
    start = time.perf_counter()
    command = [sys.executable, "-c", _MERGE, str(base), str(adapter), str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    return {**json.loads(done.stdout), "total_s": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true")
    size.add_argument("--full", action="store_true")
    parser.add_argument("--layers", type=int, help="of the widths of the 7B model")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    layers = args.layers or (LAYERS if args.full else 2)
    tensors = shapes(layers, 64 if args.quick else 1)
    dtype = np.dtype(ml_dtypes.bfloat16 if args.dtype == "bfloat16" else args.dtype)
    turns = []
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        base, adapter, out = Path(name, "base"), Path(name, "adapter"), Path(name, "out")
        make_base(base, tensors, dtype)
        make_adapter(adapter, tensors)
        flush(base)
        total = sum(file.stat().st_size for file in base.iterdir())
        print(
            f"{total / 1e9:.2f} GB of {dtype.name}, {layers} layers, load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
        for turn in range(args.turns):
            copied = copy(base, out)
            shutil.rmtree(out)
            merged = merge(base, adapter, out)
            shutil.rmtree(out)
            turns.append({"copy_s": copied, **merged, "ratio": merged["total_s"] / copied})
            print(
                f"turn {turn + 1}: copy {copied:.1f} s, merge {merged['total_s']:.1f} s "
                f"({merged['total_s'] / copied:.2f} x; {merged['import_s']:.1f} s of it imports, "
                f"{merged['cpu_s']:.1f} s of CPU), peak {merged['peak_bytes'] / 2**30:.2f} GiB, "
                f"load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
    ratio = statistics.median(turn["ratio"] for turn in turns)
    print(f"median: {ratio:.2f} x the time of copying")
    if args.json:
        args.json.write_text(
            json.dumps(
                {"bytes": total, "layers": layers, "dtype": dtype.name, "turns": turns}, indent=2
            )
        )


if __name__ == "__main__":
    main()
