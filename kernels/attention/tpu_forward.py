"""Forward attention kernel for TPUs (Pallas, Mosaic).

One program computes a block of queries of one head. The keys and values of the head stay in VMEM for all its query
blocks, so they are read from HBM once, and a length that no tile divides needs neither padding nor masks: the last
inner step is a static slice of its own size.

Scores are held transposed, [keys, queries]: the running maximum and sum are then rows along the lanes, and reducing
over keys is elementwise work on registers instead of work across lanes.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.tpu_tiles import KEY_MULTIPLE, LANES, forward_bytes, split

LOG2_E = math.log2(math.e)
# Below every logit and finite, so that exp2(lowest - lowest) is 1 and never NaN.
LOWEST = float(jnp.finfo(jnp.float32).min)


def precision_of(dtype: jnp.dtype) -> jax.lax.Precision:
    """float32 inputs get float32 products; bfloat16 products are exact in the float32 accumulator anyway."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def dot(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Product of two matrices contracted over ``axes``, float32 result."""
    return jax.lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())), precision=precision_of(a.dtype),
                               preferred_element_type=jnp.float32)


def scores(k: jax.Array, q: jax.Array, bias: jax.Array | None) -> jax.Array:
    """k [rows, D], q [columns, D], bias [rows, 1] -> logits in units of log 2, float32 [rows, columns]."""
    logits = dot(k, q, (1, 1)) * (q.shape[-1] ** -0.5 * LOG2_E)
    return logits if bias is None else logits + bias * LOG2_E


def columns_of_last(length: int, block: int) -> int:
    """Queries of the last block that must be computed, rounded up to whole registers."""
    rest = length - (pl.cdiv(length, block) - 1) * block
    return min(-(-rest // LANES) * LANES, block)


def _kernel(*refs, queries: int, step: int, with_bias: bool):
    """q_ref, out_ref: [block, D]; k_ref, v_ref: [K, D]; bias_ref: [K, 1]; lse_ref: [1, block]."""
    q_ref, k_ref, v_ref, *bias_refs, out_ref, lse_ref, top_ref, total_ref, sum_ref = refs
    keys, block = k_ref.shape[0], q_ref.shape[0]

    def program(columns: int) -> None:
        here = slice(0, columns)
        top_ref[:, here] = jnp.full((1, columns), LOWEST, jnp.float32)
        total_ref[:, here] = jnp.zeros((1, columns), jnp.float32)
        sum_ref[:, here] = jnp.zeros((sum_ref.shape[0], columns), jnp.float32)

        def inner(start, rows: int) -> None:
            window = pl.ds(start, rows)
            bias = bias_refs[0][window, :] if with_bias else None
            logits = scores(k_ref[window, :], q_ref[here, :], bias)  # [rows, columns]
            old = top_ref[:, here]
            top = jnp.maximum(old, logits.max(0, keepdims=True))
            weights = jnp.exp2(logits - top)
            shrink = jnp.exp2(old - top)
            top_ref[:, here] = top
            total_ref[:, here] = total_ref[:, here] * shrink + weights.sum(0, keepdims=True)
            v = v_ref[window, :]
            product = dot(v, weights.astype(v.dtype), (0, 0))  # [D, columns]
            sum_ref[:, here] = sum_ref[:, here] * shrink + product

        whole, rest = divmod(keys, step)
        jax.lax.fori_loop(0, whole, lambda j, _: inner(pl.multiple_of(j * step, step), step), None)
        if rest:
            inner(whole * step, rest)
        total = total_ref[:, here]
        out_ref[here, :] = (sum_ref[:, here] / total).T.astype(out_ref.dtype)
        lse_ref[:, here] = top_ref[:, here] / LOG2_E + jnp.log(total)

    last = pl.num_programs(1) - 1
    tail = columns_of_last(queries, block)
    if tail == block:
        program(block)
    else:
        pl.when(pl.program_id(1) < last)(functools.partial(program, block))
        pl.when(pl.program_id(1) == last)(functools.partial(program, tail))


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    *,
    size: int,
    tile: tuple[int, int],
    out_dtype: jnp.dtype,
    interpret=False,
) -> tuple[jax.Array, jax.Array]:
    """Attention of every head.

    Args:
      q: [B, S, N*D]; k, v: [B, K, N*D]; bias: [B, K, 1] float32 or None. N is 1 unless D is a multiple of 128.
      size: D. tile: (queries of one program, keys of one inner step), upper bounds.
      interpret: as for ``pl.pallas_call``.
    Returns: [B, S, N*D] in ``out_dtype`` and the log-sum-exp [B*N, 1, S] float32.
    """
    batch, queries, width = q.shape
    keys, heads = k.shape[1], width // size
    block, step = split(queries, tile[0], LANES), split(keys, tile[1], KEY_MULTIPLE)

    def rows_of(index):  # [B, rows, N*D] -> the rows of block `index(i)` of one head
        return lambda program, i: (program // heads, index(i), program % heads)

    in_specs = [pl.BlockSpec((None, block, size), rows_of(lambda i: i)),
                pl.BlockSpec((None, keys, size), rows_of(lambda i: 0)),
                pl.BlockSpec((None, keys, size), rows_of(lambda i: 0))]
    operands = [q, k, v]
    if bias is not None:
        in_specs.append(pl.BlockSpec((None, keys, 1), lambda program, i: (program // heads, 0, 0)))
        operands.append(bias)
    vmem = forward_bytes(keys, (block, step), q.dtype.itemsize, bias is not None)
    score_flops = 4 * batch * heads * queries * keys * size
    return pl.pallas_call(
        functools.partial(_kernel, queries=queries, step=step, with_bias=bias is not None),
        grid=(batch * heads, pl.cdiv(queries, block)),
        in_specs=in_specs,
        out_specs=[pl.BlockSpec((None, block, size), rows_of(lambda i: i)),
                   pl.BlockSpec((None, 1, block), lambda program, i: (program, 0, i))],
        out_shape=[jax.ShapeDtypeStruct(q.shape, out_dtype),
                   jax.ShapeDtypeStruct((batch * heads, 1, queries), jnp.float32)],
        scratch_shapes=[pltpu.VMEM((1, block), jnp.float32), pltpu.VMEM((1, block), jnp.float32),
                        pltpu.VMEM((size, block), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"),
                                             vmem_limit_bytes=vmem + vmem // 4 + (4 << 20)),
        cost_estimate=pl.CostEstimate(flops=score_flops, transcendentals=batch * heads * queries * keys,
                                      bytes_accessed=2 * (q.nbytes + k.nbytes)),
        interpret=interpret,
        name="attention_forward",
    )(*operands)
