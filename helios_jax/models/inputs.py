"""What the transformer is given besides the noisy latents: the history's frames and everyone's time positions."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

Array = jax.Array


class History(NamedTuple):
    """History latents at full resolution, whatever the resolution of the current frames.

    short: [B, 2, H', W', 16], the anchor frame then the newest frame; mid: [B, 2, H', W', 16];
    long: [B, 16, H', W', 16]. The frame counts follow ``history_sizes``.
    """

    short: Array
    mid: Array
    long: Array


@dataclasses.dataclass(frozen=True)
class FrameIndices:
    """Time index of every frame of the packed sequence; relative to the window, equal for every chunk.

    The anchor has index 0, then come the long, mid and 1x history, then the current frames. ``short`` is
    (anchor, 1x). An empty tuple leaves the tier out.
    """

    current: tuple[int, ...]
    short: tuple[int, ...] = ()
    mid: tuple[int, ...] = ()
    long: tuple[int, ...] = ()

    @classmethod
    def for_history(cls, history_sizes: tuple[int, int, int] = (16, 2, 1), frames: int = 9) -> FrameIndices:
        """The line of consecutive integers [anchor | long | mid | 1x | current]."""
        long, mid, short = history_sizes
        ends = np.cumsum([1, long, mid, short, frames]).tolist()
        span = [tuple(range(a, b)) for a, b in zip(ends, ends[1:], strict=False)]
        return cls(current=span[3], short=(0, *span[2]), mid=span[1], long=span[0])
