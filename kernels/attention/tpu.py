"""The "mosaic_tpu" variant: Pallas kernels forward and backward, and the same kernels interpreted anywhere.

Head size 128 reads heads straight out of [B, S, N*D], the layout of the projections: no transpose on the way in or
out. Smaller heads are brought to [B*N, S, D] first, because a block's last axis must fill the 128 lanes or the array.

Sequences that do not fit in VMEM are cut: keys in the forward pass (the parts are joined by their log-sum-exps),
queries in the backward pass (the parts of dk and dv are added).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.attention.device import current_device
from kernels.attention.tpu_backward import backward
from kernels.attention.tpu_forward import forward
from kernels.attention.tpu_tiles import (
    CHIPS,
    INTERPRETED,
    KEY_MULTIPLE,
    LANES,
    Chip,
    backward_bytes,
    chip_of,
    forward_bytes,
    longest,
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
    tiles = chip.tiles_for(keys)
    # The compiler gets a quarter more than the estimate, see vmem_limit_bytes in the kernels.
    vmem = chip.vmem * 4 // 5 - (4 << 20)
    return Settings(tiles.forward, tiles.backward,
                    longest(forward_bytes, vmem, tiles.forward, itemsize, with_bias),
                    longest(backward_bytes, vmem, tiles.backward, itemsize, with_bias), chip.bounded, interpret)


def attention(
    q: Array, k: Array, v: Array, bias: Array | None = None, *, return_lse: bool = False
) -> Array | tuple[Array, Array]:
    """Same contract as :func:`kernels.attention.reference.attention`, on a TPU v5e, v5p or v6e.

    Raises: NotImplementedError for another device, dtype or head size.
    """
    device = current_device()
    if device.platform != "tpu":
        raise NotImplementedError(f"the kernel is for TPUs, the device is {device.kind} ({device.platform})")
    chip = chip_of(device.kind)
    if chip is None:
        raise NotImplementedError(f"no tiles for {device.kind}; there are tiles for {', '.join(CHIPS)}")
    return _checked(q, k, v, bias, return_lse, CHIPS[chip], False)


def interpreted(
    q: Array, k: Array, v: Array, bias: Array | None = None, *, return_lse: bool = False, interpret: object = True
) -> Array | tuple[Array, Array]:
    """The same kernels in Pallas' interpreter, on any device, with small tiles: for tests, and slow."""
    return _checked(q, k, v, bias, return_lse, INTERPRETED, interpret)


def _checked(q, k, v, bias, return_lse, chip, interpret):
    if q.dtype not in (jnp.bfloat16, jnp.float32) or not q.dtype == k.dtype == v.dtype:
        raise NotImplementedError(f"q, k and v all bfloat16 or all float32, got {q.dtype}, {k.dtype}, {v.dtype}")
    if q.shape[-1] not in HEAD_SIZES:
        raise NotImplementedError(f"head size: one of {HEAD_SIZES}, got {q.shape[-1]}")
    settings = settings_for(chip, k.shape[1], q.dtype.itemsize, bias is not None, interpret)
    out, lse = _attention(settings, q, k, v, None if bias is None else bias.astype(jnp.float32))
    return (out, lse) if return_lse else out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(settings: Settings, q: Array, k: Array, v: Array, bias: Array | None) -> tuple[Array, Array]:
    """q: [B, S, N, D]; k, v: [B, K, N, D]; bias: [B, K]. Returns [B, S, N, D] and the log-sum-exp [B, N, S]."""
    batch, _, heads, size = q.shape
    q, k, v = _flat(q), _flat(k), _flat(v)
    run = functools.partial(forward, size=size, tile=settings.forward_tile, bounded=settings.bounded,
                            interpret=settings.interpret)
    column = _bias_column(bias, q.shape[0] // batch)
    parts = [run(q, k[:, part], v[:, part], None if column is None else column[:, part],
                 out_dtype=q.dtype if k.shape[1] <= settings.max_keys else jnp.float32)
             for part in _parts(k.shape[1], settings.max_keys, KEY_MULTIPLE)]
    out, lse = parts[0]
    if len(parts) > 1:
        lse = jax.nn.logsumexp(jnp.stack([part_lse for _, part_lse in parts]), axis=0)
        share = [jnp.exp(part_lse - lse).reshape(batch, heads, -1) for _, part_lse in parts]
        outs = [_heads(part, batch, heads) for part, _ in parts]
        out = sum(o * w.swapaxes(1, 2)[..., None] for o, w in zip(outs, share, strict=True)).astype(q.dtype)
    else:
        out = _heads(out, batch, heads)
    return out, lse.reshape(batch, heads, -1)


def _attention_forward(settings, q, k, v, bias):
    out, lse = _attention(settings, q, k, v, bias)
    return (out, lse), (q, k, v, bias, out, lse)


def _attention_backward(settings, residuals, gradients):
    q, k, v, bias, out, lse = residuals
    g, d_lse = gradients
    batch, queries, heads, size = q.shape
    delta = (g.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)  # [B, S, N]
    # The gradient of the log-sum-exp with respect to the logits is the weights, so it only shifts delta.
    delta = (delta.swapaxes(1, 2) - d_lse).reshape(batch * heads, queries)
    lse = lse.reshape(batch * heads, queries)
    flat_q, flat_g, flat_k, flat_v = _flat(q), _flat(g.astype(q.dtype)), _flat(k), _flat(v)
    column = _bias_column(bias, flat_q.shape[0] // batch)
    cuts = _parts(queries, settings.max_queries, LANES)
    parts = [backward(flat_q[:, part], flat_k, flat_v, column, flat_g[:, part], lse[:, part], delta[:, part],
                      size=size, tile=settings.backward_tile, interpret=settings.interpret,
                      out_dtype=k.dtype if len(cuts) == 1 else jnp.float32) for part in cuts]
    d_q = jnp.concatenate([part[0] for part in parts], axis=1) if len(parts) > 1 else parts[0][0]
    d_k, d_v = (sum(part[i] for part in parts[1:]) + parts[0][i] if len(parts) > 1 else parts[0][i] for i in (1, 2))
    d_q, d_k, d_v = (_heads(x.astype(q.dtype), batch, heads) for x in (d_q, d_k, d_v))
    return d_q, d_k, d_v, None if bias is None else jnp.zeros_like(bias)


_attention.defvjp(_attention_forward, _attention_backward)


def _parts(length: int, largest: int, multiple: int) -> list[slice]:
    """Slices of at most ``largest`` rows, all but the last of one size that is a multiple of ``multiple``."""
    count = -(-length // largest)
    size = -(-length // count // multiple) * multiple
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _flat(x: Array) -> Array:
    """[B, S, N, D] -> [B, S, N*D] where heads fill whole lanes, else [B*N, S, D]."""
    batch, rows, heads, size = x.shape
    if size % LANES == 0:
        return x.reshape(batch, rows, heads * size)
    return x.swapaxes(1, 2).reshape(batch * heads, rows, size)


def _heads(x: Array, batch: int, heads: int) -> Array:
    """Inverse of :func:`_flat`."""
    if x.shape[0] == batch and x.shape[-1] % LANES == 0:
        return x.reshape(batch, x.shape[1], heads, -1)
    return x.reshape(batch, heads, *x.shape[1:]).swapaxes(1, 2)


def _bias_column(bias: Array | None, repeats: int) -> Array | None:
    """[B, K] -> [B * repeats, K, 1]: along the sublanes, as the keys are; repeated where heads are in the batch."""
    return None if bias is None else jnp.repeat(bias, repeats, axis=0)[..., None]
