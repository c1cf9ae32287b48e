"""Attention on a mesh: every device attends for its own samples and heads, over all tokens.

Kernels see one device's arrays. Where tokens are divided over a mesh axis, the compiler turns the change from "some
tokens, all heads" to "all tokens, some heads" into an all-to-all before the call, and back after it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec

from helios_jax.errors import UserError

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class AttentionPartition:
    """mesh: of the run; batch, heads: the mesh axes that samples and heads are divided over."""

    mesh: Mesh
    batch: tuple[str, ...]
    heads: tuple[str, ...]


_CURRENT: ContextVar[AttentionPartition | None] = ContextVar("attention_partition", default=None)


@contextlib.contextmanager
def use(mesh: Mesh, batch: tuple[str, ...], heads: tuple[str, ...]) -> Iterator[None]:
    """Within it, attention runs in a ``jax.shard_map`` over ``mesh``."""
    token = _CURRENT.set(AttentionPartition(mesh, batch, heads))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def per_device(attend: Callable[..., Any], q: Array, k: Array, v: Array, bias: Array | None, *,
               return_lse: bool = False) -> Any:
    """``attend(q, k, v, bias)`` on every device's own part.

    Args:
      attend: maps [B, S, N, D], twice [B, K, N, D] and [B, K] or None to [B, S, N, D], with ``return_lse`` also to
        [B, N, S].
    Raises:
      UserError: the heads do not divide over the devices.
    """
    current = _CURRENT.get()
    inside = AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types  # another shard_map divided the arrays
    if current is None or current.mesh.size == 1 or inside:
        return attend(q, k, v, bias)
    shape = current.mesh.shape
    parts = math.prod(shape[axis] for axis in current.heads)
    if q.shape[2] % parts:
        sizes = " x ".join(f"mesh.{axis} {shape[axis]}" for axis in current.heads)
        raise UserError(f"mesh: {q.shape[2]} attention heads do not divide by {parts} ({sizes})")
    batch = current.batch
    while batch and q.shape[0] % math.prod(shape[axis] for axis in batch):
        batch = batch[:-1]
    rows, heads = batch or None, current.heads or None
    tokens = PartitionSpec(rows, None, heads, None)
    out = (tokens, PartitionSpec(rows, heads, None)) if return_lse else tokens
    arguments, specs = (q, k, v), (tokens, tokens, tokens)
    if bias is not None:
        arguments, specs = (*arguments, bias), (*specs, PartitionSpec(rows, None))

    def local(q: Array, k: Array, v: Array, bias: Array | None = None) -> Any:
        return attend(q, k, v, bias)

    # Variants are opaque to the replication check (kernels, custom derivatives).
    return jax.shard_map(local, mesh=current.mesh, in_specs=specs, out_specs=out, check_vma=False)(*arguments)
