"""The Pallas kernel of an adapted product, run by JAX's interpreter, and its account of itself.

The interpreter fills what lies beyond an array's end, and fresh scratch memory, with NaN.
"""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from one_pass_kernels import assert_equals_the_products

from loha_jax.transform import tpu_product
from loha_jax.transform.tpu_product import LANES, Tiles, TpuProduct

# stack, rows, into, out, R, and the largest tile
SHAPES = [
    (1, 5, 33, 17, 1, 2048),
    (2, 5, 33, 17, 9, 2048),
    (1, 33, 70, 50, 49, 16),
    (2, 20, 33, 17, 128, 16),
    (1, 48, 32, 64, 64, 16),
    (1, 16, 40, 16, 2304, 16),
]


def product(stack, rows, into, out, rank, *, transposed=False, dtype="float32", interpret=True):
    rank = -(-rank // LANES) * LANES
    sizes, highest = (stack, rows, into, out, rank), dtype == "float32"
    return TpuProduct(*sizes, transposed, jnp.dtype(dtype), highest, interpret)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-6), ("bfloat16", 2**-7)])
@pytest.mark.parametrize(("stack", "rows", "into", "out", "rank", "largest"), SHAPES)
def test_equals_the_products_in_float64(
    stack, rows, into, out, rank, largest, dtype, bound, transposed, monkeypatch
):
    monkeypatch.setattr(tpu_product, "_LARGEST_TILES", (largest,))
    kernel = product(stack, rows, into, out, rank, transposed=transposed, dtype=dtype)
    assert_equals_the_products(kernel, bound)


@pytest.mark.parametrize("into", [4096, 11008])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_tiles_of_large_shapes_are_whole_registers(into, dtype):
    kernel = product(1, 4096, into, 14336, 256, dtype=dtype)
    for one in (kernel, kernel.reversed()):
        assert not any(n % LANES for n in one.tiles)
        assert one.vmem_bytes(one.tiles) < tpu_product.VMEM_LIMIT


def test_a_kernel_fits_up_to_some_rank():
    """Both passes have to: tiles of the backward one are others."""
    fits = {r: product(1, 4096, 4096, 4096, r**2, dtype="bfloat16").fits() for r in (8, 64, 128)}
    assert fits == {8: True, 64: True, 128: False}
    one = product(1, 4096, 4096, 64, 64)
    assert one.fits()
    assert one.reversed().reversed() == one


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tiles", [(16, 16, 16), (64, 16, 48), (16, 64, 16), (64, 64, 48)])
@pytest.mark.parametrize("stack", [1, 2])
def test_the_cost_is_what_the_blocks_move(stack, tiles, transposed, monkeypatch):
    """Walk the grid: a block is moved where it is another one than in the step before."""
    kernel, given = product(stack, 50, 64, 40, 9, transposed=transposed), {}
    object.__setattr__(kernel, "tiles", Tiles(*tiles))

    def pallas_call(body, **settings):
        given.update(settings)
        return lambda *arrays: [jnp.zeros(s.shape, s.dtype) for s in settings["out_shape"]]

    monkeypatch.setattr(pl, "pallas_call", pallas_call)
    rank, w = kernel.rank, (40, 64) if transposed else (64, 40)
    shapes = [(stack, *shape) for shape in ((50, 64), w, (rank, 64), (rank, 40))]
    kernel.run(*(jnp.zeros(shape) for shape in shapes))
    specs = zip(
        [*given["in_specs"], *given["out_specs"]],
        [*shapes, (stack, 50, 40), (stack, 50, rank)],
        strict=True,
    )
    moved = 0
    for spec, shape in specs:
        before, block = None, [n or 1 for n in spec.block_shape]
        for step in itertools.product(*map(range, given["grid"])):
            index = [int(i) for i in spec.index_map(*step)]
            if index != before:
                ends = zip(index, block, shape, strict=True)
                moved += 4 * np.prod([min(n, size - i * n) for i, n, size in ends])
            before = index
    cost = given["cost_estimate"]
    assert cost.bytes_accessed == moved
    assert cost.flops == 2 * stack * 50 * (64 * 40 + rank * 64 + rank * 40)
