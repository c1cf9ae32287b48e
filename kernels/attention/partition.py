"""Attention on a mesh: every device attends for its own samples and heads, over all tokens.

Kernels see one device's arrays. Where tokens are divided over mesh axes, every device holds a stretch of the tokens of
its heads; attention wants all tokens of some heads. An explicit all-to-all leads there and another one back. Around
them the batch is folded into the heads, so that what is divided is their product: a guided batch of two divides 40
heads over 16 devices, and no batch axis of two ends up in the rows of a register. A length that does not divide is
padded for the exchange alone; the attention itself sees the true length.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, PartitionSpec

from helios_jax.errors import UserError

Array = jax.Array
Result = Array | tuple[Array, Array]


@dataclasses.dataclass(frozen=True)
class AttentionPartition:
    """mesh: of the run; batch, tokens, heads: the mesh axes over which samples, tokens and heads are divided."""

    mesh: Mesh
    batch: tuple[str, ...]
    tokens: tuple[str, ...]
    heads: tuple[str, ...]

    def size(self, axes: tuple[str, ...]) -> int:
        """How many devices lie along mesh axes."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def batch_axes(self, batch: int) -> tuple[str, ...]:
        """The axes that divide so many samples; along the others every device computes the same."""
        axes = self.batch
        while batch % self.size(axes):
            axes = axes[:-1]
        return axes

    def check(self, batch: int, heads: int, *, exchange: bool = True) -> None:
        """Raises UserError unless the heads, and where there is an exchange samples times heads, divide."""
        parts = self.size(self.heads)
        if heads % parts:
            raise UserError(f"mesh: {heads} attention heads do not divide by {parts} ({self._listing(self.heads)}), "
                            f"but by {_divisors(heads)}")
        folded = batch // self.size(self.batch_axes(batch)) * (heads // parts)
        if exchange and folded % self.size(self.tokens):
            raise UserError(f"mesh: heads times samples of one device, here {folded}, do not divide by "
                            f"{self.size(self.tokens)} ({self._listing(self.tokens)}), but by {_divisors(folded)}")

    def _listing(self, axes: tuple[str, ...]) -> str:
        return " x ".join(f"mesh.{axis} {self.mesh.shape[axis]}" for axis in axes)


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


_CURRENT: ContextVar[AttentionPartition | None] = ContextVar("attention_partition", default=None)


@contextlib.contextmanager
def use(partition: AttentionPartition) -> Iterator[None]:
    """Within it, attention runs on the mesh."""
    token = _CURRENT.set(partition)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def is_in_use() -> bool:
    """Whether attention runs on a mesh, by :func:`use` or within a ``jax.shard_map`` that has divided the arrays."""
    return (_CURRENT.get() is not None and _CURRENT.get().mesh.size > 1) or _is_divided()


def _is_divided() -> bool:
    return AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types


def per_device(core: Callable[..., Result], q: Array, k: Array, v: Array, bias: Array | None = None, *,
               return_lse: bool = False) -> Result:
    """``core`` on the mesh in use; ``core`` itself where there is none."""
    if not is_in_use() or _is_divided():
        return core(q, k, v, bias, return_lse=return_lse)
    return on_mesh(_CURRENT.get(), core, q, k, v, bias, return_lse=return_lse)


def on_mesh(partition: AttentionPartition, core: Callable[..., Result], q: Array, k: Array, v: Array,
            bias: Array | None = None, *, return_lse: bool = False) -> Result:
    """The contract of :func:`kernels.attention.reference.attention`, computed by ``core`` on every device's part.

    Self-attention is exchanged as above. With a bias (cross-attention over a prompt) queries stay where they are, and
    every device has all keys and values of its samples and heads. Nor is there an exchange where tokens are whole.

    Raises:
      UserError: the heads, or samples times heads, do not divide.
    """
    queries, keys, parts = q.shape[1], k.shape[1], partition.size(partition.tokens)
    exchange = bias is None and parts > 1
    partition.check(q.shape[0], q.shape[2], exchange=exchange)
    samples, tokens, heads = (axes or None for axes in (partition.batch_axes(q.shape[0]), partition.tokens,
                                                        partition.heads))

    def one_device(q: Array, k: Array, v: Array, bias: Array | None = None) -> Result:
        if not exchange:
            return core(q, k, v, bias, return_lse=return_lse)
        return _exchanged(core, q, k, v, partition.tokens, parts, queries, keys, return_lse)

    by_token = PartitionSpec(samples, tokens, heads, None)  # of [B, S, N, D]
    if exchange:
        operands, specs = [_pad_rows(x, parts) for x in (q, k, v)], [by_token] * 3
    else:
        whole = PartitionSpec(samples, None, heads, None)
        operands, specs = [_pad_rows(q, parts), k, v], [by_token, whole, whole]
    if bias is not None:
        operands.append(bias)
        specs.append(PartitionSpec(samples, None))
    out_specs = (by_token, PartitionSpec(samples, heads, tokens)) if return_lse else by_token  # lse: [B, N, S]
    # Variants are opaque to the check of replication (kernels, custom derivatives).
    result = jax.shard_map(one_device, mesh=partition.mesh, in_specs=tuple(specs), out_specs=out_specs,
                           check_vma=False)(*operands)
    return (result[0][:, :queries], result[1][:, :, :queries]) if return_lse else result[:, :queries]


def _exchanged(core: Callable[..., Result], q: Array, k: Array, v: Array, axes: tuple[str, ...], parts: int,
               queries: int, keys: int, return_lse: bool) -> Result:
    """q: [b, S/parts, n, D]; k, v: [b, K/parts, n, D] on one device, lengths padded; the true ones are given."""
    batch, _, heads, _ = q.shape

    def to_heads(x: Array, length: int) -> Array:
        x = x.swapaxes(0, 1).reshape(x.shape[1], batch * heads, -1)  # -> [S/parts, b*n, D]
        x = jax.lax.all_to_all(x, axes, split_axis=1, concat_axis=0, tiled=True)  # -> [S, b*n/parts, D]
        return x[None, :length]

    result = core(to_heads(q, queries), to_heads(k, keys), to_heads(v, keys), None, return_lse=return_lse)
    out, lse = result if return_lse else (result, None)
    out = _pad_rows(out, parts)[0]  # [S, b*n/parts, D]
    out = jax.lax.all_to_all(out, axes, split_axis=0, concat_axis=1, tiled=True)  # -> [S/parts, b*n, D]
    out = out.reshape(out.shape[0], batch, heads, -1).swapaxes(0, 1)
    if not return_lse:
        return out
    lse = jnp.pad(lse[0], ((0, 0), (0, -queries % parts)))  # [b*n/parts, S]
    lse = jax.lax.all_to_all(lse, axes, split_axis=1, concat_axis=0, tiled=True)  # -> [b*n, S/parts]
    return out, lse.reshape(batch, heads, -1)


def _pad_rows(x: Array, multiple: int) -> Array:
    """[B, S, N, D] -> S rounded up with zeros."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), (0, 0), (0, 0)))
