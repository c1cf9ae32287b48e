"""Encoding and decoding in overlapping tiles, for frames that are too large to be worked at once.

Tiling changes the numbers (each tile sees its own borders, and attention stays inside it), so it is off unless asked
for; the tiles, their order and their blending are those of diffusers ``AutoencoderKLWan.tiled_encode`` and
``tiled_decode``. Each tile is one call of a compiled function, of which there are at most four (the tiles at the
right and bottom edge are smaller).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from helios_jax.errors import UserError
from helios_jax.models.vae import Params, WanVAE, decode_in_steps, encode_in_steps

Array = jax.Array
_ROWS, _COLUMNS = 2, 3  # axes of [B, T, h, w, C]


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Height and width of a tile and the distance from one tile to the next, in pixels."""

    height: int = 256
    width: int = 256
    stride_height: int = 192
    stride_width: int = 192

    def check(self, factor: int) -> None:
        """Raises a UserError unless all sizes are multiples of ``factor`` and no stride is larger than its tile."""
        for name in ("height", "width"):
            size, stride = getattr(self, name), getattr(self, f"stride_{name}")
            if not 0 < stride <= size or size % factor or stride % factor:
                raise UserError(f"tiling {name}: multiples of {factor} with 0 < stride_{name} <= {name} allowed, "
                                f"got {size} with stride {stride}")


def encode_tiled(vae: WanVAE, params: Params, video: Array, tiling: Tiling = Tiling()) -> tuple[Array, Array]:
    """Posterior of a video, tile by tile where it is larger than one tile.

    Args:
      video: [B, F, H, W, 3] in [-1, 1].
    Returns: mean and log-variance, each [B, 1 + (F-1)//4, H//8, W//8, z_dim].
    Raises:
      UserError: the tile sizes are not multiples of 8, or the strides larger than the tiles.
    """
    factor = vae.config.scale_factor_spatial
    tiling.check(factor)
    if video.shape[_ROWS] <= tiling.height and video.shape[_COLUMNS] <= tiling.width:
        moments = _encode(vae, params, video)
    else:
        moments = _mosaic(lambda tile: _encode(vae, params, tile), video, tiling, 1, factor)
        moments = moments[:, :, : video.shape[_ROWS] // factor, : video.shape[_COLUMNS] // factor]
    return tuple(jnp.split(moments, 2, axis=-1))  # 2z -> z, z


def decode_tiled(vae: WanVAE, params: Params, z: Array, tiling: Tiling = Tiling(), clamp: bool = True) -> Array:
    """RGB frames of latents, tile by tile where they are larger than one tile; clamped after blending.

    Args:
      z: [B, T, h, w, z_dim].
    Returns: [B, 1 + 4(T-1), 8h, 8w, 3].
    Raises:
      UserError: as :func:`encode_tiled`.
    """
    factor = vae.config.scale_factor_spatial
    tiling.check(factor)
    if z.shape[_ROWS] * factor <= tiling.height and z.shape[_COLUMNS] * factor <= tiling.width:
        frames = _decode(vae, params, z)
    else:
        frames = _mosaic(lambda tile: _decode(vae, params, tile), z, tiling, factor, 1)
    return jnp.clip(frames, -1, 1) if clamp else frames


def map_batch(function: Callable[[Array], Array], x: Array) -> Array:
    """``function`` of each item of the batch alone, in a loop (diffusers ``enable_slicing``): less memory, same result.

    Args:
      function: maps [1, ...] to a tree of [1, ...].
    """
    return jax.tree_util.tree_map(lambda y: y[:, 0], jax.lax.map(lambda item: function(item[None]), x))


@functools.partial(jax.jit, static_argnums=0)
def _encode(vae: WanVAE, params: Params, video: Array) -> Array:
    return jnp.concatenate(encode_in_steps(vae, params, video), axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def _decode(vae: WanVAE, params: Params, z: Array) -> Array:
    return decode_in_steps(vae, params, z, clamp=False)


def _mosaic(run: Callable[[Array], Array], x: Array, tiling: Tiling, grow: int, shrink: int) -> Array:
    """Runs every tile of x, blends each with the finished tiles above and to its left, and joins their corners.

    The sizes of ``tiling`` are pixels: in the input they are pixels / ``grow``, in the output pixels / ``shrink``.
    """
    size = {_ROWS: tiling.height, _COLUMNS: tiling.width}
    stride = {_ROWS: tiling.stride_height, _COLUMNS: tiling.stride_width}
    overlap = {axis: (size[axis] - stride[axis]) // shrink for axis in size}
    above: list[Array] = []
    joined_rows = []
    for top in range(0, x.shape[_ROWS], stride[_ROWS] // grow):
        row: list[Array] = []
        for left in range(0, x.shape[_COLUMNS], stride[_COLUMNS] // grow):
            tile = run(x[:, :, top : top + size[_ROWS] // grow, left : left + size[_COLUMNS] // grow])
            if above:
                tile = _blend(above[len(row)], tile, overlap[_ROWS], _ROWS)
            if row:
                tile = _blend(row[-1], tile, overlap[_COLUMNS], _COLUMNS)
            row.append(tile)
        corners = [tile[:, :, : stride[_ROWS] // shrink, : stride[_COLUMNS] // shrink] for tile in row]
        joined_rows.append(jnp.concatenate(corners, axis=_COLUMNS))
        above = row
    return jnp.concatenate(joined_rows, axis=_ROWS)


def _blend(before: Array, tile: Array, overlap: int, axis: int) -> Array:
    """Fades linearly from the end of ``before`` to the start of ``tile`` over at most ``overlap`` rows or columns."""
    extent = min(before.shape[axis], tile.shape[axis], overlap)
    if extent == 0:
        return tile
    share = np.arange(extent) / extent
    shape = [extent if a == axis else 1 for a in range(tile.ndim)]
    old, new = (jnp.asarray(s.reshape(shape), tile.dtype) for s in (1 - share, share))
    end = jax.lax.slice_in_dim(before, before.shape[axis] - extent, None, axis=axis)
    start = jax.lax.slice_in_dim(tile, 0, extent, axis=axis)
    rest = jax.lax.slice_in_dim(tile, extent, None, axis=axis)
    return jnp.concatenate([end * old + start * new, rest], axis=axis)
