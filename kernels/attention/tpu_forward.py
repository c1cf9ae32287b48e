"""Forward attention kernel for TPUs (Pallas, Mosaic).

One program computes a block of queries of one head. The keys and values of the head stay in VMEM for all its query
blocks, so they are read from HBM once, and a length that no tile divides needs neither padding nor masks: the last
inner step is a static slice of its own size.

Scores are held transposed, [keys, queries]: the running maximum and sum are then rows along the lanes, and reducing
over keys is elementwise work on registers instead of work across lanes.

Softmax without a running maximum
---------------------------------
Any number may be subtracted from a row's logits as long as float32 holds what is left. By Cauchy-Schwarz no logit of a
query exceeds M = scale * |q| * max|k|. Subtracting M needs no maximum over the scores and never rescales the sums. What
can go wrong is that M lies far above the true maximum m: then every weight underflows. The largest logit is at least
the mean one, scale * q.mean(k), so M - m is at most G = M - scale * q.mean(k), known before the first score.

All in powers of two: weights are 2^(logit - M + SHIFT). They are at most 2^64, so that the sum over 2^16 keys times
values below 2^16 stays below 2^96: no overflow. The largest is at least 2^(64 - G). A weight that matters is at least
2^-40 of the largest (2^16 of them together make up 2^-24 of the sum, one float32 rounding); it is a normal float32, at
least 2^-126, when G <= 126 + 64 - 40 = 150 = ``LARGEST_GAP``. A block with a query beyond it takes the running maximum.

What it costs is exactness, where weights are rounded to bfloat16 for their product with the values: under a running
maximum the largest weight is 1, which is exact. With logits of standard deviation 1 the root mean square error of the
output is 1.1 times as large, of standard deviation 3 it is 1.3 times as large, as in attention that is not fused.

A bound per query is needed. RMS norm spans all N heads together, so a single head may hold the norm of all N * D
channels: the bound without looking at q is scale * N * D * max(w)^2, for 40 heads of 128 and weights of 1 that is 653
powers of two, far beyond the limit. The history's key scale, up to 10, multiplies it again.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.prologue import partner_matrix
from kernels.attention.reference import precision_of
from kernels.attention.tpu_tiles import LANES, forward_bytes, split

LOG2_E = math.log2(math.e)
# Below every logit and finite, so that exp2(lowest - lowest) is 1 and never NaN.
LOWEST = float(jnp.finfo(jnp.float32).min)
SHIFT = 64.0
LARGEST_GAP = 150.0
# |q|, |k| and the logits are rounded to float32 on the way, and sums of 128 squares by a few units more.
SLACK = 1 + 2.0**-16


class Prologue(NamedTuple):
    """With it the kernel norms and rotates the queries of each program itself.

    The statistic of the norm spans all heads, so it comes from outside, as a row: a column of single numbers would fill
    one lane of 128. The tables are the same for all heads and stay in VMEM.

    inverse: [B, 1, S] float32, 1 / root mean square of a query row; norm: [N, 1, D]; cos, sin: [S', D] float32, one
    number per channel, S' a multiple of the block of queries; partner: [D, D] of ``prologue.partner_matrix``.
    """

    inverse: jax.Array
    norm: jax.Array
    cos: jax.Array
    sin: jax.Array
    partner: jax.Array

    @classmethod
    def of(cls, q: jax.Array, norm: jax.Array, cos: jax.Array, sin: jax.Array, eps: float, size: int, block: int):
        """q: [B, S, N*D] from the projection; norm: [N*D]; cos, sin: [S, D/2]; block: queries of a program."""
        inverse = jax.lax.rsqrt(jnp.square(q.astype(jnp.float32)).mean(-1) + eps)[:, None]
        rows = ((0, -q.shape[1] % block), (0, 0))
        cos, sin = (jnp.pad(jnp.repeat(table, 2, axis=-1), rows) for table in (cos, sin))
        return cls(inverse, norm.astype(jnp.float32).reshape(-1, 1, size), cos, sin, partner_matrix(size, q.dtype))

    def specs(self, block: int) -> Prologue:
        """The grid is (heads of all samples, blocks of queries)."""
        heads = self.norm.shape[0]
        whole = functools.partial(pl.BlockSpec, index_map=lambda program, i: (0, 0), pipeline_mode=pl.Buffered(1))
        return Prologue(pl.BlockSpec((None, 1, block), lambda program, i: (program // heads, 0, i)),
                        pl.BlockSpec((None, *self.norm.shape[1:]), lambda program, i: (program % heads, 0, 0)),
                        *(whole(table.shape) for table in self[2:]))


def prepared(q: jax.Array, refs: Prologue, rows: slice, start: int | jax.Array) -> jax.Array:
    """Norm and rotation as in ``prologue.prepare_queries``, with the same roundings.

    q: [columns, D] straight from the projection, the ``rows`` of its block; start: their first row in the sequence.
    """
    columns, size = q.shape
    here = pl.ds(start, columns)
    inverse = jnp.broadcast_to(refs.inverse[:, rows], (size, columns)).T
    normed = (q.astype(jnp.float32) * inverse * refs.norm[...]).astype(q.dtype)
    swapped = dot(normed, refs.partner[...], (1, 0))
    return (normed.astype(jnp.float32) * refs.cos[here, :] + swapped * refs.sin[here, :]).astype(q.dtype)


def dot(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Product of two matrices contracted over ``axes``, float32 result."""
    return jax.lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())), precision=precision_of(a.dtype),
                               preferred_element_type=jnp.float32)


