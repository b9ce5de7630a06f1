"""`TpuProduct`: an adapted product as one kernel for TPUs, y = x·W + (x·KB)·KA.

It passes once over x, W and y where a plain product does, and h = x·KB never leaves the chip before
it is used. The grid goes over the stack, tiles of rows, tiles of free features and, innermost,
tiles of contracted features. The first sweep over the contracted features adds up h beside the
product. h stays on the chip for all tiles of free features; the last step of each sweep adds h·KA.

The backward pass is the same kernel: dx = g·Wᵀ + (g·KAᵀ)·KBᵀ.
"""

# JAX's own functions are only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from loha_jax.transform.one_pass_kernel import OnePassKernel, rows_dot

if TYPE_CHECKING:
    from jax.experimental import pallas as pl

LANES = 128
"""Elements of a register's row: tiles of features and R are multiples of it."""

VMEM_LIMIT = 32 << 20
"""Bytes of on-chip memory that the compiler may use: half of a v5p's. v5e and v6e have more."""

_VMEM_FOR_TILES = 24 << 20
"""Bytes that the tiles may take. The rest is for what the compiler spills."""

_STEP_BYTES = 1 << 18
"""Bytes that are moved in the time that a step of the grid takes to start."""

_FLOPS_PER_BYTE = 256
"""FLOPs in the time of which one byte is moved: 166 (v5p) to 560 (v6e)."""

_LARGEST_TILES = (2048, 1024, 512, 256, 128)


class Tiles(NamedTuple):
    """Sizes of one step's part of the rows, of the contracted and of the free features."""

    rows: int
    into: int
    out: int


