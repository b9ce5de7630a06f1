"""Compiles a training step of one adapted Linear for TPUs, on a machine that has none.

    python tpu_programs.py v5e:2x2 4096,4096,4096,8,io,bfloat16,pallas

A case is rows, features in and out, rank, layout, dtype and strategy. The compiler is libtpu's
own: it checks layouts and the use of the chip's memory. Printed is JSON, a line for each case: the
FLOPs and bytes of the program, of each kernel the bytes of VMEM that it uses and those that it says
it moves, and what makes arrays of the weight's shape. "sio" is a scan over three layers.
"""

import json
import os
import re
import sys
from unittest import mock

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # else libtpu looks for a server of the machine's data
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # in several processes at once
}

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import loha_jax


def compiled(topology, rows, into, out, rank, layout, dtype, strategy):
    """The result and the gradients of the input and the factors.

    Products have the highest precision, which takes the most memory.
    """
    device = topologies.get_topology_desc(topology, platform="tpu").devices[0]
    config = loha_jax.LoHaConfig(r=rank, target_modules=["m"])
    shapes = {"io": (into, out), "oi": (out, into), "sio": (3, into, out)}
    weight = jax.ShapeDtypeStruct(shapes[layout], dtype)
    x, g = (jax.ShapeDtypeStruct((rows, n), dtype) for n in (into, out))

    def injected(weight):
        return loha_jax.inject({"m": weight}, config, key=jax.random.key(0), layouts={"m": layout})

    def model(p, x):
        if layout == "sio":
            return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["m"])[0]
        return x @ (p["m"] if layout == "io" else jnp.transpose(p["m"]))

    apply = loha_jax.adapt(model, strategy=strategy)

    def step(trained, frozen, x, g):
        def run(trained, x):
            return apply(loha_jax.combine(trained, frozen), x)

        y, pull_back = jax.vjp(run, trained, x)
        return y, pull_back(g)

    place = SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place),
        (*loha_jax.partition(jax.eval_shape(injected, weight)), x, g),
    )
    backend = mock.patch("jax.default_backend", return_value="tpu")
    with backend, jax.default_matmul_precision("highest"):
        return jax.jit(step).lower(*arguments).compile()


def described(program, into, out):
    text, cost = program.as_text(), program.cost_analysis()
    kernels = [line for line in text.splitlines() if '"tpu_custom_call"' in line]
    made = rf"= \w+\[(?:1,)?(?:{into},{out}|{out},{into})\]\S* (\w[\w-]*)\("
    return {
        "flops": cost["flops"],
        "bytes": cost["bytes accessed"],
        "kernels": [
            {
                "vmem": int(re.findall(r'used_scoped_memory_configs.*?"size":"(\d+)"', line)[0]),
                "moved": int(re.findall(r'"bytes_accessed":"(\d+)"', line)[0]),
            }
            for line in kernels
        ],
        "made": sorted({*re.findall(made, text)} - {"parameter", "bitcast", "get-tuple-element"}),
    }


if __name__ == "__main__":
    for case in sys.argv[2:]:
        *numbers, layout, dtype, strategy = case.split(",")
        rows, into, out, rank = map(int, numbers)
        program = compiled(sys.argv[1], rows, into, out, rank, layout, dtype, strategy)
        print(json.dumps(described(program, into, out)), flush=True)
