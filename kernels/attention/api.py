"""The public attention functions of the model: from the projections' output to the attention's output."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from helios_jax.errors import UserError
from kernels.attention.dispatch import Core, attend, attend_raw_queries
from kernels.attention.prologue import Ranges, RawQueries, prepare_keys, rms_norm_heads
from kernels.attention.segments import Segments, attend_segments, pack

Array = jax.Array


class HistoryKeysValues(NamedTuple):
    """Keys (normed, rotated, scaled) and values of the history, each [B, H, N, D], computed once per chunk."""

    keys: Array
    values: Array


def prepare_history(
    k: Array,
    v: Array,
    *,
    norm_k: Array,
    cos: Array,
    sin: Array,
    num_heads: int,
    eps: float = 1e-6,
    history_key_scale: Array | None = None,
) -> HistoryKeysValues:
    """Keys and values of the history for ``compacted_attention(history=...)``.

    They may be kept between denoising steps only where history sees history alone (``restrict_self_attn``): else the
    history's hidden states, and with them its keys, depend on the noise.

    Args:
      k, v: [B, H, C] the history rows of the projections; norm_k: [C]; cos, sin: [H, D/2] float32.
      history_key_scale: [N] or [1] float32, or None.
    """
    keys = prepare_keys(k, norm_k=norm_k, cos=cos, sin=sin, num_heads=num_heads, eps=eps,
                        history_ranges=((0, k.shape[1]),), history_key_scale=history_key_scale)
    return HistoryKeysValues(keys, v.reshape(keys.shape))  # [B, H, C] -> [B, H, N, D]


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
    history_ranges: Ranges | None = None,
    segments: Segments | None = None,
    restrict_self_attn: bool = False,
    history: HistoryKeysValues | None = None,
    return_lse: bool = False,
    implementation: str | Core | None = None,
) -> Array | tuple[Array, Array]:
    """Self-attention over the packed sequence ``[long | mid | short | current]`` of one chunk.

    RMS norm of q and k over all heads with float32 statistics, rotary positions, optional scale on the keys of the
    history, dense attention with float32 softmax.

    Args:
      q, k, v: [B, S, C] straight from their projections, C = num_heads * D.
      norm_q, norm_k: [C] RMS-norm weights.
      cos, sin: [S, D/2] float32 rotary tables.
      history_length: number of leading history tokens.
      history_key_scale: [N] or [1] float32 factor on the history's keys, or None.
      history_ranges: the history's rows where several entries are packed (``pack``), in place of history_length.
      segments: which query rows see which key rows (``pack``); default: all see all.
      restrict_self_attn: history sees history only, current tokens see both (one entry; for several see ``pack``).
      history: prepared keys and values of the history; q, k, v, cos, sin are then those of the current rows alone,
        and so is the result.
      return_lse: also return the float32 log-sum-exp [B, N, S].
      implementation: variant name, a function of the core contract (``context_parallel`` makes one), or None for the
        device's default.
    Returns: [B, S, C] in q's dtype; with ``return_lse`` a pair.
    Raises:
      UserError: unknown variant, or options that contradict each other.

    Source: diffusers ``HeliosAttnProcessor``; segments and restriction: spec training_stages_1_2, sections 6.4 and 7.
    """
    if history is not None and (history_length or history_ranges or segments or restrict_self_attn):
        raise UserError("history: prepared keys stand for the whole history; history_length, history_ranges, segments "
                        "and restrict_self_attn must then be left out")
    if restrict_self_attn and (segments is not None or history_ranges is not None):
        raise UserError("restrict_self_attn: for packed entries use pack(..., restrict_self_attn=True)")
    if history_ranges is None:
        history_ranges = ((0, history_length),) if history_length else ()
    elif history_length:
        raise UserError(f"history_length: 0 where history_ranges is given, got {history_length}")
    if restrict_self_attn:
        segments = pack([(history_length, q.shape[1] - history_length)], restrict_self_attn=True).segments

    tables = {"cos": cos, "sin": sin, "num_heads": num_heads, "eps": eps}
    k = prepare_keys(k, norm_k=norm_k, history_ranges=history_ranges, history_key_scale=history_key_scale, **tables)
    v = v.reshape(k.shape)  # [B, S, C] -> [B, S, N, D]
    if history is not None:
        k = jnp.concatenate([history.keys.astype(k.dtype), k], axis=1)  # [B, H+S, N, D]
        v = jnp.concatenate([history.values.astype(v.dtype), v], axis=1)
    queries, options = RawQueries(q, norm_q, cos, sin), {"return_lse": return_lse}
    if segments is None:
        result = attend_raw_queries(queries, k, v, eps=eps, implementation=implementation, **options)
    else:
        core = functools.partial(attend, implementation=implementation)
        result = attend_segments(core, queries.prepared(num_heads, eps), k, v, segments, **options)
    out, lse = result if return_lse else (result, None)
    out = out.reshape(*out.shape[:2], -1)  # [B, S, N, D] -> [B, S, C]
    return (out, lse) if return_lse else out


def cross_attention(
    q: Array,
    keys: Array,
    values: Array,
    bias: Array | None,
    *,
    norm_q: Array,
    num_heads: int,
    eps: float = 1e-6,
    implementation: str | Core | None = None,
) -> Array:
    """Attention of tokens over the prompt, whose normed keys and values were computed once.

    Args:
      q: [B, S, C] straight from its projection; keys, values: [B, K, N, D]; bias: [B, K] float32 or None.
      norm_q: [C] RMS-norm weight.
    Returns: [B, S, C] in q's dtype.
    """
    q = rms_norm_heads(q, norm_q, eps, num_heads)
    out = attend(q, keys, values, bias, implementation=implementation)
    return out.reshape(*out.shape[:2], -1)  # [B, S, N, D] -> [B, S, C]
