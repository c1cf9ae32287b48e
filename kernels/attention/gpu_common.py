"""What the three Hopper kernels share: buffers, matrix products on the tensor cores, the ring of copies, the launch.

Every kernel is one block of three warpgroups. Two compute, each on 64 rows of its own; the third only issues bulk
copies (TMA) into a ring of shared-memory slots. A slot has two barriers: `ready` (the bytes have landed) and `free`
(both computing warpgroups have read them).

Ragged ends need no padding in memory. The copy engine knows the array's bounds: it fills rows past the end with zeros
on the way in and drops them on the way out.

In GPU interpret mode (tests on a CPU) two things differ, both behind ``Products``: the left operand of a product goes
through shared memory, and an accumulation is a product followed by a sum. The hardware accumulates in place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.attention.gpu_tiles import COMPUTE_WARPGROUPS, ROWS_PER_WARPGROUP

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)
# Start of the running maximum: finite, so that a tile in which every logit is -inf gives weights 0 and not NaN.
LOWEST = -1e37
# Registers per thread after the hand-over: 2 * 232 + 40 <= 3 * 168, the block's share of the register file.
COMPUTE_REGISTERS, COPY_REGISTERS = 232, 40
WARPGROUP = "warpgroup"

BY_ROW = plgpu.Layout.WGMMA.reduce(1)  # one number per row of a 64-row accumulator
BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)
# 128-byte rows of 64 numbers in 8x64 tiles: what wgmma and TMA both read without bank conflicts.
SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

_LOAD_TAKES_INDEX = "idx" in inspect.signature(plgpu.load).parameters  # jax 0.10


def interpret_support() -> str | None:
    """None where the installed jax can interpret these kernels on a CPU, else the reason why it cannot."""
    if jax.__version_info__ < (0, 12):
        return f"jax {jax.__version__} has no GPU interpret mode for warp-specialised kernels; 0.12 has"
    return None


def smem(shape: Sequence[int], dtype) -> plgpu.SMEM:
    """A matrix operand in shared memory: leading axes, then rows and head size."""
    return plgpu.SMEM(tuple(shape), dtype, transforms=SWIZZLED)


def transposed(ref):
    return ref.transpose((1, 0))


def load_vector(ref, layout) -> jax.Array:
    """Reads a float32 vector from shared memory, spread over threads as the rows or columns of an accumulator are."""
    return plgpu.load(ref, (), layout=layout) if _LOAD_TAKES_INDEX else plgpu.load(ref, layout=layout)


def full(shape: tuple[int, ...], value: float, layout=plgpu.Layout.WGMMA) -> jax.Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def along_rows(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, [0])


def along_columns(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, [1])


def columns_below(limit: int, shape: tuple[int, int]) -> jax.Array:
    """[rows, columns] of booleans, true where the column index is below ``limit``."""
    return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA) < limit


@dataclasses.dataclass(frozen=True)
class Products:
    """Matrix products of one warpgroup.

    Attributes:
      stage: in interpret mode shared memory [64, widest left operand] for left operands, otherwise None.
    """

    stage: object | None

    def of(self, left, right, meanwhile: Callable[[], None] | None = None) -> jax.Array:
        """left @ right in float32, both in shared memory; ``meanwhile`` runs while the tensor cores work."""

        def product(accumulator):
            plgpu.wgmma(accumulator, left, right)
            if meanwhile is not None:
                meanwhile()
            return accumulator[...]

        return pl.run_scoped(product, plgpu.ACC((left.shape[0], right.shape[1]), jnp.float32))

    def add(self, total: jax.Array, left: jax.Array, right) -> jax.Array:
        """total + left @ right, the left operand in registers."""
        if self.stage is None:
            return pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, left, right))(plgpu.ACC.init(total))
        stage = self.stage.at[:, pl.ds(0, left.shape[1])]
        stage[...] = left
        plgpu.commit_smem()
        return total + self.of(stage, right)

    def add_two(self, totals, left, right, make_left: Callable[[], jax.Array], other_right):
        """totals[0] + left @ right and totals[1] + make_left() @ other_right.

        ``make_left`` runs while the tensor cores work on the first product; both are awaited once, at the end.
        """
        if self.stage is None:

            def products(accumulators):
                plgpu.wgmma(accumulators[0], left, right)
                plgpu.wgmma(accumulators[1], make_left(), other_right)

            return pl.run_state(products)(tuple(plgpu.ACC.init(total) for total in totals))
        return self.add(totals[0], left, right), self.add(totals[1], make_left(), other_right)

    def of_two(self, lefts, rights, from_first: Callable[[jax.Array], jax.Array]) -> tuple[jax.Array, jax.Array]:
        """from_first(lefts[0] @ rights[0]) and lefts[1] @ rights[1]; ``from_first`` overlaps the second product."""

        def products(first, second):
            plgpu.wgmma(first, lefts[0], rights[0])
            plgpu.wgmma(second, lefts[1], rights[1])
            result = from_first(plgpu.wgmma_accumulator_load(first, wait_n=1))
            return result, second[...]

        shapes = ((left.shape[0], right.shape[1]) for left, right in zip(lefts, rights, strict=True))
        return pl.run_scoped(products, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


@dataclasses.dataclass(frozen=True)
class Ring:
    """A loop over tiles of rows: all full ones, then one ragged end if the length is not a multiple.

    Attributes:
      length: rows there are; rows: rows per tile; stages: slots of the ring, at most the number of tiles.
    """

    length: int
    rows: int
    stages: int

    @classmethod
    def over(cls, length: int, rows: int, stages: int) -> Ring:
        return cls(length, rows, min(stages, pl.cdiv(length, rows)))

    @property
    def full_tiles(self) -> int:
        return self.length // self.rows

    @property
    def ragged_rows(self) -> int:
        return self.length % self.rows

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.length, self.rows)

    def slot(self, tile):
        return lax.rem(tile, jnp.array(self.stages, tile.dtype))

    def for_each_tile(self, step: Callable, carry):
        """Runs ``step(tile, carry, rows, valid)`` in order.

        A full tile has rows == valid; the ragged end has ``valid`` rows and its width rounded up to 64. It stands
        after the loop, so that full tiles carry no mask.
        """
        if self.full_tiles:
            carry = lax.fori_loop(0, self.full_tiles, lambda i, c: step(i, c, self.rows, self.rows), carry)
        if self.ragged_rows:
            width = pl.cdiv(self.ragged_rows, 64) * 64
            # One turn, as a loop: the lowering wants the tile's number as a variable, not as a literal.
            carry = lax.fori_loop(
                self.full_tiles, self.tiles, lambda i, c: step(i, c, width, self.ragged_rows), carry
            )
        return carry

    def keep_filled(self, fill: Callable) -> None:
        """The copying warpgroup: ``fill(tile, slot, wait)`` for every tile, in order.

        ``wait(barriers)`` returns when the slot is free; the first round over the slots need not wait.
        """

        @pl.loop(0, self.stages)
        def _(tile):
            fill(tile, tile, lambda barriers: None)

        if self.tiles > self.stages:

            @pl.loop(self.stages, self.tiles)
            def _(tile):
                slot = self.slot(tile)
                fill(tile, slot, lambda barriers: plgpu.barrier_wait(barriers.at[slot]))


def own_rows(axis: str) -> pl.Slice:
    """The 64 rows of this warpgroup within its block's tile."""
    block = lax.axis_index(axis) * (COMPUTE_WARPGROUPS * ROWS_PER_WARPGROUP)
    return pl.ds(block + lax.axis_index(WARPGROUP) * ROWS_PER_WARPGROUP, ROWS_PER_WARPGROUP)


