"""Attention on Hopper GPUs (H100, H200) as Pallas Mosaic GPU kernels, forward and backward.

``docs/kernels_gpu.md`` explains the kernels; ``gpu_tiles.py`` holds their tile sizes.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from kernels.attention.device import current_device
from kernels.attention.gpu_tiles import COMPUTE_WARPGROUPS, ROWS_PER_WARPGROUP, Tiles, tiles_for
from kernels.attention.reference import output_products

Array = jax.Array

HOPPER = ("H100", "H200", "H800", "H20")
DTYPES = (jnp.bfloat16, jnp.float16)
HEAD_SIZES = (64, 128)
# Bulk copies into the layout of the tensor cores move whole groups of rows: other lengths are padded to one, by XLA.
COPIED_ROWS = 8
# The interpreter imitates this device.
INTERPRETED = "NVIDIA H100 80GB HBM3"


def attention(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None = None,
    *,
    return_lse: bool = False,
    tiles: Tiles | None = None,
    interpret: bool | object = False,
) -> Array | tuple[Array, Array]:
    """softmax(q kᵀ / sqrt(D) + bias) v with float32 softmax; differentiable in q, k and v.

    Args:
      q: [B, S, N, D]; k, v: [B, K, N, D], normed and rotated, bfloat16 or float16, D 64 or 128. S and K are free.
      bias: [B, K] float32 added to the logits, a constant (its gradient is zero), or None.
      return_lse: also return the log-sum-exp of each query's logits; it is differentiable too.
      tiles: sizes to use in place of the table's.
      interpret: True, or an ``InterpretGPUParams``, runs in Pallas's GPU interpreter on a CPU (tests).
    Returns: [B, S, N, D] in q's dtype; with ``return_lse`` also [B, N, S] float32.
    Raises:
      NotImplementedError: the device is no Hopper GPU, or the shape or dtype is none the kernels serve.
    """
    device = INTERPRETED if interpret else current_device().kind
    if not any(name in device for name in HOPPER):
        raise NotImplementedError(f"needs a Hopper GPU (compute capability 9.0), the device is {device}")
    if reason := _why_no_mosaic(bool(interpret)):
        raise NotImplementedError(reason)
    size = q.shape[-1]
    if size not in HEAD_SIZES:
        raise NotImplementedError(f"head size {size}: the kernel serves 64 and 128")
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise NotImplementedError(
            f"dtypes {q.dtype}, {k.dtype}, {v.dtype}: the kernel serves bfloat16 or float16, the same for q, k and v"
        )
    if 0 in (*q.shape, *k.shape):
        raise NotImplementedError(f"empty operands: q {q.shape}, k {k.shape}")
    if k.shape != (q.shape[0], k.shape[1], *q.shape[2:]) or v.shape != k.shape:
        raise NotImplementedError(f"shapes {q.shape}, {k.shape}, {v.shape}: batch, heads and head size must agree")
    tiles = tiles or tiles_for(device, size)
    bias2 = None if bias is None else _prepare_bias(bias, tiles)
    queries, keys = q.shape[1], k.shape[1]
    q, k, v = (jnp.pad(x, ((0, 0), (0, -x.shape[1] % COPIED_ROWS), (0, 0), (0, 0))) for x in (q, k, v))
    out, lse = _attention(q, k, v, bias2, keys, tiles, return_lse, interpret)
    return (out[:, :queries], lse[:, :, :queries]) if return_lse else out[:, :queries]


def interpreted(
    q: Array, k: Array, v: Array, bias: Array | None = None, *, return_lse: bool = False
) -> Array | tuple[Array, Array]:
    """:func:`attention` in Pallas's GPU interpreter, on a CPU: slow, exact about barriers and bounds, for tests."""
    return attention(q, k, v, bias, return_lse=return_lse, interpret=True)


def _why_no_mosaic(interpret: bool) -> str | None:
    # Imported late: Mosaic GPU needs packages that a machine without a GPU may lack.
    try:
        from kernels.attention.gpu_common import interpret_support
    except ImportError as error:
        return f"Pallas Mosaic GPU cannot be imported: {error}"
    return interpret_support() if interpret else None


def _prepare_bias(bias: Array, tiles: Tiles) -> Array:
    """[B, K] -> [B, K'] float32 in base 2, padded so that every kernel copies whole tiles."""
    whole = math.lcm(COMPUTE_WARPGROUPS * ROWS_PER_WARPGROUP, tiles.forward.rows, tiles.dq.rows)
    bias2 = jax.lax.stop_gradient(bias).astype(jnp.float32) * math.log2(math.e)
    return jnp.pad(bias2, ((0, 0), (0, -bias.shape[1] % whole)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _attention(q, k, v, bias2, keys: int, tiles: Tiles, return_lse: bool, interpret) -> tuple[Array, Array | None]:
    from kernels.attention.gpu_forward import forward

    out, _, lse2 = forward(q, k, v, bias2, tiles.forward, keys=keys, with_lse=return_lse, interpret=interpret)
    return out, _natural(lse2, q.shape[1]) if return_lse else None


def _natural(lse2: Array, queries: int) -> Array:
    return lse2[:, :, :queries] * math.log(2.0)


def _attention_fwd(q, k, v, bias2, keys: int, tiles: Tiles, return_lse: bool, interpret):
    from kernels.attention.gpu_forward import forward

    out, rest, lse2 = forward(q, k, v, bias2, tiles.forward, keys=keys, with_lse=True, with_rest=True,
                              interpret=interpret)
    result = out, _natural(lse2, q.shape[1]) if return_lse else None
    return result, (q, k, v, bias2, out, rest, lse2)


def _attention_bwd(keys: int, tiles: Tiles, return_lse: bool, interpret: bool, residuals, cotangents):
    from kernels.attention.gpu_backward import key_value_gradient, query_gradient

    q, k, v, bias2, out, rest, lse2 = residuals
    dout, dlse = cotangents
    delta = output_products(out, rest, dout).swapaxes(1, 2)  # [B, N, S]
    if return_lse:
        # d lse / d logits = weights, so its cotangent joins the row sum that every weight is multiplied with.
        delta = delta - dlse
    delta = jnp.pad(delta, ((0, 0), (0, 0), (0, lse2.shape[2] - q.shape[1])))
    operands = (q, k, v, bias2, dout, lse2, delta)
    dq = query_gradient(*operands, tiles.dq, keys=keys, interpret=interpret)
    dk, dv = key_value_gradient(*operands, tiles.dkv, interpret=interpret)
    return dq, dk, dv, None if bias2 is None else jnp.zeros_like(bias2)


_attention.defvjp(_attention_fwd, _attention_bwd)
