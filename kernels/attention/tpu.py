"""The "mosaic_tpu" variant: Pallas kernels forward and backward, and the same kernels interpreted anywhere.

Queries and keys go in as [B*N, S, D], in which their rotation leaves them. With head size 128, values and the output
stay in [B, S, N*D], the layout of the projections on both sides, and heads are cut straight out of it; smaller heads
cannot be, because a block's last axis must fill the 128 lanes or the array.

Sequences that do not fit in VMEM are cut: keys in the forward pass (the parts are joined by their log-sum-exps),
queries in the backward pass (the parts of dk and dv are added).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.attention.device import current_device
from kernels.attention.prologue import RawQueries
from kernels.attention.reference import output_products
from kernels.attention.tpu_backward import backward
from kernels.attention.tpu_forward import Prologue, forward
from kernels.attention.tpu_tiles import (
    CHIPS,
    INTERPRETED,
    LANES,
    REGISTER_ROWS,
    Chip,
    backward_bytes,
    chip_of,
    forward_bytes,
    longest,
    split,
)

Array = jax.Array
HEAD_SIZES = (32, 64, 128)


class Settings(NamedTuple):
    """What is fixed at trace time. max_keys, max_queries: rows that may be resident, forward and backward."""

    forward_tile: tuple[int, int]
    backward_tile: tuple[int, int]
    max_keys: int
    max_queries: int
    bounded: bool
    interpret: object = False


def settings_for(chip: Chip, keys: int, itemsize: int, with_bias: bool, interpret: object = False) -> Settings:
    """Tiles and residency limits from the chip's table."""
    tiles, vmem = chip.tiles_for(keys), usable_vmem(chip)
    return Settings(tiles.forward, tiles.backward,
                    longest(forward_bytes, vmem, tiles.forward, itemsize, with_bias),
                    longest(backward_bytes, vmem, tiles.backward, itemsize, with_bias), chip.bounded, interpret)


def usable_vmem(chip: Chip) -> int:
    """The compiler gets a quarter more than the estimate, see vmem_limit_bytes in the kernels."""
    return chip.vmem * 4 // 5 - (4 << 20)


def attention(
    q: Array, k: Array, v: Array, bias: Array | None = None, *, return_lse: bool = False
) -> Array | tuple[Array, Array]:
    """Same contract as :func:`kernels.attention.reference.attention`, on a TPU v5e, v5p or v6e.

    Raises: NotImplementedError for another device, dtype or head size.
    """
    return _checked(q, k, v, bias, return_lse, CHIPS[_chip()], False)


def interpreted(
    q: Array, k: Array, v: Array, bias: Array | None = None, *, return_lse: bool = False, interpret: object = True
) -> Array | tuple[Array, Array]:
    """The same kernels in Pallas' interpreter, on any device, with small tiles: for tests, and slow."""
    return _checked(q, k, v, bias, return_lse, INTERPRETED, interpret)


def attend_raw_queries(queries: RawQueries, k: Array, v: Array, *, eps: float, return_lse: bool = False
                       ) -> Array | tuple[Array, Array]:
    """:func:`attention` of queries that the kernel norms and rotates itself, without bias.

    Where gradients are taken, the queries are prepared outside and everything is as in :func:`attention`.

    Raises: NotImplementedError as there, for head sizes below 128, and where the rotary tables do not fit in VMEM.
    """
    return _raw_checked(queries, k, v, eps, return_lse, CHIPS[_chip()], False)


def interpreted_raw_queries(queries: RawQueries, k: Array, v: Array, *, eps: float, return_lse: bool = False
                            ) -> Array | tuple[Array, Array]:
    """The same as :func:`interpreted` is to :func:`attention`."""
    return _raw_checked(queries, k, v, eps, return_lse, INTERPRETED, True)


attention.attend_raw_queries = attend_raw_queries
interpreted.attend_raw_queries = interpreted_raw_queries


