"""Backward attention kernel for TPUs (Pallas, Mosaic): dq, dk and dv in one pass over the scores.

Two kernels, one for dq and one for dk and dv, would each recompute the scores and the products of the output's
gradient with the values: seven matrix products per tile. Here the queries, the output's gradients and a float32
accumulator of dq of one head stay in VMEM while the programs walk over the keys, so a tile costs five products and no
partial sum ever goes to HBM. The order of additions is fixed, so the result is deterministic.

Scores are transposed, [keys, queries], as in the forward kernel.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.tpu_forward import LOG2_E, dot, scores
from kernels.attention.tpu_tiles import KEY_MULTIPLE, LANES, backward_bytes, split


def _kernel(*refs, keys: int, step: int, scale: float, with_bias: bool):
    """q_ref, g_ref, dq_ref: [S, D]; stats_ref: [steps, 2, step]; k_ref, v_ref, dk_ref, dv_ref: [block, D]."""
    q_ref, g_ref, stats_ref, k_ref, v_ref, *bias_refs, dq_ref, dk_ref, dv_ref, dq_sum, dk_sum, dv_sum = refs
    queries, block, dtype = q_ref.shape[0], k_ref.shape[0], q_ref.dtype
    whole, rest = divmod(queries, step)
    index, last = pl.program_id(1), pl.num_programs(1) - 1

    @pl.when(index == 0)
    def _():
        dq_sum[...] = jnp.zeros(dq_sum.shape, jnp.float32)

    def program(rows: int) -> None:
        here = slice(0, rows)
        k, v = k_ref[here, :], v_ref[here, :]
        bias = bias_refs[0][here, :] if with_bias else None
        dk_sum[here, :] = jnp.zeros((rows, k.shape[1]), jnp.float32)
        dv_sum[here, :] = jnp.zeros((rows, k.shape[1]), jnp.float32)

        def inner(i, columns: int) -> None:
            window = pl.ds(pl.multiple_of(i * step, step), columns) if columns == step else pl.ds(i * step, columns)
            q, g = q_ref[window, :], g_ref[window, :]
            stats = stats_ref[i]
            lse, delta = stats[0:1, :columns], stats[1:2, :columns]
            weights = jnp.exp2(scores(k, q, bias) - lse)  # [rows, columns]
            dv_sum[here, :] += dot(weights.astype(dtype), g, (1, 0))
            d_scores = (weights * (dot(v, g, (1, 1)) - delta)).astype(dtype)
            dk_sum[here, :] += dot(d_scores, q, (1, 0))
            dq_sum[i, :, :columns] += dot(k, d_scores, (0, 0))  # [D, columns]

        jax.lax.fori_loop(0, whole, lambda i, _: inner(i, step), None)
        if rest:
            inner(whole, rest)
        dk_ref[here, :] = (dk_sum[here, :] * scale).astype(dk_ref.dtype)
        dv_ref[here, :] = dv_sum[here, :].astype(dv_ref.dtype)

    tail = keys - (pl.cdiv(keys, block) - 1) * block
    if tail == block:
        program(block)
    else:  # rows beyond the last key are undefined and would reach dq through the sum over keys
        pl.when(index < last)(functools.partial(program, block))
        pl.when(index == last)(functools.partial(program, tail))

    @pl.when(index == last)
    def _():
        def store(i, columns: int) -> None:
            window = pl.ds(pl.multiple_of(i * step, step), columns) if columns == step else pl.ds(i * step, columns)
            dq_ref[window, :] = (dq_sum[i, :, :columns].T * scale).astype(dq_ref.dtype)

        jax.lax.fori_loop(0, whole, lambda i, _: store(i, step), None)
        if rest:
            store(whole, rest)


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    g: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    *,
    size: int,
    tile: tuple[int, int],
    out_dtype: jnp.dtype,
    interpret=False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of every head.

    Args:
      q, g: [B, S, N*D] queries and gradients of the output; k, v: [B, K, N*D]; bias: [B, K, 1] float32 or None.
      lse: [B*N, S] float32; delta: [B*N, S] float32, the row sums of output times gradient, less the gradient of lse.
      size: D. tile: (keys of one program, queries of one inner step), upper bounds.
      out_dtype: of dk and dv, which are partial sums where the queries were cut into parts; dq has q's dtype.
    Returns: dq [B, S, N*D]; dk, dv [B, K, N*D].
    """
    batch, queries, width = q.shape
    keys, heads = k.shape[1], width // size
    block, step = split(keys, tile[0], KEY_MULTIPLE), split(queries, tile[1], LANES)
    steps = pl.cdiv(queries, step)
    stats = jnp.stack([lse * LOG2_E, delta], axis=1)  # [B*N, 2, S]
    stats = jnp.pad(stats, ((0, 0), (0, 0), (0, steps * step - queries)))
    stats = stats.reshape(batch * heads, 2, steps, step).swapaxes(1, 2)  # [B*N, steps, 2, step]

    whole = pl.BlockSpec((None, queries, size), lambda program, j: (program // heads, 0, program % heads))
    part = pl.BlockSpec((None, block, size), lambda program, j: (program // heads, j, program % heads))
    in_specs = [whole, whole, pl.BlockSpec((None, steps, 2, step), lambda program, j: (program, 0, 0, 0)), part, part]
    operands = [q, g, stats, k, v]
    if bias is not None:
        in_specs.append(pl.BlockSpec((None, block, 1), lambda program, j: (program // heads, j, 0)))
        operands.append(bias)
    vmem = backward_bytes(queries, (block, step), q.dtype.itemsize, bias is not None)
    pairs = batch * heads * queries * keys
    return pl.pallas_call(
        functools.partial(_kernel, keys=keys, step=step, scale=size**-0.5, with_bias=bias is not None),
        grid=(batch * heads, pl.cdiv(keys, block)),
        in_specs=in_specs,
        out_specs=[whole, part, part],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(k.shape, out_dtype),
                   jax.ShapeDtypeStruct(v.shape, out_dtype)],
        scratch_shapes=[pltpu.VMEM((steps, size, step), jnp.float32), pltpu.VMEM((block, size), jnp.float32),
                        pltpu.VMEM((block, size), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"),
                                             vmem_limit_bytes=vmem + vmem // 4 + (4 << 20)),
        cost_estimate=pl.CostEstimate(flops=10 * pairs * size, transcendentals=pairs,
                                      bytes_accessed=3 * q.nbytes + 4 * k.nbytes),
        interpret=interpret,
        name="attention_backward",
    )(*operands)
