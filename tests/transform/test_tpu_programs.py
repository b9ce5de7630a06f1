"""Adapted products as the compiler of TPUs makes them. It needs no TPU; libtpu is in `[bench]`."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from loha_jax.transform.pallas_product import LANES, VMEM_LIMIT, PallasProduct

PROGRAMS = Path(__file__).parents[1] / "helpers" / "tpu_programs.py"
# rows, features in and out, rank, layout of the kernel, dtype
LINEAR = [
    (4096, 4096, 4096, 8, "io", "bfloat16"),
    (4096, 4096, 4096, 16, "sio", "bfloat16"),
    (4096, 4096, 14336, 16, "io", "bfloat16"),
    (4096, 14336, 4096, 8, "oi", "bfloat16"),
]
ODD = [(1000, 5000, 3000, 8, "io", "float32"), (17, 65, 33, 3, "oi", "bfloat16")]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize(
    ("topology", "cases"), [("v5e:2x2", LINEAR), ("v5p:2x2x1", LINEAR[2:]), ("v6e:2x2", ODD)]
)
def test_kernels_compile_and_fit_in_the_memory_of_a_tpu(topology, cases):
    """A step has two, that move and use what they say, and no copy of the weight."""
    ran = subprocess.run(
        [sys.executable, PROGRAMS, topology, *(",".join(map(str, (*c, "pallas"))) for c in cases)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    for line, case in zip(ran.stdout.splitlines(), cases, strict=True):
        rows, into, out, rank, layout, dtype = case
        program = json.loads(line)
        kernel = PallasProduct(
            stack=1,
            rows=rows,
            into=into,
            out=out,
            rank=-(-(rank**2) // LANES) * LANES,
            transposed=layout == "oi",
            dtype=jnp.dtype(dtype),
            highest=dtype == "float32",
            interpret=False,
        )
        passes = [kernel, kernel.reversed()]
        moved = sorted(one.moved_bytes(one.tiles) for one in passes)
        assert sorted(used["moved"] for used in program["kernels"]) == moved
        assert all(used["vmem"] <= VMEM_LIMIT for used in program["kernels"])
        if cases is not ODD and into != out:  # else x and dx have its shape too
            assert program["made"] == []
