"""`HopperProduct`: an adapted product as one kernel for NVIDIA's Hopper, y = x·W + h·KA.

XLA computes h = x·KB before it. A block of the grid makes one tile of y: a group of warps loads
tiles of x and W, then of h and KA, and two others add up their products. So h·KA is the sum's last
steps, and nothing of y's shape is read again.

The backward pass is the same kernel: dx = g·Wᵀ + dh·KBᵀ with dh = g·KAᵀ.
"""

# JAX's own functions are only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportPrivateImportUsage=false

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from loha_jax.runtime.device_types import vary_alike
from loha_jax.transform.one_pass_kernel import OnePassKernel, rows_dot

ROWS, INTO = 128, 64
"""Sizes of a tile of x: rows, and contracted features of one step."""

_STAGES = 4
"""Steps whose tiles are in shared memory at a time."""

_GROUPS = 2
"""Groups of warps that multiply, each for a part of a tile's free features."""

_COLUMNS = 64
"""Free features that a group writes at a time."""

_BESIDE = 8
"""Tiles of free features that run before the next tile of rows: they share x, the next ones W."""


@dataclasses.dataclass(frozen=True)
class HopperProduct(OnePassKernel):
    """The kernel; its R is filled up with zeros."""

    rank_unit: ClassVar[int] = INTO
    dtypes: ClassVar[tuple[DTypeLike, ...]] = (jnp.bfloat16, jnp.float16)
    unfit: ClassVar[str] = f"rows or features are not a multiple of {ROWS}"

    def fits(self) -> bool:
        """Return whether whole tiles make up the arrays of this and of the backward kernel."""
        return not any(size % ROWS for size in (self.rows, self.into, self.out))

    @property
    def tile_out(self) -> int:
        """Free features of a tile of y."""
        return 256 if self.out % 256 == 0 else 128

    @property
    def tiles(self) -> tuple[int, int]:
        """Numbers of tiles of y: of rows and of free features."""
        return self.rows // ROWS, self.out // self.tile_out

    @property
    def steps(self) -> tuple[int, int]:
        """Numbers of steps: of x·W, and of h·KA."""
        return self.into // INTO, self.rank // INTO

    def flops(self) -> int:
        """Return the FLOPs of x·W and h·KA."""
        return 2 * self.stack * self.rows * self.out * (self.into + self.rank)

    def moved_bytes(self) -> int:
        """Return the bytes that go to and from the blocks; some of them come from the cache."""
        rows, out = self.tiles
        loaded = rows * out * (ROWS + self.tile_out) * (self.into + self.rank)
        return self.stack * (loaded + self.rows * self.out) * self.dtype.itemsize

    def run(
        self, x: jax.Array, w: jax.Array, kb: jax.Array, ka: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Return y and h, as `OnePassKernel.run` says."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        h = rows_dot(x, kb, 2)
        ka = jnp.swapaxes(ka, 1, 2) if self.transposed else ka  # a tile of it is as one of W
        rows, out = self.tiles
        swizzled = (plgpu.TilingTransform((8, INTO)), plgpu.SwizzleTransform(2 * INTO))
        tile_w = (self.tile_out, INTO) if self.transposed else (INTO, self.tile_out)

        def tiles(*shape: int) -> Any:
            return plgpu.SMEM(shape, self.dtype, transforms=swizzled)

        call = plgpu.kernel(
            functools.partial(_kernel, self),
            out_type=jax.ShapeDtypeStruct((self.stack, self.rows, self.out), self.dtype),
            scratch_types={
                "x_tiles": tiles(_STAGES, ROWS, INTO),
                "w_tiles": tiles(_STAGES, *tile_w),
                "y_tiles": tiles(_GROUPS, ROWS, _COLUMNS),
                "loaded": plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
                "used": plgpu.Barrier(num_arrivals=_GROUPS, num_barriers=_STAGES),
            },
            grid=(self.stack, rows * out),
            grid_names=("stack", "tile"),
            num_threads=_GROUPS + 1,
            thread_name="group",
            compiler_params=plgpu.CompilerParams(
                lowering_semantics=plgpu.LoweringSemantics.Warpgroup
            ),
            cost_estimate=pl.CostEstimate(
                flops=self.flops(), bytes_accessed=self.moved_bytes(), transcendentals=0
            ),
            interpret=cast(Any, plgpu).InterpretGPUParams() if self.interpret else None,
            kernel_name="adapted_product",
        )
        y, h = vary_alike((cast(jax.Array, call(x, w, h, ka)), h))  # the call's type has no axes
        return y, h


class _Stages(NamedTuple):
    """What a block has in shared memory, for each stage.

    Attributes:
        x, w: tiles of the operands.
        loaded, used: barriers: the tiles are there, and are no longer needed.
    """

    x: Any
    w: Any
    loaded: Any
    used: Any


class _Tile(NamedTuple):
    """The tile of y that a block makes: the product, its tile of rows and of free features."""

    stack: Any
    row: Any
    column: Any


def _kernel(
    product: HopperProduct, x: Any, w: Any, h: Any, ka: Any, y: Any, *,
    x_tiles: Any, w_tiles: Any, y_tiles: Any, loaded: Any, used: Any,
) -> None:  # fmt: skip
    """Compute one tile of y, in three groups of warps.

    Args:
        product: what is computed.
        x, w, h, ka, y: the arrays, in the chip's memory.
        x_tiles, w_tiles, loaded, used: `_Stages`.
        y_tiles: some columns of the result, for each of the groups that multiply.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    group = lax.axis_index("group")
    place = plgpu.planar_snake(lax.axis_index("tile"), product.tiles, 1, _BESIDE)
    tile = _Tile(lax.axis_index("stack"), *place)
    stages = _Stages(x_tiles, w_tiles, loaded, used)
    width = product.tile_out // _GROUPS

    @pl.when(group == _GROUPS)
    def _() -> None:
        _load(product, tile, stages, ((x, w), (h, ka)))

    @pl.when(group < _GROUPS)
    def _() -> None:
        add_up = functools.partial(_add_up, product, stages, pl.ds(group * width, width))
        total = pl.run_scoped(add_up, plgpu.ACC((ROWS, width), jnp.float32)).astype(y.dtype)
        rows, first = pl.ds(tile.row * ROWS, ROWS), tile.column * product.tile_out + group * width
        for column in range(0, width, _COLUMNS):
            y_tiles[group] = total[:, column : column + _COLUMNS]
            plgpu.commit_smem()
            place = y.at[tile.stack, rows, pl.ds(first + column, _COLUMNS)]
            plgpu.copy_smem_to_gmem(y_tiles.at[group], place)
            plgpu.wait_smem_to_gmem(0)


def _load(product: HopperProduct, tile: _Tile, stages: _Stages, pairs: Any) -> None:
    """Load the tiles of every step: of the pair x, W, then of h, KA."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    rows = pl.ds(tile.row * ROWS, ROWS)
    out = pl.ds(tile.column * product.tile_out, product.tile_out)
    before = 0
    for (left, right), steps in zip(pairs, product.steps, strict=True):

        @pl.loop(np.int32(0), np.int32(steps))  # so that both are int32 under x64 too
        def _(at: Any, left: Any = left, right: Any = right, before: int = before) -> None:
            step, into = at + before, pl.ds(at * INTO, INTO)
            stage = lax.rem(step, np.int32(_STAGES))

            @pl.when(step >= _STAGES)
            def _() -> None:
                plgpu.barrier_wait(stages.used.at[stage])

            loaded = stages.loaded.at[stage]
            across = (out, into) if product.transposed else (into, out)
            plgpu.copy_gmem_to_smem(left.at[tile.stack, rows, into], stages.x.at[stage], loaded)
            plgpu.copy_gmem_to_smem(right.at[tile.stack, *across], stages.w.at[stage], loaded)

        before += steps


def _add_up(product: HopperProduct, stages: _Stages, own: Any, total: Any) -> jax.Array:
    """Return the sum of all steps' products, of the group's own part of the free features."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    @pl.loop(np.int32(0), np.int32(sum(product.steps)))
    def _(step: Any) -> None:
        stage = lax.rem(step, np.int32(_STAGES))
        plgpu.barrier_wait(stages.loaded.at[stage])
        if product.transposed:
            right = stages.w.at[stage, own].transpose((1, 0))
        else:
            right = stages.w.at[stage, :, own]
        plgpu.wgmma(total, stages.x.at[stage], right)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(stages.used.at[stage])

    return total[...]
