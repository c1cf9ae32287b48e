"""Gradients of attention on Hopper: one kernel for the queries, one for keys and values, both deterministic.

Weights are recomputed from the forward pass's log-sum-exp. With p the weights, dp = dout vᵀ and
delta = sum(out * dout) per query, the gradient of the logits is ds = p (dp - delta); then dq = ds k, dk = dsᵀ q and
dv = pᵀ dout. No sum over blocks crosses a block, so nothing depends on the order in which blocks run.

A query past the end is a row of zeros in q and dout with delta 0: it adds nothing to dk and dv and needs no mask. A
key past the end must be masked in dq, where exp2(0 - lse) may overflow.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.attention import gpu_common as common
from kernels.attention.gpu_tiles import COMPUTE_WARPGROUPS, ROWS_PER_WARPGROUP, LoopTiles

Array = jax.Array


def query_gradient(
    q: Array, k: Array, v: Array, bias2: Array | None, dout: Array, lse2: Array, delta: Array, tiles: LoopTiles,
    *, keys: int, interpret,
) -> Array:
    """dq [B, S, N, D] in q's dtype; keys and values stream past 64 queries per warpgroup.

    Args:
      q, dout: [B, S, N, D]; k, v: [B, K, N, D]; bias2: [B, K'] float32 in base 2 or None.
      lse2, delta: [B, N, S'] float32, base-2 log-sum-exp and row sums of out * dout, delta zero past S.
      keys: how many of the K rows count.
    """
    batch, _, heads, size = q.shape
    ring = common.Ring.over(keys, tiles.rows, tiles.stages)
    to_log2 = size**-0.5 * common.LOG2_E
    block = (ROWS_PER_WARPGROUP, size)

    def kernel(*refs):
        q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, *refs = refs
        bias_ref = refs.pop(0) if bias2 is not None else None
        dq_ref, buffers, barriers = refs
        b, head, mine = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index(common.WARPGROUP)

        def compute():
            rows = common.own_rows("queries")
            products = common.Products(buffers["stage"].at[mine] if interpret else None)
            loaded = barriers["resident"].at[mine]
            q_smem, dout_smem = buffers["q"].at[mine], buffers["dout"].at[mine]
            plgpu.copy_gmem_to_smem(q_ref.at[b, rows, head], q_smem, loaded)
            plgpu.copy_gmem_to_smem(dout_ref.at[b, rows, head], dout_smem, loaded)
            plgpu.copy_gmem_to_smem(lse_ref.at[b, head, rows], buffers["lse"].at[mine], loaded)
            plgpu.copy_gmem_to_smem(delta_ref.at[b, head, rows], buffers["delta"].at[mine], loaded)
            plgpu.barrier_wait(loaded)
            lse = common.load_vector(buffers["lse"].at[mine], common.BY_ROW)
            row_delta = common.load_vector(buffers["delta"].at[mine], common.BY_ROW)

            def step(tile, carry, width, valid):
                dq, lse, row_delta = carry
                slot, columns = ring.slot(tile), pl.ds(0, width)
                shape = (ROWS_PER_WARPGROUP, width)
                key_tile, value_tile = buffers["k"].at[slot, columns], buffers["v"].at[slot, columns]

                def weights_of(products):
                    logits = products * to_log2
                    if bias2 is not None:
                        column_bias = common.load_vector(buffers["bias"].at[slot, columns], common.BY_COLUMN)
                        logits = logits + common.along_columns(column_bias, shape)
                    weights = jnp.exp2(logits - common.along_rows(lse, shape))
                    return weights if valid == width else jnp.where(common.columns_below(valid, shape), weights, 0.0)

                plgpu.barrier_wait(barriers["ready"].at[slot])
                weights, dweights = products.of_two(
                    (q_smem, dout_smem), (common.transposed(key_tile), common.transposed(value_tile)), weights_of
                )
                dlogits = weights * (dweights - common.along_rows(row_delta, shape))
                dq = products.add(dq, dlogits.astype(q.dtype), key_tile)
                plgpu.barrier_arrive(barriers["free"].at[slot])
                return dq, lse, row_delta

            dq, _, _ = ring.for_each_tile(step, (common.full(block, 0.0), lse, row_delta))
            q_smem[...] = (dq * size**-0.5).astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem, dq_ref.at[b, rows, head])
            plgpu.wait_smem_to_gmem(0)

        def copy():
            def fill(tile, slot, wait):
                rows, ready = pl.ds(tile * ring.rows, ring.rows), barriers["ready"].at[slot]
                wait(barriers["free"])
                plgpu.copy_gmem_to_smem(k_ref.at[b, rows, head], buffers["k"].at[slot], ready)
                plgpu.copy_gmem_to_smem(v_ref.at[b, rows, head], buffers["v"].at[slot], ready)
                if bias2 is not None:
                    plgpu.copy_gmem_to_smem(bias_ref.at[b, rows], buffers["bias"].at[slot], ready)

            ring.keep_filled(fill)

        common.run_roles(compute, copy)

    resident = common.smem((COMPUTE_WARPGROUPS, *block), q.dtype)
    streamed = common.smem((ring.stages, ring.rows, size), k.dtype)
    statistics = plgpu.SMEM((COMPUTE_WARPGROUPS, ROWS_PER_WARPGROUP), jnp.float32)
    buffers = {"q": resident, "dout": resident, "k": streamed, "v": streamed, "lse": statistics, "delta": statistics}
    if bias2 is not None:
        buffers["bias"] = plgpu.SMEM((ring.stages, ring.rows), jnp.float32)
    if interpret:
        buffers["stage"] = common.smem((COMPUTE_WARPGROUPS, ROWS_PER_WARPGROUP, ring.rows), q.dtype)
    barriers = {
        "resident": plgpu.Barrier(num_arrivals=4, num_barriers=COMPUTE_WARPGROUPS),
        "ready": plgpu.Barrier(num_arrivals=2 if bias2 is None else 3, num_barriers=ring.stages),
        "free": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=ring.stages),
    }
    grid = (batch, heads, lse2.shape[2] // (COMPUTE_WARPGROUPS * ROWS_PER_WARPGROUP))
    call = common.launch(kernel, jax.ShapeDtypeStruct(q.shape, q.dtype), [buffers, barriers], grid, "queries",
                         interpret=interpret, name="attention_query_gradient")
    return call(*(x for x in (q, k, v, dout, lse2, delta, bias2) if x is not None))


def key_value_gradient(
    q: Array, k: Array, v: Array, bias2: Array | None, dout: Array, lse2: Array, delta: Array, tiles: LoopTiles,
    *, interpret,
) -> tuple[Array, Array]:
    """dk and dv [B, K, N, D] in k's dtype; queries stream past 64 keys per warpgroup, logits transposed.

    Arguments as for :func:`query_gradient`. Rows of keys that do not count get gradients that mean nothing.
    """
    batch, queries, heads, size = q.shape
    ring = common.Ring.over(queries, tiles.rows, tiles.stages)
    to_log2 = size**-0.5 * common.LOG2_E
    block = (ROWS_PER_WARPGROUP, size)

    def kernel(*refs):
        q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, *refs = refs
        bias_ref = refs.pop(0) if bias2 is not None else None
        dk_ref, dv_ref, buffers, barriers = refs
        b, head, mine = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index(common.WARPGROUP)

        def compute():
            rows = common.own_rows("keys")
            products = common.Products(buffers["stage"].at[mine] if interpret else None)
            loaded = barriers["resident"].at[mine]
            k_smem, v_smem = buffers["k"].at[mine], buffers["v"].at[mine]
            plgpu.copy_gmem_to_smem(k_ref.at[b, rows, head], k_smem, loaded)
            plgpu.copy_gmem_to_smem(v_ref.at[b, rows, head], v_smem, loaded)
            if bias2 is not None:
                plgpu.copy_gmem_to_smem(bias_ref.at[b, rows], buffers["bias"].at[mine], loaded)
            plgpu.barrier_wait(loaded)

            def step(tile, carry, width, valid):
                del valid  # rows past the end are zeros and add nothing
                slot, columns = ring.slot(tile), pl.ds(0, width)
                shape = (ROWS_PER_WARPGROUP, width)
                q_smem, dout_smem = buffers["q"].at[slot, columns], buffers["dout"].at[slot, columns]

                def weights_of(products):
                    lse = common.load_vector(buffers["lse"].at[slot, columns], common.BY_COLUMN)
                    logits = products * to_log2
                    if bias2 is not None:
                        row_bias = common.load_vector(buffers["bias"].at[mine], common.BY_ROW)
                        logits = logits + common.along_rows(row_bias, shape)
                    return jnp.exp2(logits - common.along_columns(lse, shape))

                plgpu.barrier_wait(barriers["ready"].at[slot])
                weights, dweights = products.of_two(
                    (k_smem, v_smem), (common.transposed(q_smem), common.transposed(dout_smem)), weights_of
                )

                def dlogits():
                    row_delta = common.load_vector(buffers["delta"].at[slot, columns], common.BY_COLUMN)
                    return (weights * (dweights - common.along_columns(row_delta, shape))).astype(q.dtype)

                dv, dk = products.add_two(carry, weights.astype(q.dtype), dout_smem, dlogits, q_smem)
                plgpu.barrier_arrive(barriers["free"].at[slot])
                return dv, dk

            dv, dk = ring.for_each_tile(step, (common.full(block, 0.0), common.full(block, 0.0)))
            k_smem[...] = (dk * size**-0.5).astype(k.dtype)
            v_smem[...] = dv.astype(v.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k_smem, dk_ref.at[b, rows, head])
            plgpu.copy_smem_to_gmem(v_smem, dv_ref.at[b, rows, head])
            plgpu.wait_smem_to_gmem(0)

        def copy():
            def fill(tile, slot, wait):
                rows, ready = pl.ds(tile * ring.rows, ring.rows), barriers["ready"].at[slot]
                wait(barriers["free"])
                plgpu.copy_gmem_to_smem(q_ref.at[b, rows, head], buffers["q"].at[slot], ready)
                plgpu.copy_gmem_to_smem(dout_ref.at[b, rows, head], buffers["dout"].at[slot], ready)
                plgpu.copy_gmem_to_smem(lse_ref.at[b, head, rows], buffers["lse"].at[slot], ready)
                plgpu.copy_gmem_to_smem(delta_ref.at[b, head, rows], buffers["delta"].at[slot], ready)

            ring.keep_filled(fill)

        common.run_roles(compute, copy)

    resident = common.smem((COMPUTE_WARPGROUPS, *block), k.dtype)
    streamed = common.smem((ring.stages, ring.rows, size), q.dtype)
    statistics = plgpu.SMEM((ring.stages, ring.rows), jnp.float32)
    buffers = {"k": resident, "v": resident, "q": streamed, "dout": streamed, "lse": statistics, "delta": statistics}
    if bias2 is not None:
        buffers["bias"] = plgpu.SMEM((COMPUTE_WARPGROUPS, ROWS_PER_WARPGROUP), jnp.float32)
    if interpret:
        buffers["stage"] = common.smem((COMPUTE_WARPGROUPS, ROWS_PER_WARPGROUP, ring.rows), q.dtype)
    barriers = {
        "resident": plgpu.Barrier(num_arrivals=2 if bias2 is None else 3, num_barriers=COMPUTE_WARPGROUPS),
        "ready": plgpu.Barrier(num_arrivals=4, num_barriers=ring.stages),
        "free": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=ring.stages),
    }
    grid = (batch, heads, pl.cdiv(k.shape[1], COMPUTE_WARPGROUPS * ROWS_PER_WARPGROUP))
    gradient = jax.ShapeDtypeStruct(k.shape, k.dtype)
    call = common.launch(kernel, [gradient, gradient], [buffers, barriers], grid, "keys", interpret=interpret,
                         name="attention_key_value_gradient")
    dk, dv = call(*(x for x in (q, k, v, dout, lse2, delta, bias2) if x is not None))
    return dk, dv
