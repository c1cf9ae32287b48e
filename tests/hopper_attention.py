"""The cases of the Hopper attention kernels, for the interpreter (interpreted_gpu_attention.py) and for a card
(test_kernels_hopper.py)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from attention_base import Case, bound, computed, error_ratios, inputs, relative_errors, wanted

from kernels.attention import reference
from kernels.attention.gpu_tiles import LoopTiles, Tiles

# Two slots of 64 rows: short sequences then go round the ring several times.
SMALL = Tiles(forward=LoopTiles(64, 2), dq=LoopTiles(64, 2), dkv=LoopTiles(64, 2))
HALF = Case(batch=1, heads=1, size=64, dtype=jnp.bfloat16)
CASES = {
    "odd length, two entries, two heads": (dataclasses.replace(HALF, batch=2, heads=2, queries=75, keys=75), SMALL),
    "more keys than queries": (dataclasses.replace(HALF, queries=70, keys=261), SMALL),
    "more queries than keys, head size 128": (dataclasses.replace(HALF, queries=263, keys=131, size=128), None),
    "fewer keys than a tile, bias": (dataclasses.replace(HALF, queries=65, keys=21, size=128, with_bias=True), None),
    "bias over several tiles": (dataclasses.replace(HALF, batch=2, queries=33, keys=200, with_bias=True), SMALL),
    "whole tiles only": (dataclasses.replace(HALF, queries=128, keys=256), None),
    "float16": (dataclasses.replace(HALF, queries=66, keys=65, dtype=jnp.float16), None),
}
# Both round the weights' 16-bit copy and the result once. Backward the kernel rounds the logits' gradient where plain
# attention rounds the weights' gradient: two independent errors of the same size. In a float64 model of both roundings
# their ratio is 1.01 on average and scatters by 0.04 at the lengths of these cases (60 draws); three times that is
# allowed. The comparison with a kernel that rounds at the same places, below, is the sharp one.
AS_EXACT_AS_PLAIN = {"out": 1.0, "d_q": 1.13, "d_k": 1.13, "d_v": 1.005}


def check_case(attention, case: Case, tiles: Tiles | None) -> None:
    """Forward, log-sum-exp and gradients of q, k and v of a kernel that takes ``tiles``."""
    want = wanted(case)
    ours = computed(lambda *x, **options: attention(*x, tiles=tiles, **options), case)
    ratios = error_ratios(ours, computed(reference.attention, case), want)
    for part, factor in AS_EXACT_AS_PLAIN.items():
        assert ours[part].dtype == case.dtype and ours[part].shape == want[part].shape
        assert ratios[part] <= factor, ratios
    np.testing.assert_allclose(ours["lse"], want["lse"], atol=3e-6, rtol=0)
    if case.dtype == jnp.bfloat16:
        assert max(relative_errors(ours, want).values()) < bound(case)


def check_hidden_tile(attention) -> None:
    q, k, v, *_ = inputs(dataclasses.replace(HALF, queries=20, keys=70))
    hidden = jnp.where(jnp.arange(70) < 64, -jnp.inf, 0.0)[None]  # the whole first tile
    out = attention(q, k, v, hidden, tiles=SMALL)
    want = reference.attention(q, k[:, 64:], v[:, 64:])
    np.testing.assert_allclose(out.astype(jnp.float32), want.astype(jnp.float32), atol=0.02)


def check_low_logits(attention) -> None:
    # exp(0 - lse), the weight that a row of zeros past the end would get, overflows float32 here.
    q, k, v, *_ = inputs(dataclasses.replace(HALF, queries=20, keys=21))
    q, k = 6 + q / 8, -6 + k / 8

    _, lse = reference.attention(q, k, v, return_lse=True)
    assert lse.max() < -150

    def loss(q, k, v):
        return jnp.square(attention(q, k, v, tiles=SMALL).astype(jnp.float32)).sum()

    for name, gradient in zip("qkv", jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v), strict=True):
        assert np.isfinite(np.asarray(gradient, np.float32)).all(), name