def padded_length(length: int) -> int:
    """Length of the row statistics [B, N, length]: whole blocks, since a bulk copy needs rows of 16-byte multiples."""
    block = COMPUTE_WARPGROUPS * ROWS_PER_WARPGROUP
    return pl.cdiv(length, block) * block


def run_roles(compute: Callable[[], None], copy: Callable[[], None]) -> None:
    """Splits the block: two warpgroups compute, the third copies and gives them its registers."""
    warpgroup = lax.axis_index(WARPGROUP)

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def _():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        compute()

    @pl.when(warpgroup == COMPUTE_WARPGROUPS)
    def _():
        plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
        copy()


def launch(body: Callable, out_type, scratch, grid: tuple[int, int, int], row_axis: str, *, interpret, name: str):
    """The callable kernel over (batch, heads, tiles of rows).

    Tiles of one head run next to each other, so that the head's streamed operand is read from memory once and from
    the L2 cache after that. ``interpret``: False, True or the interpreter's parameters.
    """
    body.__name__ = name
    kernel = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=grid,
        grid_names=("batch", "head", row_axis),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name=WARPGROUP,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams() if interpret is True else interpret or None,
    )

    def call(*operands):
        with _pretend_hopper() if interpret else contextlib.nullcontext():
            return kernel(*operands)

    return call


def _pretend_hopper():
    """The interpreter asks for a device description; a CPU has none to give."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))
