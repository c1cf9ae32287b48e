"""Rotary position tables of the compacted sequence, computed once per shape with NumPy in float32.

Source: diffusers ``HeliosRotaryPosEmbed`` and the pooling in ``HeliosTransformer3DModel.forward``. The reference
stores every cosine and sine twice (adjacent duplicates); here each pair of channels has one entry.
"""

from __future__ import annotations

import functools

import numpy as np

from helios_jax.models.inputs import FrameIndices

Table = np.ndarray


def _grid(frames: tuple[int, ...], height: int, width: int, rope_dim: tuple[int, int, int], theta: float
          ) -> tuple[Table, Table]:
    """cos and sin [T, height, width, D/2] at integer positions (frame index, row, column)."""
    positions = np.meshgrid(np.asarray(frames, np.float32), np.arange(height, dtype=np.float32),
                            np.arange(width, dtype=np.float32), indexing="ij")
    angles = []
    for position, dim in zip(positions, rope_dim, strict=True):
        exponents = (np.arange(0, dim, 2, dtype=np.float32)[: dim // 2] / np.float32(dim)).astype(np.float32)
        frequencies = (np.float32(1.0) / np.power(np.float32(theta), exponents)).astype(np.float32)
        angles.append(position[..., None] * frequencies)  # [T, h, w] -> [T, h, w, d/2]
    angle = np.concatenate(angles, -1).astype(np.float32)
    return np.cos(angle), np.sin(angle)


def _pool(table: Table, k: int) -> Table:
    """Replicate-pads the end of (T, h, w) to multiples of k, then averages k x k x k blocks. [T, h, w, D/2]."""
    pads = [(0, -size % k) for size in table.shape[:3]]
    table = np.pad(table, [*pads, (0, 0)], mode="edge")
    t, h, w, d = table.shape
    blocks = table.reshape(t // k, k, h // k, k, w // k, k, d)
    return blocks.mean(axis=(1, 3, 5), dtype=np.float32)


@functools.lru_cache(maxsize=64)
def rotary_tables(
    indices: FrameIndices,
    current_grid: tuple[int, int],
    history_grid: tuple[int, int],
    rope_dim: tuple[int, int, int],
    theta: float,
) -> tuple[Table, Table]:
    """cos and sin for the packed sequence [long | mid | short | current].

    Args:
      indices: frame indices of each tier.
      current_grid: token rows and columns of the current frames (latent size / 2).
      history_grid: token rows and columns of the short tier, at full resolution whatever the pyramid stage.
      rope_dim: channels of the (time, row, column) axes; theta: base of the frequencies.
    Returns: two float32 arrays [S, D/2]. Pooled tiers are averages of cosines and sines and are not of unit norm.
    """
    parts = []
    for frames, k in ((indices.long, 4), (indices.mid, 2)):
        if frames:
            parts.append(tuple(_pool(table, k) for table in _grid(frames, *history_grid, rope_dim, theta)))
    if indices.short:
        parts.append(_grid(indices.short, *history_grid, rope_dim, theta))
    parts.append(_grid(indices.current, *current_grid, rope_dim, theta))
    half = sum(rope_dim) // 2
    cos, sin = (np.concatenate([part[i].reshape(-1, half) for part in parts]) for i in (0, 1))
    return cos, sin