class Block(NamedTuple):
    """An operand's share of one step: its tile's shape, its bytes, and the grid's axes it is of.

    Attributes:
        shape: of the tile, without the stack's axis.
        size: bytes of an element.
        axes: for each axis of the tile, the axis of the grid, or None where the tile is whole.
        first: only in the first tile of free features is the tile exchanged.
    """

    shape: tuple[int, int]
    size: int
    axes: tuple[int | None, int | None]
    first: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of the tile on the chip, where the last axis takes whole registers."""
        rows, columns = self.shape
        return -(-rows // 8) * 8 * -(-columns // LANES) * LANES * self.size


@dataclasses.dataclass(frozen=True)
class TpuProduct(OnePassKernel):
    """The kernel; its R is filled up with zeros."""

    rank_unit: ClassVar[int] = LANES
    dtypes: ClassVar[tuple[DTypeLike, ...]] = (jnp.bfloat16, jnp.float32)
    unfit: ClassVar[str] = "R or the features are too many for the chip's memory"

    def fits(self) -> bool:
        """Return whether tiles of this and of the backward kernel fit in a chip's memory."""
        return self.tiles is not None and self.reversed().tiles is not None

    @functools.cached_property
    def tiles(self) -> Tiles | None:
        """The tiles that cost least of those that fit; None where none do."""
        sizes = (_tile_sizes(size) for size in (self.rows, self.into, self.out))
        fitting = [
            tiles
            for tiles in itertools.starmap(Tiles, itertools.product(*sizes))
            if self.vmem_bytes(tiles) <= _VMEM_FOR_TILES
        ]
        return min(fitting, key=self._cost, default=None)

    def _cost(self, tiles: Tiles) -> tuple[float, ...]:
        """Return the cost in moved bytes; of equal ones, large tiles have less."""
        steps = math.prod(self.grid(tiles))
        computed = 2 * steps * math.prod(tiles) / _FLOPS_PER_BYTE  # also beyond an axis' end
        return self.moved_bytes(tiles) + steps * _STEP_BYTES + computed, *(-n for n in tiles)

    def grid(self, tiles: Tiles) -> tuple[int, int, int, int]:
        """Return the numbers of steps: stack, rows, free features, contracted features."""
        return (
            self.stack,
            -(-self.rows // tiles.rows),
            -(-self.out // tiles.out),
            -(-self.into // tiles.into),
        )

    def blocks(self, tiles: Tiles) -> dict[str, Block]:
        """Return each operand's and result's share of a step."""
        rows, into, out = tiles
        size, r = self.dtype.itemsize, self.rank
        w = (
            Block((out, into), size, (2, 3))
            if self.transposed
            else Block((into, out), size, (3, 2))
        )
        return {
            "x": Block((rows, into), size, (1, 3)),
            "w": w,
            "kb": Block((r, into), size, (None, 3), first=True),
            "ka": Block((r, out), size, (None, 2)),
            "y": Block((rows, out), size, (1, 2)),
            "h": Block((rows, r), size, (1, None)),
        }

    def vmem_bytes(self, tiles: Tiles) -> int:
        """Return the bytes that the tiles take: two of each operand, and the sums in float32.

        Where x, W and KB are masked, or split for the highest precision, they are copied.
        """
        blocks = self.blocks(tiles)
        sums = sum(blocks[name]._replace(size=4).bytes for name in ("y", "h"))
        copies = (self.into % tiles.into > 0) + 2 * self.highest
        copied = copies * sum(blocks[name].bytes for name in ("x", "w", "kb"))
        return 2 * sum(block.bytes for block in blocks.values()) + sums + copied

    def moved_bytes(self, tiles: Tiles) -> int:
        """Return the bytes that go between the chip and its memory.

        A tile is moved when the next step needs another one: it is moved again and again in the
        steps of the grid's innermost axis that it is of, and of all axes outside of that one.
        """
        grid, total = self.grid(tiles), 0
        sizes = {1: self.rows, 2: self.out, 3: self.into}
        for block in self.blocks(tiles).values():
            own = {axis for axis in block.axes if axis is not None and grid[axis] > 1}
            innermost = max(own, default=0)
            again = [
                grid[axis]
                for axis in range(1, innermost)
                if axis not in own and not (block.first and axis == 2)
            ]
            whole = [
                n if axis is None else sizes[axis]
                for n, axis in zip(block.shape, block.axes, strict=True)
            ]
            total += self.stack * math.prod(again) * math.prod(whole) * block.size
        return total

    def flops(self) -> int:
        """Return the FLOPs of the three products."""
        products = self.into * self.out + self.rank * (self.into + self.out)
        return 2 * self.stack * self.rows * products

    def run(
        self, x: jax.Array, w: jax.Array, kb: jax.Array, ka: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Return y and h, as `OnePassKernel.run` says."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import tpu as pltpu

        tiles = self.tiles
        assert tiles is not None, "the rule has asked whether it fits"
        blocks, grid = self.blocks(tiles), self.grid(tiles)
        specs = {name: _block_spec(pl, block, grid) for name, block in blocks.items()}
        call = pl.pallas_call(
            functools.partial(_kernel, self, tiles),
            grid=grid,
            in_specs=[specs[name] for name in ("x", "w", "kb", "ka")],
            out_specs=[specs["y"], specs["h"]],
            out_shape=[  # plain products have these types, inside a shard_map too
                jax.eval_shape(functools.partial(rows_dot, axis=axis), x, k)
                for k, axis in ((w, 1 + self.transposed), (kb, 2))
            ],
            scratch_shapes=[pltpu.VMEM(blocks[name].shape, jnp.float32) for name in ("y", "h")],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
                vmem_limit_bytes=VMEM_LIMIT,
            ),
            cost_estimate=pl.CostEstimate(
                flops=self.flops(), bytes_accessed=self.moved_bytes(tiles), transcendentals=0
            ),
            interpret=self.interpret,
            name="adapted_product",
        )
        # Else XLA joins the kernel with what a scan does with h, under a limit of its own.
        y, h = cast(tuple[jax.Array, jax.Array], lax.optimization_barrier(call(x, w, kb, ka)))
        return y, h


def _tile_sizes(size: int) -> set[int]:
    """Return sizes of tiles of an axis: all of it, or whole registers, without a rest if it can."""

    def largest(limit: int) -> int:
        even = [n for n in range(max(LANES, limit // 2), limit + 1, LANES) if size % n == 0]
        return size if size <= limit else max(even, default=limit)

    return {largest(limit) for limit in _LARGEST_TILES}


def _block_spec(pallas: Any, block: Block, grid: tuple[int, ...]) -> pl.BlockSpec:
    """Return a block with the tile that each step needs."""

    def tile(*step: Any) -> tuple[Any, ...]:
        own = list(step)
        if block.first:  # afterwards, the one that is there stays
            own[3] = jnp.where(step[2] == 0, step[3], np.int32(grid[3] - 1))
        return (step[0], *(np.int32(0) if axis is None else own[axis] for axis in block.axes))

    return cast("pl.BlockSpec", pallas.BlockSpec((None, *block.shape), tile))


def _kernel(
    product: TpuProduct, tiles: Tiles, x: Any, w: Any, kb: Any, ka: Any, y: Any, h: Any,
    y_sum: Any, h_sum: Any,
) -> None:  # fmt: skip
    """Compute one step on tiles in the chip's memory.

    Args:
        product: what is computed.
        tiles: their sizes.
        x, w, kb, ka: the operands.
        y, h: the results. h is kept from the first tile of free features on.
        y_sum, h_sum: sums over the contracted features, in float32.
    """
    from jax.experimental import pallas as pl

    out, into, last = pl.program_id(2), pl.program_id(3), product.grid(tiles)[3] - 1
    contracted = int(product.transposed)

    def inside(ref: Any, axis: int) -> jax.Array:
        """Return a tile with zeros for what lies beyond the contracted features: anything may."""
        tile = ref[...]
        if product.into % tiles.into == 0:
            return tile
        index = lax.broadcasted_iota(jnp.int32, tile.shape, axis)
        return jnp.where(index < product.into - into * tiles.into, tile, jnp.zeros_like(tile))

    def dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
        return lax.dot_general(
            a,
            b,
            (((1,), (axis,)), ((), ())),
            precision=lax.Precision.HIGHEST if product.highest else lax.Precision.DEFAULT,
            preferred_element_type=jnp.float32,
        )

    @pl.when(into == 0)
    def _() -> None:
        y_sum[...] = jnp.zeros_like(y_sum)

    y_sum[...] += dot(inside(x, 1), inside(w, contracted), contracted)

    @pl.when((out == 0) & (into == 0))
    def _() -> None:
        h_sum[...] = jnp.zeros_like(h_sum)

    @pl.when(out == 0)
    def _() -> None:
        h_sum[...] += dot(inside(x, 1), inside(kb, 1), 1)

    @pl.when((out == 0) & (into == last))
    def _() -> None:
        h[...] = h_sum[...].astype(h.dtype)

    @pl.when(into == last)
    def _() -> None:
        y[...] = (y_sum[...] + dot(h[...], ka[...], 0)).astype(y.dtype)
