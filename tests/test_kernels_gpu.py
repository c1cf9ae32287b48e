"""The Hopper attention kernels, interpreted on a CPU, against plain attention in float32.

The interpreter runs warpgroups as threads, honours every barrier, fills shared memory with NaN at the start and treats
bulk copies past an array's end as the hardware does.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import gpu, gpu_tiles
from kernels.attention.gpu_tiles import LoopTiles, Tiles


def why_not_interpreted() -> str | None:
    try:
        from kernels.attention.gpu_common import interpret_support
    except ImportError as error:
        return f"Pallas Mosaic GPU cannot be imported: {error}"
    return interpret_support()


interpreted = pytest.mark.skipif(why_not_interpreted() is not None, reason=str(why_not_interpreted()))
SMALL = Tiles(forward=LoopTiles(64, 2), dq=LoopTiles(64, 2), dkv=LoopTiles(64, 2))


def operands(batch, queries, keys, heads, size, *, biased=False, dtype=jnp.bfloat16):
    """(q, k, v, bias or None): about a third of the keys masked by the bias, the others counted three times."""
    streams = jax.random.split(jax.random.key(queries), 4)
    q = jax.random.normal(streams[0], (batch, queries, heads, size), dtype)
    k, v = (jax.random.normal(stream, (batch, keys, heads, size), dtype) for stream in streams[1:3])
    bias = jnp.where(jax.random.uniform(streams[3], (batch, keys)) < 0.3, -1e30, jnp.log(3.0)) if biased else None
    return q, k, v, bias


def plain(q, k, v, bias):
    """Attention and log-sum-exp as XLA computes them in the operands' dtype, logits and softmax in float32."""
    logits = jnp.einsum("bqnd,bknd->bnqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    logits = logits if bias is None else logits + bias[:, None, None, :]
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    out = jnp.einsum("bnqk,bknd->bqnd", weights, v, preferred_element_type=jnp.float32).astype(q.dtype)
    return out, jax.nn.logsumexp(logits, axis=-1)


def with_gradients(function, q, k, v, bias):
    """(out, lse, dq, dk, dv) in float32 for fixed random cotangents of both outputs."""
    (out, lse), pull = jax.vjp(lambda q, k, v: function(q, k, v, bias), q, k, v)
    dout = jax.random.normal(jax.random.key(7), out.shape, jnp.bfloat16).astype(out.dtype)
    dlse = jax.random.normal(jax.random.key(8), lse.shape)
    return [np.asarray(x, np.float32) for x in (out, lse, *pull((dout, dlse)))]


def kernel(tiles=None, interpret=True):
    return lambda q, k, v, bias: gpu.attention(q, k, v, bias, return_lse=True, tiles=tiles, interpret=interpret)


def in_float32(q, k, v, bias):
    return plain(*(x.astype(jnp.float32) for x in (q, k, v)), bias)


def root_mean_square(x):
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


CASES = {
    "odd length, two rows, two heads": (dict(batch=2, queries=75, keys=75, heads=2, size=64), SMALL),
    "more keys than queries": (dict(batch=1, queries=70, keys=331, heads=1, size=64), None),
    "head size 128": (dict(batch=1, queries=150, keys=200, heads=1, size=128), None),
    "fewer keys than a tile, bias": (dict(batch=2, queries=140, keys=21, heads=1, size=128, biased=True), None),
    "bias over several tiles": (dict(batch=1, queries=70, keys=300, heads=1, size=64, biased=True), None),
    "whole tiles only": (dict(batch=1, queries=128, keys=256, heads=1, size=64), None),
    "float16": (dict(batch=1, queries=66, keys=65, heads=1, size=64, dtype=jnp.float16), None),
}


@interpreted
@pytest.mark.parametrize("case", CASES, ids=lambda name: name.replace(" ", "-").replace(",", ""))
def test_forward_and_gradients_are_as_exact_as_plain_attention_in_the_same_dtype(case):
    shape, tiles = CASES[case]
    inputs = operands(**shape)
    exact = with_gradients(in_float32, *inputs)
    ours, theirs = with_gradients(kernel(tiles), *inputs), with_gradients(plain, *inputs)
    for name, got, library, want in zip(("out", "lse", "dq", "dk", "dv"), ours, theirs, exact, strict=True):
        error, allowed = root_mean_square(got - want), root_mean_square(library - want)
        print(f"{case}: {name} error {error:.2e}, plain attention {allowed:.2e}, size {root_mean_square(want):.2e}")
    np.testing.assert_allclose(ours[1], exact[1], atol=3e-6, rtol=0)
