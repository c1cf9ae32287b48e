"""Forward attention on Hopper: one pass over the keys with a running maximum."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.attention import gpu_common as common
from kernels.attention.gpu_tiles import COMPUTE_WARPGROUPS, ROWS_PER_WARPGROUP, LoopTiles

Array = jax.Array


def forward(
    q: Array, k: Array, v: Array, bias2: Array | None, tiles: LoopTiles, *, keys: int, with_lse: bool,
    with_rest: bool = False, interpret,
) -> tuple[Array, Array | None, Array | None]:
    """softmax(q kᵀ / sqrt(D) + bias) v.

    Args:
      q: [B, S, N, D]; k, v: [B, K, N, D], bfloat16 or float16, D 64 or 128, S and K multiples of 8.
      keys: how many of the K rows count.
      bias2: [B, K] float32 bias times log2(e), its K padded to whole tiles, or None.
      with_lse: also return the log-sum-exp. with_rest: also return what the output lost when it was rounded.
    Returns: [B, S, N, D] in q's dtype; None or the rest like it; and None or the base-2 log-sum-exp [B, N, S'] float32
      where S' is S rounded up to whole blocks; rows past S are finite and mean nothing.
    """
    batch, queries, heads, size = q.shape
    ring = common.Ring.over(keys, tiles.rows, tiles.stages)
    to_log2 = size**-0.5 * common.LOG2_E
    block = (ROWS_PER_WARPGROUP, size)

    def kernel(*refs):
        q_ref, k_ref, v_ref, *refs = refs
        bias_ref = refs.pop(0) if bias2 is not None else None
        out_ref = refs.pop(0)
        rest_ref = refs.pop(0) if with_rest else None
        lse_ref = refs.pop(0) if with_lse else None
        buffers, barriers = refs
        q_smem, k_smem, v_smem = buffers["q"], buffers["k"], buffers["v"]
        b, head, warpgroup = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index(common.WARPGROUP)

        def pass_turn():
            """Hands the tensor cores to the other warpgroup and waits to get them back."""
            plgpu.barrier_arrive(barriers["turn"])
            plgpu.barrier_wait(barriers["turn"])

        def compute():
            mine = warpgroup
            rows = common.own_rows("queries")
            products = common.Products(buffers["stage"].at[mine] if interpret else None)
            plgpu.copy_gmem_to_smem(q_ref.at[b, rows, head], q_smem.at[mine], barriers["q"].at[mine])
            plgpu.barrier_wait(barriers["q"].at[mine])

            def step(tile, carry, width, valid):
                out, top, total = carry
                slot, columns = ring.slot(tile), pl.ds(0, width)
                plgpu.barrier_wait(barriers["k_ready"].at[slot])
                key_tile = common.transposed(k_smem.at[slot, columns])
                logits, unit = products.of(q_smem.at[mine], key_tile, meanwhile=pass_turn), to_log2
                if bias2 is not None:
                    column_bias = common.load_vector(buffers["bias"].at[slot, columns], common.BY_COLUMN)
                    logits, unit = logits * to_log2 + common.along_columns(column_bias, logits.shape), 1.0
                plgpu.barrier_arrive(barriers["k_free"].at[slot])
                if valid < width:
                    logits = jnp.where(common.columns_below(valid, logits.shape), logits, -jnp.inf)
                # The scale is applied to the row's maximum and inside the exponent, where it is a fused multiply-add.
                new_top = jnp.maximum(top, logits.max(axis=1) * unit)
                shrink = jnp.exp2(top - new_top)
                weights = jnp.exp2(logits * unit - common.along_rows(new_top, logits.shape))
                total = total * shrink + weights.sum(axis=1)
                out = out * common.along_rows(shrink, block)
                rounded = weights.astype(q.dtype)
                # Softmax must be finished, not merely scheduled, before the turn is passed.
                out, new_top, total, rounded = lax.optimization_barrier((out, new_top, total, rounded))
                plgpu.barrier_arrive(barriers["turn"])
                plgpu.barrier_wait(barriers["v_ready"].at[slot])
                plgpu.barrier_wait(barriers["turn"])
                out = products.add(out, rounded, v_smem.at[slot, columns])
                plgpu.barrier_arrive(barriers["v_free"].at[slot])
                return out, new_top, total

            start = (
                common.full(block, 0.0),
                common.full(block[:1], common.LOWEST, common.BY_ROW),
                common.full(block[:1], 0.0, common.BY_ROW),
            )
            # The second warpgroup runs half a step behind the first.
            pl.when(mine == 1)(pass_turn)
            out, top, total = ring.for_each_tile(step, start)
            pl.when(mine == 0)(pass_turn)

            out = out * common.along_rows(1.0 / total, block)
            rounded = out.astype(q.dtype)
            q_smem.at[mine][...] = rounded
            if with_lse:
                buffers["lse"].at[mine][...] = top + jnp.log(total) * common.LOG2_E
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem.at[mine], out_ref.at[b, rows, head])
            if with_lse:
                plgpu.copy_smem_to_gmem(buffers["lse"].at[mine], lse_ref.at[b, head, rows])
            plgpu.wait_smem_to_gmem(0)
            if with_rest:
                q_smem.at[mine][...] = (out - rounded.astype(jnp.float32)).astype(q.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(q_smem.at[mine], rest_ref.at[b, rows, head])
                plgpu.wait_smem_to_gmem(0)

        def copy():
            def fill(tile, slot, wait):
                rows, k_ready = pl.ds(tile * ring.rows, ring.rows), barriers["k_ready"].at[slot]
                wait(barriers["k_free"])
                plgpu.copy_gmem_to_smem(k_ref.at[b, rows, head], k_smem.at[slot], k_ready)
                if bias2 is not None:
                    plgpu.copy_gmem_to_smem(bias_ref.at[b, rows], buffers["bias"].at[slot], k_ready)
                wait(barriers["v_free"])
                plgpu.copy_gmem_to_smem(v_ref.at[b, rows, head], v_smem.at[slot], barriers["v_ready"].at[slot])

            ring.keep_filled(fill)

        common.run_roles(compute, copy)

    streamed = common.smem((ring.stages, ring.rows, size), k.dtype)
    buffers = {"q": common.smem((COMPUTE_WARPGROUPS, *block), q.dtype), "k": streamed, "v": streamed}
    if bias2 is not None:
        buffers["bias"] = plgpu.SMEM((ring.stages, ring.rows), jnp.float32)
    if with_lse:
        buffers["lse"] = plgpu.SMEM((COMPUTE_WARPGROUPS, ROWS_PER_WARPGROUP), jnp.float32)
    if interpret:
        buffers["stage"] = common.smem((COMPUTE_WARPGROUPS, ROWS_PER_WARPGROUP, ring.rows), q.dtype)
    slots = {"num_barriers": ring.stages}
    barriers = {
        "q": plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS),
        "k_ready": plgpu.Barrier(num_arrivals=1 if bias2 is None else 2, **slots),
        "v_ready": plgpu.Barrier(**slots),
        "k_free": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, **slots),
        "v_free": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, **slots),
        "turn": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
    }
    length = common.padded_length(queries)
    out_type = [jax.ShapeDtypeStruct(q.shape, q.dtype)] * (1 + with_rest)
    if with_lse:
        out_type.append(jax.ShapeDtypeStruct((batch, heads, length), jnp.float32))
    grid = (batch, heads, length // (COMPUTE_WARPGROUPS * ROWS_PER_WARPGROUP))
    call = common.launch(kernel, out_type, [buffers, barriers], grid, "queries", interpret=interpret,
                         name="attention_forward")
    results = call(*(x for x in (q, k, v, bias2) if x is not None))
    return results[0], results[1] if with_rest else None, results[-1] if with_lse else None
