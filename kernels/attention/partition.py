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

import jax
from jax.sharding import Mesh, PartitionSpec

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


def platform() -> str:
    """For which kind of device attention is compiled: the mesh's, which a compilation without hardware sets."""
    current = _CURRENT.get()
    return jax.default_backend() if current is None else current.mesh.devices.flat[0].platform


def per_device(attend: Callable[..., Array], q: Array, k: Array, v: Array, bias: Array | None) -> Array:
    """``attend(q, k, v, bias)`` on every device's own part.

    Args:
      attend: maps [B, S, N, D], twice [B, K, N, D] and [B, K] or None to [B, S, N, D].
    Raises:
      ValueError: the heads do not divide over the devices.
    """
    current = _CURRENT.get()
    if current is None or current.mesh.size == 1:
        return attend(q, k, v, bias)
    shape = current.mesh.shape
    parts = math.prod(shape[axis] for axis in current.heads)
    if q.shape[2] % parts:
        sizes = " x ".join(f"mesh.{axis} {shape[axis]}" for axis in current.heads)
        raise ValueError(f"mesh: {q.shape[2]} attention heads do not divide by {parts} ({sizes})")
    batch = current.batch
    while batch and q.shape[0] % math.prod(shape[axis] for axis in batch):
        batch = batch[:-1]
    heads = PartitionSpec(batch or None, None, current.heads or None, None)
    # Variants are opaque to the replication check (kernels, custom derivatives).
    if bias is None:
        return jax.shard_map(lambda q, k, v: attend(q, k, v, None), mesh=current.mesh, in_specs=(heads, heads, heads),
                             out_specs=heads, check_vma=False)(q, k, v)
    return jax.shard_map(attend, mesh=current.mesh, in_specs=(heads, heads, heads, PartitionSpec(batch or None, None)),
                         out_specs=heads, check_vma=False)(q, k, v, bias)
