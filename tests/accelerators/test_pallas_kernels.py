"""Kernels of `strategy="pallas"`, as the compiler of TPUs makes them."""

import re

import jax
import jax.numpy as jnp
import pytest

import loha_jax
from benchmarks.accelerator_compilers import compile_for, tpu
from loha_jax.transform.tpu_product import LANES, VMEM_LIMIT, TpuProduct

# rows, features in and out, rank, layout of the kernel, dtype
LINEAR = [
    (4096, 4096, 4096, 8, "io", "bfloat16"),
    (4096, 4096, 4096, 16, "sio", "bfloat16"),
    (4096, 4096, 14336, 16, "io", "bfloat16"),
    (4096, 14336, 4096, 8, "oi", "bfloat16"),
]
ODD = [(1000, 5000, 3000, 8, "io", "float32"), (17, 65, 33, 3, "oi", "bfloat16")]
CASES = [
    *(("v5e", *case) for case in LINEAR),
    *(("v5p", *case) for case in LINEAR[2:]),
    *(("v6e", *case) for case in ODD),
]


def compiled(kind, rows, into, out, rank, layout, dtype):
    """The result and the gradients of the input and the factors; "sio" is a scan over 3 layers.

    Products have the highest precision, which takes the most memory.
    """
    config = loha_jax.LoHaConfig(r=rank, target_modules=["m"])
    shape = {"io": (into, out), "oi": (out, into), "sio": (3, into, out)}[layout]
    x, g = (jax.ShapeDtypeStruct((rows, n), dtype) for n in (into, out))

    def model(p, x):
        if layout == "sio":
            return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["m"])[0]
        return x @ (p["m"] if layout == "io" else jnp.transpose(p["m"]))

    apply = loha_jax.adapt(model, strategy="pallas")

    def step(trained, frozen, x, g):
        def run(trained, x):
            return apply(loha_jax.combine(trained, frozen), x)

        y, pull_back = jax.vjp(run, trained, x)
        return y, pull_back(g)

    weight = {"m": jax.ShapeDtypeStruct(shape, dtype)}
    tree = loha_jax.inject(weight, config, key=jax.random.key(0), layouts={"m": layout})
    with jax.default_matmul_precision("highest"):
        return compile_for(tpu(kind), step, *loha_jax.partition(tree), x, g)


@pytest.mark.parametrize(("kind", "rows", "into", "out", "rank", "layout", "dtype"), CASES)
def test_they_compile_and_fit_in_the_memory_of_a_tpu(kind, rows, into, out, rank, layout, dtype):
    """A step has two, that move and use what they say, and no copy of the weight."""
    text = compiled(kind, rows, into, out, rank, layout, dtype).as_text()
    kernels = [line for line in text.splitlines() if '"tpu_custom_call"' in line]
    kernel = TpuProduct(
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
    moved = sorted(one.moved_bytes(one.tiles) for one in (kernel, kernel.reversed()))
    said = [re.findall(r'"bytes_accessed":"(\d+)"', line)[0] for line in kernels]
    assert sorted(map(int, said)) == moved
    for line in kernels:
        used = re.findall(r'used_scoped_memory_configs.*?"size":"(\d+)"', line)[0]
        assert int(used) <= VMEM_LIMIT
    if into != out and rows == 4096:  # else x and dx have its shape too, or W is copied on the chip
        made = rf"= \w+\[(?:1,)?(?:{into},{out}|{out},{into})\]\S* (\w[\w-]*)\("
        assert {*re.findall(made, text)} <= {"parameter", "bitcast", "get-tuple-element"}
