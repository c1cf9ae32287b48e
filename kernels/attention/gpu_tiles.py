"""Tile sizes of the Hopper kernels, per device: the one place to change after a measurement.

Only the row of an H200 at head size 128 was timed on a card, and no other tiles beside it. With all of them the kernels
compile for an H100 without running out of registers (``benchmarks/compile_gpu.py`` checks that);
``docs/kernels_gpu.md`` has the times and explains what limits each.
"""

from __future__ import annotations

import dataclasses

from helios_jax.errors import UserError

ROWS_PER_WARPGROUP = 64  # the M of one wgmma instruction
COMPUTE_WARPGROUPS = 2  # they alternate between tensor cores and exponentials; a third warpgroup only copies
SHARED_MEMORY_BYTES = 232448  # what one block may use on compute capability 9.0


@dataclasses.dataclass(frozen=True)
class LoopTiles:
    """One kernel's inner loop: how many rows one step streams in, and how many steps are in flight.

    Attributes:
      rows: rows of the streamed operand per step, a multiple of 64.
      stages: buffers of the ring, at least 2.
    """

    rows: int
    stages: int

    def __post_init__(self):
        if self.rows <= 0 or self.rows % 64:
            raise UserError(f"LoopTiles.rows: a positive multiple of 64, got {self.rows}")
        if self.stages < 2:
            raise UserError(f"LoopTiles.stages: at least 2, got {self.stages}")


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Inner loops of the three kernels: keys stream through ``forward`` and ``dq``, queries through ``dkv``."""

    forward: LoopTiles
    dq: LoopTiles
    dkv: LoopTiles


# (part of the device's name, head size) -> tiles. The first match counts.
TABLE: tuple[tuple[str, int, Tiles], ...] = (
    ("H200", 128, Tiles(forward=LoopTiles(128, 2), dq=LoopTiles(128, 2), dkv=LoopTiles(64, 2))),
    ("H200", 64, Tiles(forward=LoopTiles(128, 3), dq=LoopTiles(128, 2), dkv=LoopTiles(64, 3))),
    ("", 128, Tiles(forward=LoopTiles(128, 2), dq=LoopTiles(128, 2), dkv=LoopTiles(64, 2))),
    ("", 64, Tiles(forward=LoopTiles(128, 3), dq=LoopTiles(128, 2), dkv=LoopTiles(64, 3))),
)


def tiles_for(device_kind: str, head_size: int) -> Tiles:
    """The table's row for a device such as ``NVIDIA H100 80GB HBM3`` and a head size of 64 or 128."""
    for name, size, tiles in TABLE:
        if name in device_kind and size == head_size:
            return tiles
    raise NotImplementedError(f"head size {head_size}: the kernel has tiles for 64 and 128")


def shared_memory(tiles: LoopTiles, head_size: int, resident: int) -> int:
    """Bytes of shared memory that one block's matrix operands take; row statistics and barriers are about 2 kB more.

    Args:
      resident: operands of 64 rows that each computing warpgroup keeps: 1 in ``forward``, 2 in ``dq`` and ``dkv``.
    """
    kept = resident * COMPUTE_WARPGROUPS * ROWS_PER_WARPGROUP * head_size
    streamed = 2 * tiles.stages * tiles.rows * head_size
    return (kept + streamed) * 2
