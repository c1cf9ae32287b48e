"""What happens to queries and keys between their projections and the attention: norm, rotation, history scale."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention.device import current_device

Array = jax.Array
Ranges = tuple[tuple[int, int], ...]  # half-open (start, stop) ranges of token rows


def rms_norm_heads(x: Array, weight: Array, eps: float, num_heads: int) -> Array:
    """RMS norm over the full width (all heads together) in float32, then the split into heads.

    Args:
      x: [B, S, C] straight from the projection; weight: [C].
    Returns: [B, S, N, D] in x's dtype.
    """
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps) * weight.astype(jnp.float32)
    return y.astype(x.dtype).reshape(*x.shape[:-1], num_heads, -1)  # [B, S, C] -> [B, S, N, D]


def rotate_pairs(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary position embedding on adjacent (interleaved) channel pairs, in float32.

    Args:
      x: [B, S, N, D]; cos, sin: [S, D/2] float32. The tables of pooled history are not of unit norm, on purpose.
    Returns: [B, S, N, D] in x's dtype.
    """
    if current_device().platform == "tpu":
        return rotate_by_product(x, cos, sin)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)  # [B, S, N, D] -> [B, S, N, D/2, 2]
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = cos[None, :, None, :], sin[None, :, None, :]  # [S, D/2] -> [1, S, 1, D/2]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)  # [B, S, N, D/2, 2] -> [B, S, N, D]


def rotate_by_product(x: Array, cos: Array, sin: Array) -> Array:
    """:func:`rotate_pairs` for TPUs, where neighbouring channels are neighbouring lanes.

    Splitting pairs makes a last axis of two, which fills 2 of 128 lanes and is copied through HBM in float32. Here the
    partner of every channel comes from a product with a signed permutation, which is exact, and its matrix unit is
    idle anyway. Heads go in front, as the attention kernel wants them.
    """
    x = x.swapaxes(1, 2)  # [B, S, N, D] -> [B, N, S, D]
    swapped = jnp.einsum("bnsd,de->bnse", x, partner_matrix(x.shape[-1], x.dtype), precision=jax.lax.Precision.HIGHEST,
                         preferred_element_type=jnp.float32)
    rotated = x.astype(jnp.float32) * jnp.repeat(cos, 2, axis=-1) + swapped * jnp.repeat(sin, 2, axis=-1)
    return rotated.astype(x.dtype).swapaxes(1, 2)


def partner_matrix(size: int, dtype: jnp.dtype) -> Array:
    """[D, D]: column 2i of ``x @ partner`` holds -x[2i+1], column 2i+1 holds x[2i]."""
    even = np.arange(0, size, 2)
    partner = np.zeros((size, size), np.float32)
    partner[even + 1, even], partner[even, even + 1] = -1, 1
    return jnp.asarray(partner, dtype)


class RawQueries(NamedTuple):
    """Queries straight from their projection, and what their norm and rotation need.

    q: [B, S, C]; norm: [C]; cos, sin: [S, D/2] float32.
    """

    q: Array
    norm: Array
    cos: Array
    sin: Array

    def prepared(self, num_heads: int, eps: float) -> Array:
        """[B, S, N, D], as every variant takes them."""
        return prepare_queries(self.q, norm_q=self.norm, cos=self.cos, sin=self.sin, num_heads=num_heads, eps=eps)


def prepare_queries(q: Array, *, norm_q: Array, cos: Array, sin: Array, num_heads: int, eps: float = 1e-6) -> Array:
    """Norm and rotation of queries. q: [B, S, C] from its projection; cos, sin: [S, D/2]. Returns [B, S, N, D]."""
    return rotate_pairs(rms_norm_heads(q, norm_q, eps, num_heads), cos, sin)


def prepare_keys(
    k: Array,
    *,
    norm_k: Array,
    cos: Array,
    sin: Array,
    num_heads: int,
    eps: float = 1e-6,
    history_ranges: Ranges = (),
    history_key_scale: Array | None = None,
) -> Array:
    """Norm, rotation and history scale of keys.

    Args:
      k: [B, S, C] straight from its projection; norm_k: [C]; cos, sin: [S, D/2] float32.
      history_ranges: the rows that are history.
      history_key_scale: [N] or [1] float32 factor on the history's keys, or None.
    Returns: [B, S, N, D] in k's dtype.

    Source: diffusers ``HeliosAttnProcessor``.
    """
    k = rotate_pairs(rms_norm_heads(k, norm_k, eps, num_heads), cos, sin)
    if history_key_scale is None or not history_ranges:
        return k
    row = jnp.arange(k.shape[1])
    is_history = jnp.zeros(row.shape, bool)
    for start, stop in history_ranges:
        is_history |= (row >= start) & (row < stop)
    factor = history_key_scale.astype(k.dtype)[None, None, :, None]  # [N or 1] -> [1, 1, N or 1, 1]
    return jnp.where(is_history[None, :, None, None], k * factor, k)
