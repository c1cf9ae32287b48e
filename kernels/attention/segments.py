"""Which query rows see which key rows, as static ranges instead of an S x K mask.

A segment is ((query start, query stop), (key start, key stop)), half open. Each becomes one dense attention call of
exactly its size: nothing is computed and thrown away, and nothing of size S x K exists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from helios_jax.errors import UserError
from kernels.attention.prologue import Ranges

Segments = tuple[tuple[tuple[int, int], tuple[int, int]], ...]


class Packing(NamedTuple):
    """A packed row: ``segments`` for the attention and the rows of all its histories."""

    segments: Segments
    history_ranges: Ranges


def pack(rows: Sequence[tuple[int, int]], *, restrict_self_attn: bool = False) -> Packing:
    """Segments of ``[history | current][history | current]...`` in one sequence; entries do not see each other.

    Args:
      rows: (history tokens, current tokens) of every entry, in order.
      restrict_self_attn: history sees history only; current tokens see both.

    Source: spec training_stages_1_2, 6.4 (packing) and 7 (restrict_self_attn).
    """
    segments, histories, start = [], [], 0
    for history, current in rows:
        if history < 0 or current < 0 or history + current == 0:
            raise UserError(f"rows: (history, current) token counts, not negative and not both zero, "
                            f"got {(history, current)}")
        middle, stop = start + history, start + history + current
        if history:
            histories.append((start, middle))
        if restrict_self_attn and history and current:
            segments += [((start, middle), (start, middle)), ((middle, stop), (start, stop))]
        else:
            segments.append(((start, stop), (start, stop)))
        start = stop
    return Packing(tuple(segments), tuple(histories))


def check(segments: Segments, queries: int, keys: int) -> None:
    """The query ranges must tile 0...queries in order, and every key range must be non-empty and within the keys."""
    expected = 0
    for (start, stop), (key_start, key_stop) in segments:
        if start != expected or stop <= start:
            raise UserError(f"segments: query ranges must follow one another from 0 to {queries}, got {segments}")
        if not 0 <= key_start < key_stop <= keys:
            raise UserError(f"segments: key ranges must lie within 0 to {keys}, got {(key_start, key_stop)}")
        expected = stop
    if expected != queries:
        raise UserError(f"segments: query ranges must cover all {queries} rows, got {segments}")


def attend_segments(
    attend: Callable[..., jax.Array | tuple[jax.Array, jax.Array]],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: Segments,
    *,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """One dense call of ``attend`` per segment.

    Args:
      attend: core attention, ``attend(q, k, v, return_lse=...)``.
      q: [B, S, N, D]; k, v: [B, K, N, D].
    Returns: [B, S, N, D], with ``return_lse`` also [B, N, S] float32.
    """
    check(segments, q.shape[1], k.shape[1])
    outs, lses = [], []
    for (start, stop), (key_start, key_stop) in segments:
        keys, values = k[:, key_start:key_stop], v[:, key_start:key_stop]
        out, lse = attend(q[:, start:stop], keys, values, return_lse=True) if return_lse else (
            attend(q[:, start:stop], keys, values), None)
        outs.append(out)
        lses.append(lse)
    out = jnp.concatenate(outs, axis=1)
    return (out, jnp.concatenate(lses, axis=2)) if return_lse else out
