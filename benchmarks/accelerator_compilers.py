"""The compilers of accelerators that this machine may not have, and what they say of a program.

The TPU compiler's schedule has an estimate of each instruction's cycles. It is a model, not a
clock: use it for ratios between programs that were compiled alike. It counts no cycles for Pallas
kernels, nor for copies that run beside the rest.
"""

import os
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from benchmarks.case import NotInstalled

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
"""Machines of each kind of TPU, by libtpu's names."""

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
    for name, value in _WITHOUT_A_TPU.items():
        os.environ.setdefault(name, value)
    try:
        return topologies.get_topology_desc(TOPOLOGIES[kind], platform="tpu").devices[0]
    except RuntimeError as error:
        raise NotInstalled(f"libtpu ({error})") from error


def compile_for(device: Any, function: Callable[..., Any], *arguments: Any) -> jax.stages.Compiled:
    """Compile a function of trees of `jax.ShapeDtypeStruct` for a device.

    It is traced as where such devices are JAX's default ones.
    """
    place = SingleDeviceSharding(device)

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    with mock.patch("jax.default_backend", return_value=device.platform):
        lowered = jax.jit(function).lower(*jax.tree.map(placed, arguments))
    return lowered.compile()


def figures(compiled: jax.stages.Compiled) -> dict[str, float]:
    """Return the compiler's figures of a program: cycles, bytes moved, FLOPs, temporary bytes."""
    cost, memory, text = (
        compiled.cost_analysis(),
        compiled.memory_analysis(),
        compiled.as_text(),
    )
    if not (cost and memory and text):
        raise ValueError("this compiler gives no figures: the compilers of TPUs give all")
    return {
        "cycles": cycles(text),
        "bytes": cost["bytes accessed"],
        "flops": cost["flops"],
        "temporary_bytes": memory.temp_size_in_bytes,
    }


def cycles(text: str) -> int:
    """Return the sum of the estimated cycles of a program's entry computation."""
    return sum(map(int, re.findall(r'estimated_cycles":"(\d+)"', entry(text))))


def entry(text: str) -> str:
    """Return a program's entry computation: what is inside of its fusions is left out."""
    return text[text.index("\nENTRY") :].split("\n}")[0]
