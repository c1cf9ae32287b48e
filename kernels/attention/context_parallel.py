"""Attention on an explicit mesh, as a function to hand to ``compacted_attention``."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from jax.sharding import Mesh

from helios_jax.errors import UserError
from kernels.attention.dispatch import Core, attend
from kernels.attention.partition import AttentionPartition, on_mesh


def context_parallel(
    mesh: Mesh,
    *,
    axis: str = "context",
    batch_axes: Sequence[str] = (),
    head_axis: str | None = None,
    implementation: str | Core | None = None,
) -> Core:
    """A function of the core contract, for ``compacted_attention(implementation=...)``, that runs on a mesh.

    :func:`kernels.attention.partition.on_mesh` says how; within a training run ``helios_jax.sharding.use`` does the
    same for every attention of the model.

    Args:
      mesh: devices; within ``jax.jit`` with automatic axes.
      axis: mesh axis over which tokens are divided before and after the attention.
      batch_axes: mesh axes over which samples are divided; those that do not divide a small batch are left out.
      head_axis: mesh axis over which heads are divided.
      implementation: what attends on one device, as for ``attend``.
    Raises:
      UserError: the mesh has no such axis; when called: heads, or heads times samples, do not divide.
    """
    heads = (head_axis,) if head_axis else ()
    for name in (axis, *batch_axes, *heads):
        if name not in mesh.shape:
            raise UserError(f"context_parallel: mesh axes are {tuple(mesh.shape)}, got {name!r}")
    partition = AttentionPartition(mesh, tuple(batch_axes), (axis,), heads)
    return functools.partial(on_mesh, partition, functools.partial(attend, implementation=implementation))