def _chip() -> str:
    device = current_device()
    if device.platform != "tpu":
        raise NotImplementedError(f"the kernel is for TPUs, the device is {device.kind} ({device.platform})")
    chip = chip_of(device.kind)
    if chip is None:
        raise NotImplementedError(f"no tiles for {device.kind}; there are tiles for {', '.join(CHIPS)}")
    return chip


def _raw_checked(queries, k, v, eps, return_lse, chip, interpret):
    _check(queries.q, k, v)
    rows, settings = queries.q.shape[1], settings_for(chip, k.shape[1], k.dtype.itemsize, False, interpret)
    if k.shape[-1] % LANES:
        raise NotImplementedError(f"heads are cut out of the projection's rows from size {LANES}, got {k.shape[-1]}")
    needed = forward_bytes(k.shape[1], settings.forward_tile, k.dtype.itemsize, False, rows)
    if needed > usable_vmem(chip):
        raise NotImplementedError(f"keys, values and rotary tables need {needed} bytes of VMEM, there are "
                                  f"{usable_vmem(chip)}")
    out, lse = _attention_of_raw(settings, eps, queries, k, v)
    return (out, lse) if return_lse else out


def _checked(q, k, v, bias, return_lse, chip, interpret):
    _check(q, k, v)
    settings = settings_for(chip, k.shape[1], q.dtype.itemsize, bias is not None, interpret)
    out, lse = _attention(settings, q, k, v, None if bias is None else bias.astype(jnp.float32))
    return (out, lse) if return_lse else out


