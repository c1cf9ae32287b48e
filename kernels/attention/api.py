"""The public attention functions and the dispatch over their variants.

A variant raises ``NotImplementedError`` with its reason when it cannot serve a call; the dispatch then tries the
next one. Asking for a variant by name fails loudly instead.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels.attention import partition, per_head, reference

Array = jax.Array

VARIANTS: dict[str, Callable[..., Array]] = {
    "per_head": per_head.attention,
    "xla": reference.attention,
}
# What `implementation=None` tries, in order, on each backend.
DEFAULT_ORDER: dict[str, tuple[str, ...]] = {"cpu": ("per_head", "xla")}
FALLBACK_ORDER = ("xla",)


def _attend(q: Array, k: Array, v: Array, bias: Array | None, implementation: str | None) -> Array:
    """Scaled dot-product attention through the first variant that supports the call.

    Args:
      q: [B, S, N, D]; k, v: [B, K, N, D]; bias: [B, K] float32 added to the logits, or None.
      implementation: a name from ``VARIANTS``, or None for the backend's default order.
    Returns: [B, S, N, D] in q's dtype.
    Raises:
      ValueError: unknown name. NotImplementedError: the named variant does not support the call.
    """
    if implementation is not None:
        if implementation not in VARIANTS:
            raise ValueError(f"attention implementation: one of {', '.join(VARIANTS)}, got {implementation!r}")
        return partition.per_device(VARIANTS[implementation], q, k, v, bias)
    reasons = []
    for name in DEFAULT_ORDER.get(partition.platform(), FALLBACK_ORDER):
        try:
            return partition.per_device(VARIANTS[name], q, k, v, bias)
        except NotImplementedError as reason:
            reasons.append(f"{name}: {reason}")
    raise NotImplementedError("no attention variant supports this call: " + "; ".join(reasons))


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
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)  # [B, S, N, D] -> [B, S, N, D/2, 2]
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = cos[None, :, None, :], sin[None, :, None, :]  # [S, D/2] -> [1, S, 1, D/2]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)  # [B, S, N, D/2, 2] -> [B, S, N, D]


def compacted_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    norm_q: Array,
    norm_k: Array,
    cos: Array,
    sin: Array,
    num_heads: int,
    eps: float = 1e-6,
    history_length: int = 0,
    history_key_scale: Array | None = None,
    implementation: str | None = None,
) -> Array:
    """Self-attention over the packed sequence ``[long | mid | short | current]`` of one chunk.

    RMS norm of q and k over all heads with float32 statistics, rotary positions, optional scale on the keys of the
    history, dense unmasked attention with float32 softmax.

    Args:
      q, k, v: [B, S, C] straight from their projections, C = num_heads * D.
      norm_q, norm_k: [C] RMS-norm weights.
      cos, sin: [S, D/2] float32 rotary tables.
      history_length: number of leading history tokens.
      history_key_scale: [N] or [1] float32 factor on the history's keys, or None.
      implementation: variant name, or None for the backend's default.
    Returns: [B, S, C] in q's dtype.

    Source: diffusers ``HeliosAttnProcessor``.
    """
    q = rotate_pairs(rms_norm_heads(q, norm_q, eps, num_heads), cos, sin)
    k = rotate_pairs(rms_norm_heads(k, norm_k, eps, num_heads), cos, sin)
    v = v.reshape(k.shape)  # [B, S, C] -> [B, S, N, D]
    if history_key_scale is not None and history_length:
        is_history = (jnp.arange(k.shape[1]) < history_length)[None, :, None, None]
        factor = history_key_scale.astype(k.dtype)[None, None, :, None]  # [N or 1] -> [1, 1, N or 1, 1]
        k = jnp.where(is_history, k * factor, k)
    out = _attend(q, k, v, None, implementation)
    return out.reshape(*out.shape[:2], -1)  # [B, S, N, D] -> [B, S, C]


def cross_attention(
    q: Array,
    keys: Array,
    values: Array,
    bias: Array | None,
    *,
    norm_q: Array,
    num_heads: int,
    eps: float = 1e-6,
    implementation: str | None = None,
) -> Array:
    """Attention of tokens over the prompt, whose normed keys and values were computed once.

    Args:
      q: [B, S, C] straight from its projection; keys, values: [B, K, N, D]; bias: [B, K] float32 or None.
      norm_q: [C] RMS-norm weight.
    Returns: [B, S, C] in q's dtype.
    """
    q = rms_norm_heads(q, norm_q, eps, num_heads)
    out = _attend(q, keys, values, bias, implementation)
    return out.reshape(*out.shape[:2], -1)  # [B, S, N, D] -> [B, S, C]
