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
ROWS, INTO = 4096, 4096
CASES = [(out, rank, layout) for out in (4096, 14336) for rank, layout in ((8, "io"), (16, "oi"))]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_kernels_compile_and_fit_in_the_memory_of_a_tpu(topology):
    """A step has two, that move and use what they say, and no copy of the weight."""
    cases = [f"{ROWS},{INTO},{out},{rank},{layout},pallas" for out, rank, layout in CASES]
    ran = subprocess.run(
        [sys.executable, PROGRAMS, topology, *cases], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    for line, (out, rank, layout) in zip(ran.stdout.splitlines(), CASES, strict=True):
        program = json.loads(line)
        kernel = PallasProduct(
            stack=1,
            rows=ROWS,
            into=INTO,
            out=out,
            rank=-(-(rank**2) // LANES) * LANES,
            transposed=layout == "oi",
            dtype=jnp.dtype("bfloat16"),
            precision=None,
            interpret=False,
        )
        passes = [kernel, kernel.reversed()]
        moved = sorted(one.moved_bytes(one.tiles) for one in passes)
        assert sorted(used["moved"] for used in program["kernels"]) == moved
        assert all(used["vmem"] <= VMEM_LIMIT for used in program["kernels"])
        if out != INTO:  # else x, y and their gradients have the weight's shape too
            assert program["made"] == []
