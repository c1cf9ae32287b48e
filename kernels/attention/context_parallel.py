"""Attention on a mesh with the sequence divided over an axis: all-to-all to heads, attention, all-to-all back.

Every device holds a stretch of the tokens of all heads; attention wants all tokens of some heads. Around the exchange
the batch is folded into the heads, so that what is divided is their product: a guided batch of two divides 40 heads
over 16 devices, and no batch axis of two ends up in the rows of a register. A length that the axis does not divide is
padded for the exchange alone; the attention itself sees the true length.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from helios_jax.errors import UserError
from kernels.attention.dispatch import Core, attend

Array = jax.Array


def context_parallel(
    mesh: Mesh,
    *,
    axis: str = "context",
    batch_axes: Sequence[str] = (),
    head_axis: str | None = None,
    implementation: str | Core | None = None,
) -> Core:
    """A function of the core contract, for ``compacted_attention(implementation=...)``, that runs on a mesh.

    Self-attention exchanges as above. With a bias (cross-attention over a prompt) queries stay where they are, and
    every device of ``axis`` holds all keys and values.

    Args:
      mesh: devices; within ``jax.jit`` with automatic axes.
      axis: mesh axis over which tokens are divided before and after the attention.
      batch_axes: mesh axes over which samples are divided. head_axis: mesh axis over which heads are divided.
      implementation: what attends on one device, as for ``attend``.
    Raises, when called:
      UserError: batch, heads or their product do not divide over the mesh's axes.
    """
    for name in (axis, *batch_axes, *((head_axis,) if head_axis else ())):
        if name not in mesh.shape:
            raise UserError(f"context_parallel: mesh axes are {tuple(mesh.shape)}, got {name!r}")
    parts, head_parts = mesh.shape[axis], mesh.shape[head_axis] if head_axis else 1
    batch_parts = 1
    for name in batch_axes:
        batch_parts *= mesh.shape[name]
    samples = tuple(batch_axes) or None
    by_token = PartitionSpec(samples, axis, head_axis, None)  # of [B, S, N, D]
    by_token_lse = PartitionSpec(samples, head_axis, axis)  # of [B, N, S]

    def exchanged(q: Array, k: Array, v: Array, queries: int, keys: int, return_lse: bool):
        """q: [b, S/parts, n, D]; k, v: [b, K/parts, n, D] on one device, lengths padded."""
        batch, _, heads, _ = q.shape

        def to_heads(x: Array, length: int) -> Array:
            x = x.swapaxes(0, 1).reshape(x.shape[1], batch * heads, -1)  # -> [S/parts, b*n, D]
            x = jax.lax.all_to_all(x, axis, split_axis=1, concat_axis=0, tiled=True)  # -> [S, b*n/parts, D]
            return x[None, :length]

        result = attend(to_heads(q, queries), to_heads(k, keys), to_heads(v, keys), return_lse=return_lse,
                        implementation=implementation)
        out, lse = result if return_lse else (result, None)
        out = jnp.pad(out[0], ((0, -queries % parts), (0, 0), (0, 0)))  # [S, b*n/parts, D]
        out = jax.lax.all_to_all(out, axis, split_axis=0, concat_axis=1, tiled=True)  # -> [S/parts, b*n, D]
        out = out.reshape(out.shape[0], batch, heads, -1).swapaxes(0, 1)
        if not return_lse:
            return out
        lse = jnp.pad(lse[0], ((0, 0), (0, -queries % parts)))  # [b*n/parts, S]
        lse = jax.lax.all_to_all(lse, axis, split_axis=1, concat_axis=0, tiled=True)  # -> [b*n, S/parts]
        return out, lse.reshape(batch, heads, -1)

    def attention(q: Array, k: Array, v: Array, bias: Array | None = None, *, return_lse: bool = False):
        """Same contract as :func:`kernels.attention.reference.attention`, on the whole arrays."""
        batch, queries, heads, _ = q.shape
        keys = k.shape[1]
        if batch % batch_parts or heads % head_parts:
            raise UserError(f"context_parallel: batch {batch} and {heads} heads must divide over {batch_parts} and "
                            f"{head_parts} devices")
        folded = batch // batch_parts * (heads // head_parts)
        if bias is None and folded % parts:
            raise UserError(f"context_parallel: heads times samples of one device, here {folded}, must divide over the "
                            f"{parts} devices of {axis!r}")
        q = _pad_rows(q, parts)
        out_specs = (by_token, by_token_lse) if return_lse else by_token
        if bias is None:
            def one_device(q, k, v):
                return exchanged(q, k, v, queries, keys, return_lse)

            operands, in_specs = (q, _pad_rows(k, parts), _pad_rows(v, parts)), (by_token,) * 3
        else:
            def one_device(q, k, v, bias):
                return attend(q, k, v, bias, return_lse=return_lse, implementation=implementation)

            whole = PartitionSpec(samples, None, head_axis, None)
            operands, in_specs = (q, k, v, bias), (by_token, whole, whole, PartitionSpec(samples, None))
        # A kernel's outputs carry no record of the axes they vary over.
        run = jax.shard_map(one_device, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        result = run(*operands)
        out, lse = result if return_lse else (result, None)
        return (out[:, :queries], lse[:, :, :queries]) if return_lse else out[:, :queries]

    return attention


def _pad_rows(x: Array, multiple: int) -> Array:
    """[B, S, N, D] -> S rounded up with zeros."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), (0, 0), (0, 0)))