def scores(k: jax.Array, q: jax.Array, bias: jax.Array | None) -> jax.Array:
    """k [rows, D], q [columns, D], bias [rows, 1] -> logits in units of log 2, float32 [rows, columns]."""
    logits = dot(k, q, (1, 1)) * (q.shape[-1] ** -0.5 * LOG2_E)
    return logits if bias is None else logits + bias * LOG2_E


def head_rows(x: jax.Array, size: int, rows: int, index) -> pl.BlockSpec:
    """Block ``index(i)`` of one head of x, [B, S, N*D] or [B*N, S, D]; the grid is (heads of all samples, i)."""
    heads = x.shape[-1] // size
    return pl.BlockSpec((None, rows, size), lambda program, i: (program // heads, index(i), program % heads))


def columns_of_last(length: int, block: int) -> tuple[int, int]:
    """(queries of the last block, the same rounded up to whole registers, which is what is computed)."""
    rest = length - (pl.cdiv(length, block) - 1) * block
    return rest, min(-(-rest // LANES) * LANES, block)


def keys_summary(k: jax.Array, size: int) -> jax.Array:
    """k [B, K, N*D] or [B*N, K, D] -> [B*N, D, 2] float32: the mean key, and max|k| in all of the second column."""
    batch, keys, width = k.shape
    k = k.astype(jnp.float32).reshape(batch, keys, width // size, size)
    longest = jnp.sqrt(jnp.square(k).sum(-1).max(1))  # [B, N]
    mean = k.mean(1)  # [B, N, D]
    summary = jnp.stack([mean, jnp.broadcast_to(longest[..., None], mean.shape)], axis=-1)
    return summary.reshape(-1, size, 2)


def bound_and_gap(q: jax.Array, summary: jax.Array) -> tuple[jax.Array, jax.Array]:
    """q [rows, D], summary [D, 2] -> M and G of every query as in the module's docstring, float32 [1, rows] each."""
    unit = q.shape[-1] ** -0.5 * LOG2_E
    q = q.astype(jnp.float32).T  # [D, rows]: sums over D are then sums over sublanes
    bound = jnp.sqrt((q * q).sum(0, keepdims=True)) * summary[0:1, 1:2] * (unit * SLACK)
    mean = (q * summary[:, 0:1]).sum(0, keepdims=True) * unit
    return bound, bound - mean


def _kernel(*refs, names: tuple[str, ...], queries: int, step: int):
    """``names`` of ``refs``: "q", "out", "rest": [block, D]; "k", "v": [K, D]; "bias": [K, 1], or "summary": [D, 2] if
    softmax goes by a bound; the fields of ``Prologue``; "lse": [1, block]; scratch "top", "total": [1, block], "sum":
    [D, block], and "prepared" [block, D] where there is a prologue."""
    refs = dict(zip(names, refs, strict=True))
    q_ref, k_ref, v_ref = refs["q"], refs["k"], refs["v"]
    top_ref, total_ref, sum_ref = refs["top"], refs["total"], refs["sum"]
    keys, block = k_ref.shape[0], q_ref.shape[0]
    if "prepared" in refs:
        raw_ref, q_ref = q_ref, refs["prepared"]
        prologue = Prologue(*(refs[field] for field in Prologue._fields))
    whole, rest = divmod(keys, step)
    index, last = pl.program_id(1), pl.num_programs(1) - 1

    def over_keys(inner) -> None:
        jax.lax.fori_loop(0, whole, lambda j, _: inner(pl.multiple_of(j * step, step), step), None)
        if rest:
            inner(whole * step, rest)

    def program(valid: int, columns: int) -> None:
        here = slice(0, columns)
        total_ref[:, here] = jnp.zeros((1, columns), jnp.float32)
        sum_ref[:, here] = jnp.zeros((sum_ref.shape[0], columns), jnp.float32)
        if "prepared" in refs:
            first = pl.multiple_of(index * block, block)
            q_ref[here, :] = prepared(raw_ref[here, :], prologue, here, first)

        def with_running_maximum(start, rows: int) -> None:
            window = pl.ds(start, rows)
            bias = refs["bias"][window, :] if "bias" in refs else None
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

        def with_bound(start, rows: int) -> None:
            window = pl.ds(start, rows)
            weights = jnp.exp2(scores(k_ref[window, :], q_ref[here, :], None) - top_ref[:, here])
            total_ref[:, here] += weights.sum(0, keepdims=True)
            v = v_ref[window, :]
            sum_ref[:, here] += dot(v, weights.astype(v.dtype), (0, 0))

        def run_with_maximum() -> None:
            top_ref[:, here] = jnp.full((1, columns), LOWEST, jnp.float32)
            over_keys(with_running_maximum)

        if "summary" in refs:
            bound, gap = bound_and_gap(q_ref[here, :], refs["summary"][...])
            if valid < columns:  # what lies beyond the last query must not decide, or two runs could differ
                gap = jnp.where(jax.lax.broadcasted_iota(jnp.int32, gap.shape, 1) < valid, gap, 0.0)
            fits = gap.max() <= LARGEST_GAP

            @pl.when(fits)
            def _():
                top_ref[:, here] = bound - SHIFT
                over_keys(with_bound)

            pl.when(jnp.logical_not(fits))(run_with_maximum)  # also where the gap is not a number
        else:
            run_with_maximum()
        total = total_ref[:, here]
        out = (sum_ref[:, here] / total).T
        rounded = out.astype(refs["out"].dtype)
        refs["out"][here, :] = rounded
        if "rest" in refs:
            refs["rest"][here, :] = (out - rounded.astype(jnp.float32)).astype(rounded.dtype)
        refs["lse"][:, here] = top_ref[:, here] / LOG2_E + jnp.log(total)

    rest_of_queries, tail = columns_of_last(queries, block)
    if rest_of_queries == block:
        program(block, block)
    else:
        pl.when(index < last)(functools.partial(program, block, block))
        pl.when(index == last)(functools.partial(program, rest_of_queries, tail))


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    *,
    size: int,
    tile: tuple[int, int],
    out_dtype: jnp.dtype,
    bounded: bool = False,
    with_rest: bool = False,
    prologue: Prologue | None = None,
    interpret=False,
) -> list[jax.Array]:
    """Attention of every head.

    Args:
      q, k, v: [B*N, rows, D], or [B, rows, N*D] where D is a multiple of 128; v decides the layout of the result.
      bias: [B, K, 1] float32 or None.
      size: D. tile: (queries of one program, keys of one inner step), upper bounds.
      bounded: use the bound of the module's docstring where it holds; without effect where there is a bias.
      with_rest: also return what the output lost when it was rounded to ``out_dtype``.
      prologue: norms and rotates the queries, which are then [B, S, N*D].
      interpret: as for ``pl.pallas_call``.
    Returns: [B*N, S, D] or [B, S, N*D] in ``out_dtype``, with ``with_rest`` the rest like it, and the log-sum-exp
      [B*N, 1, S] float32.
    """
    queries, keys = q.shape[1], k.shape[1]
    programs = q.shape[0] * q.shape[2] // size  # heads of all samples
    block, step = split(queries, tile[0], LANES), split(keys, tile[1], LANES)
    out = jax.ShapeDtypeStruct((v.shape[0], queries, v.shape[2]), out_dtype)

    def resident(_):
        return 0

    names, operands = ["q", "k", "v"], [q, k, v]
    in_specs = [head_rows(q, size, block, lambda i: i), head_rows(k, size, keys, resident),
                head_rows(v, size, keys, resident)]
    scratch = [pltpu.VMEM((1, block), jnp.float32), pltpu.VMEM((1, block), jnp.float32),
               pltpu.VMEM((size, block), jnp.float32)]
    if bias is not None:
        heads = programs // bias.shape[0]
        in_specs.append(pl.BlockSpec((None, keys, 1), lambda program, i: (program // heads, 0, 0)))
        operands.append(bias)
        names.append("bias")
    elif bounded:
        in_specs.append(pl.BlockSpec((None, size, 2), lambda program, i: (program, 0, 0)))
        operands.append(keys_summary(k, size))
        names.append("summary")
    if prologue is not None:
        in_specs += prologue.specs(block)
        operands += prologue
        names += Prologue._fields
        scratch.append(pltpu.VMEM((block, size), q.dtype))
    tables = 0 if prologue is None else prologue.cos.shape[0]
    vmem = forward_bytes(keys, (block, step), q.dtype.itemsize, bias is not None, tables)
    results = ["out", "rest", "lse"] if with_rest else ["out", "lse"]
    names = (*names, *results, "top", "total", "sum", *(["prepared"] if prologue is not None else []))
    pairs = programs * queries * keys
    return pl.pallas_call(
        functools.partial(_kernel, names=names, queries=queries, step=step),
        grid=(programs, pl.cdiv(queries, block)),
        in_specs=in_specs,
        out_specs=[head_rows(out, size, block, lambda i: i)] * (1 + with_rest)
        + [pl.BlockSpec((None, 1, block), lambda program, i: (program, 0, i))],
        out_shape=[out] * (1 + with_rest) + [jax.ShapeDtypeStruct((programs, 1, queries), jnp.float32)],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"),
                                             vmem_limit_bytes=vmem + vmem // 4 + (4 << 20)),
        cost_estimate=pl.CostEstimate(flops=4 * pairs * size, transcendentals=pairs,
                                      bytes_accessed=2 * (q.nbytes + k.nbytes)),
        interpret=interpret,
        name="attention_forward",
    )(*operands)
