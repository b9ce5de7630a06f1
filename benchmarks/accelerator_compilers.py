"""The compilers of accelerators that this machine may not have, and what they say of a program.

The TPU compiler's schedule has an estimate of each instruction's cycles. It is a model, not a
clock: use it for ratios between programs that were compiled alike. It counts no cycles for Pallas
kernels, for collectives, nor for copies that run beside the rest. The GPU compiler says how much
memory a program takes, and no more. It tunes nothing without a GPU.
"""

import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from benchmarks.case import NotInstalled

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
"""Machines of each kind of TPU, by libtpu's names."""

MESHES = {"v5e": "v5e:4x4", "v5p": "v5p:2x2x4", "v6e": "v6e:4x4"}
"""Those of 16 devices."""

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800
  memory_bandwidth: 3352320000000 device_memory_size: 84942979072
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""What XLA asks a GPU for, as NVIDIA's data sheet and CUDA's tables for this one have it."""

_COLLECTIVE = re.compile(
    r"(?P<name>\S+) = (?P<type>.*?) "
    r"(?:all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-done)?\("
    r"(?:.*?channel_id=(?P<channel>\d+))?"
)

_WITHOUT_A_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",  # else libtpu looks for a metadata server
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def tpu(kind: str) -> Any:
    """Return a device of a kind of TPU to compile for.

    Raises:
        NotInstalled: libtpu is missing.
    """
    return tpus(TOPOLOGIES[kind])[0]


def tpus(topology: str) -> Sequence[Any]:
    """Return the devices of a machine of TPUs, by its name in libtpu, to compile for.

    Raises:
        NotInstalled: libtpu is missing.
    """
    for name, value in _WITHOUT_A_TPU.items():
        os.environ.setdefault(name, value)
    try:
        return topologies.get_topology_desc(topology, platform="tpu").devices
    except RuntimeError as error:
        raise NotInstalled(f"libtpu ({error})") from error


def gpu() -> Any:
    """Return an H100 to compile for.

    Raises:
        NotInstalled: JAX's plugin for CUDA is missing.
    """
    try:
        topology = topologies.get_topology_desc(
            "", platform="cuda", target_config=H100, topology="1x1x1"
        )
    except RuntimeError as error:
        raise NotInstalled(f"the gpucompiler extra ({error})") from error
    return topology.devices[0]


def compile_for(place: Any, function: Callable[..., Any], *arguments: Any) -> jax.stages.Compiled:
    """Compile a function of trees of `jax.ShapeDtypeStruct` for a device or for a mesh.

    It is traced as where such devices are JAX's default ones. On a mesh each argument is split as
    its sharding says; one without is whole on every device.
    """
    if isinstance(place, Mesh):
        devices, whole = list(place.devices.flat), NamedSharding(place, PartitionSpec())
    else:
        devices, whole = [place], SingleDeviceSharding(place)

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or whole)

    with (
        mock.patch("jax.default_backend", return_value=devices[0].platform),
        mock.patch("jax.devices", return_value=devices),
        mock.patch("jax.device_count", return_value=len(devices)),
    ):
        lowered = jax.jit(function).lower(*jax.tree.map(placed, arguments))
    return lowered.compile()


def figures(compiled: jax.stages.Compiled) -> dict[str, float]:
    """Return the compiler's figures of a program, per device.

    They are cycles, bytes moved, FLOPs, temporary bytes, collectives and the bytes of their
    results. The compiler of GPUs gives temporary bytes alone.
    """
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    if not (memory and text):
        raise ValueError("this compiler gives no figures: those of TPUs and GPUs do")
    found = {"temporary_bytes": memory.temp_size_in_bytes}
    if cost:
        moved = collectives(text)
        found |= {"collectives": len(moved), "collected_bytes": sum(map(bytes_of, moved))}
        found |= {"cycles": cycles(text), "bytes": cost["bytes accessed"], "flops": cost["flops"]}
    return found


def cycles(text: str) -> int:
    """Return the sum of the estimated cycles of a program's entry computation."""
    return sum(map(int, re.findall(r'estimated_cycles":"(\d+)"', entry(text))))


def entry(text: str) -> str:
    """Return a program's entry computation: what is inside of its fusions is left out."""
    return text[text.index("\nENTRY") :].split("\n}")[0]


def collectives(text: str) -> list[str]:
    """Return the types of the results of a program's collectives, as `bf16[64,512]{...}`.

    A TPU runs some in steps beside other work: each step has the whole collective in its text, with
    the same channel. One in a loop is one here.
    """
    found = {
        match["channel"] or match["name"]: match["type"] for match in _COLLECTIVE.finditer(text)
    }
    return list(found.values())


def bytes_of(type_: str) -> int:
    """Return the bytes of a type, an array's or a tuple's, as a compiled text has it."""
    arrays = re.findall(r"(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]", type_)
    return sum(
        math.prod(map(int, filter(None, shape.split(",")))) * int(bits or 8) // 8
        for _, bits, shape in arrays
    )