def _check(q: Array, k: Array, v: Array) -> None:
    if q.dtype not in (jnp.bfloat16, jnp.float32) or not q.dtype == k.dtype == v.dtype:
        raise NotImplementedError(f"q, k and v all bfloat16 or all float32, got {q.dtype}, {k.dtype}, {v.dtype}")
    if k.shape[-1] not in HEAD_SIZES:
        raise NotImplementedError(f"head size: one of {HEAD_SIZES}, got {k.shape[-1]}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(settings: Settings, q: Array, k: Array, v: Array, bias: Array | None) -> tuple[Array, Array]:
    """q: [B, S, N, D]; k, v: [B, K, N, D]; bias: [B, K]. Returns [B, S, N, D] and the log-sum-exp [B, N, S]."""
    out, _, lse = _forward(settings, q, k, v, bias, with_rest=False)
    return out, lse


def _forward(settings: Settings, q: Array, k: Array, v: Array, bias: Array | None, *, with_rest: bool):
    """(output, what it lost when it was rounded or None, log-sum-exp)."""
    batch, _, heads, size = q.shape
    dtype, with_rest = q.dtype, with_rest and q.dtype != jnp.float32
    q, k, v = _heads_first(q), _heads_first(k), _flat(v)
    run = functools.partial(forward, size=size, tile=settings.forward_tile, bounded=settings.bounded,
                            interpret=settings.interpret)
    column = None if bias is None else bias[..., None]  # [B, K, 1]: along the sublanes, as the keys are
    if k.shape[1] <= settings.max_keys:
        out, *rest, lse = run(q, k, v, column, out_dtype=dtype, with_rest=with_rest)
        out, *rest = (_heads(x, batch, heads) for x in (out, *rest))
    else:
        parts = [run(q, k[:, part], v[:, part], None if column is None else column[:, part], out_dtype=jnp.float32)
                 for part in _parts(k.shape[1], settings.max_keys, REGISTER_ROWS)]
        lse = jax.nn.logsumexp(jnp.stack([part_lse for _, part_lse in parts]), axis=0)
        share = [jnp.exp(part_lse - lse).reshape(batch, heads, -1) for _, part_lse in parts]
        outs = [_heads(part, batch, heads) for part, _ in parts]
        exact = sum(o * w.swapaxes(1, 2)[..., None] for o, w in zip(outs, share, strict=True))
        out = exact.astype(dtype)
        rest = [(exact - out.astype(jnp.float32)).astype(dtype)] if with_rest else []
    return out, rest[0] if rest else None, lse.reshape(batch, heads, -1)


def _attention_forward(settings, q, k, v, bias):
    out, rest, lse = _forward(settings, q, k, v, bias, with_rest=True)
    return (out, lse), (q, k, v, bias, out, rest, lse)


def _attention_backward(settings, residuals, gradients):
    q, k, v, bias, out, rest, lse = residuals
    g, d_lse = gradients
    batch, queries, heads, size = q.shape
    delta = output_products(out, rest, g)  # [B, S, N]
    # The gradient of the log-sum-exp with respect to the logits is the weights, so it only shifts delta.
    delta = (delta.swapaxes(1, 2) - d_lse).reshape(batch * heads, queries)
    lse = lse.reshape(batch * heads, queries)
    flat_q, flat_k, flat_v, flat_g = _heads_first(q), _heads_first(k), _flat(v), _flat(g.astype(q.dtype))
    column = None if bias is None else bias[..., None]
    cuts = _parts(queries, settings.max_queries, LANES)
    parts = [backward(flat_q[:, part], flat_k, flat_v, column, flat_g[:, part], lse[:, part], delta[:, part],
                      size=size, tile=settings.backward_tile, interpret=settings.interpret,
                      out_dtype=k.dtype if len(cuts) == 1 else jnp.float32) for part in cuts]
    d_q = jnp.concatenate([part[0] for part in parts], axis=1) if len(parts) > 1 else parts[0][0]
    d_k, d_v = (sum(part[i] for part in parts[1:]) + parts[0][i] if len(parts) > 1 else parts[0][i] for i in (1, 2))
    d_q, d_k, d_v = (_heads(x.astype(q.dtype), batch, heads) for x in (d_q, d_k, d_v))
    return d_q, d_k, d_v, None if bias is None else jnp.zeros_like(bias)


_attention.defvjp(_attention_forward, _attention_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention_of_raw(settings: Settings, eps: float, queries: RawQueries, k: Array, v: Array) -> tuple[Array, Array]:
    """As ``_attention``, for k and v of one part."""
    batch, _, heads, size = k.shape
    q, norm, cos, sin = queries
    prologue = Prologue.of(q, norm, cos, sin, eps, size, split(q.shape[1], settings.forward_tile[0], LANES))
    out, lse = forward(q, _heads_first(k), _flat(v), None, size=size, tile=settings.forward_tile, out_dtype=q.dtype,
                       bounded=settings.bounded, prologue=prologue, interpret=settings.interpret)
    return _heads(out, batch, heads), lse.reshape(batch, heads, -1)


def _attention_of_raw_forward(settings, eps, queries, k, v):
    def prepared(queries, k, v):
        return _attention(settings, queries.prepared(k.shape[2], eps), k, v, None)

    return jax.vjp(prepared, queries, k, v)


_attention_of_raw.defvjp(_attention_of_raw_forward, lambda settings, eps, vjp, gradients: vjp(gradients))


def _parts(length: int, largest: int, multiple: int) -> list[slice]:
    """Slices of at most ``largest`` rows, all but the last of one size that is a multiple of ``multiple``."""
    count = -(-length // largest)
    size = -(-length // count // multiple) * multiple
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _heads_first(x: Array) -> Array:
    """[B, S, N, D] -> [B*N, S, D]."""
    batch, rows, heads, size = x.shape
    return x.swapaxes(1, 2).reshape(batch * heads, rows, size)


def _flat(x: Array) -> Array:
    """[B, S, N, D] -> [B, S, N*D] where heads fill whole lanes, else [B*N, S, D]."""
    return x.reshape(*x.shape[:2], -1) if x.shape[-1] % LANES == 0 else _heads_first(x)


def _heads(x: Array, batch: int, heads: int) -> Array:
    """Inverse of both: [B*N, S, D] or [B, S, N*D] -> [B, S, N, D]."""
    if x.shape[0] == batch * heads:
        return x.reshape(batch, heads, *x.shape[1:]).swapaxes(1, 2)
    return x.reshape(batch, x.shape[1], heads, -1)
