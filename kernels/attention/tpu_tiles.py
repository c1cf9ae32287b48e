"""Tile sizes and on-chip memory of the TPU attention kernels, per chip and length.

Every number is MODELLED, none was measured: they follow from the arithmetic in docs/kernels.md and from what the
ahead-of-time compiler accepts. To change a tile, edit its row and run ``python -m kernels.attention.compile``.
"""

from __future__ import annotations

from typing import NamedTuple

LANES = 128
REGISTER_ROWS = 16  # of bfloat16
MEBIBYTE = 1 << 20


class Tiles(NamedTuple):
    """Upper bounds of the score tiles [keys, queries]; ``split`` evens them out for a length.

    forward: (queries of one program, keys of one inner step); backward: (keys of one program, queries of one inner
    step). Both are multiples of 128: queries lie along the lanes, and matrix units contract over 128 keys at a time.
    """

    forward: tuple[int, int]
    backward: tuple[int, int]


class Chip(NamedTuple):
    """What a chip gets.

    vmem: bytes of on-chip memory that one kernel may ask for; bounded: softmax by a bound where it holds, which saves
    vector work and costs exactness (see ``tpu_forward.py``); tiles: (largest number of keys, tiles), ascending.
    """

    vmem: int
    bounded: bool
    tiles: tuple[tuple[int, Tiles], ...]

    def tiles_for(self, keys: int) -> Tiles:
        return next((tiles for limit, tiles in self.tiles if keys <= limit), self.tiles[-1][1])


_ANY = 1 << 30
_SHORT = (1024, Tiles((1024, 512), (512, 1024)))  # the prompt of cross-attention

# A core of v5e and v6e has 128 MiB of VMEM, one of v5p 64 MiB; some is left to the compiler. The bound is off until a
# measurement says that it pays; v6e, whose vector units are the scarcest, is where to try it.
CHIPS: dict[str, Chip] = {
    "v5e": Chip(100 * MEBIBYTE, False, (_SHORT, (_ANY, Tiles((2048, 1024), (1024, 1024))))),
    "v5p": Chip(56 * MEBIBYTE, False, (_SHORT, (_ANY, Tiles((1536, 768), (768, 768))))),
    "v6e": Chip(100 * MEBIBYTE, False, (_SHORT, (_ANY, Tiles((2048, 1024), (1024, 1024))))),
}
# Small tiles, so that tests on small shapes run through every branch.
INTERPRETED = Chip(100 * MEBIBYTE, True, ((_ANY, Tiles((128, 32), (32, 128))),))

_KINDS = {
    "TPU v5 lite": "v5e", "TPU v5e": "v5e",
    "TPU v5": "v5p", "TPU v5p": "v5p",
    "TPU v6 lite": "v6e", "TPU v6e": "v6e",
}


def chip_of(kind: str) -> str | None:
    """Name of a chip in ``CHIPS`` from JAX's device kind, or None."""
    return _KINDS.get(kind)


def split(length: int, largest: int, multiple: int) -> int:
    """Tile size <= largest (a multiple of ``multiple``) that covers ``length`` in as few and as even tiles as can be.

    The last tile may be shorter; where one tile is enough it has exactly the length.
    """
    if length <= largest:
        return length
    count = -(-length // largest)
    return min(_round_up(-(-length // count), multiple), largest)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _row_bytes(itemsize: int) -> int:
    return LANES * itemsize  # head sizes below 128 are padded to the lanes


def forward_bytes(keys: int, tile: tuple[int, int], itemsize: int, with_bias: bool, tables: int = 0) -> int:
    """VMEM of the forward kernel: resident keys and values twice (double buffering), tiles and accumulators.

    Blocks are those of the queries, the output and its rest. tables: rows of the rotary tables of a prologue, which
    come in one copy; what the prologue works with is as large as a tile of scores at most, and gone before the first.
    """
    queries, step = tile
    resident = 2 * 2 * keys * _row_bytes(itemsize) + (2 * keys * _row_bytes(4) if with_bias else 0)
    resident += 2 * tables * _row_bytes(4) + (queries * _row_bytes(itemsize) if tables else 0)
    blocks = 3 * 2 * queries * _row_bytes(itemsize) + 3 * queries * _row_bytes(4)
    scores = queries * step * (4 + 4 + itemsize)
    return resident + blocks + scores


def backward_bytes(queries: int, tile: tuple[int, int], itemsize: int, with_bias: bool) -> int:
    """VMEM of the backward kernel: resident queries, output gradients and query gradients, tiles and accumulators."""
    keys, step = tile
    resident = 3 * 2 * queries * _row_bytes(itemsize) + queries * _row_bytes(4)
    blocks = 4 * 2 * keys * _row_bytes(itemsize) + (6 if with_bias else 4) * keys * _row_bytes(4)
    scores = keys * step * (4 + 4 + 4 + 2 * itemsize)
    return resident + blocks + scores


def longest(bytes_of, vmem: int, tile: tuple[int, int], itemsize: int, with_bias: bool) -> int:
    """Rows that may stay resident within ``vmem``, a multiple of 128; at least 128."""
    fixed = bytes_of(0, tile, itemsize, with_bias)
    per_row = bytes_of(1, tile, itemsize, with_bias) - fixed
    return max(LANES, (vmem - fixed) // per_row // LANES * LANES)
