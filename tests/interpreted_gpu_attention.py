"""The Hopper attention kernels, interpreted on a CPU, against attention in float64. Run by test_kernels_gpu.py.

The interpreter runs warpgroups as threads, honours every barrier, fills shared memory with NaN at the start and treats
bulk copies past an array's end as the hardware does.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_base import Case, bound, computed, error_ratios, inputs, relative_errors, wanted
from jax.experimental.pallas.ops.gpu import attention as library_attention

from kernels.attention import gpu, reference
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


@pytest.mark.parametrize("name", CASES, ids=lambda name: name.replace(" ", "-").replace(",", ""))
def test_forward_lse_and_gradients_are_as_exact_as_plain_attention_in_the_same_dtype(name):
    case, tiles = CASES[name]
    want = wanted(case)
    ours = computed(functools.partial(gpu.attention, tiles=tiles, interpret=True), case)
    ratios = error_ratios(ours, computed(reference.attention, case), want)
    for part, factor in AS_EXACT_AS_PLAIN.items():
        assert ours[part].dtype == case.dtype and ours[part].shape == want[part].shape
        assert ratios[part] <= factor, ratios
    np.testing.assert_allclose(ours["lse"], want["lse"], atol=3e-6, rtol=0)
    if case.dtype == jnp.bfloat16:
        assert max(relative_errors(ours, want).values()) < bound(case)


def library(q, k, v, bias):
    """The one attention kernel for GPUs among those of JAX that an interpreter can run; cuDNN has none.

    Tiles as ours: where softmax goes tile by tile, the largest weight of each is exact, so smaller ones err less.
    """
    sizes = library_attention.BlockSizes(**dict.fromkeys(
        ("block_q", "block_k", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), 128))
    return library_attention.mha(q, k, v, None, sm_scale=q.shape[-1] ** -0.5, block_sizes=sizes, interpret=True)


@pytest.mark.parametrize("scale", [1.0, 3.0], ids=["plain", "sharp"])
def test_the_kernels_err_no_more_than_a_library_kernel_forward_and_backward(scale):
    case = dataclasses.replace(HALF, queries=128, keys=128, heads=5, size=128, scale=scale)
    ours = computed(lambda q, k, v, bias: gpu.attention(q, k, v, interpret=True), case, with_lse=False)
    ratios = error_ratios(ours, computed(library, case, with_lse=False), wanted(case, with_lse=False))
    assert max(ratios.values()) <= 1.005, ratios  # the order of sums alone differs where both round at the same places


def test_the_kernels_have_no_data_race_and_repeat_bit_for_bit():
    from jax.experimental.pallas import mosaic_gpu as plgpu

    case = dataclasses.replace(HALF, queries=70, keys=200)
    watched = plgpu.InterpretGPUParams(detect_races=True, on_race="raise")
    first = computed(functools.partial(gpu.attention, tiles=SMALL, interpret=watched), case)
    again = computed(functools.partial(gpu.attention, tiles=SMALL, interpret=True), case)
    for name, x in first.items():
        np.testing.assert_array_equal(np.asarray(x), np.asarray(again[name]), err_msg=name)


def test_a_tile_without_any_visible_key_gives_weight_zero():
    q, k, v, *_ = inputs(dataclasses.replace(HALF, queries=20, keys=70))
    hidden = jnp.where(jnp.arange(70) < 64, -jnp.inf, 0.0)[None]  # the whole first tile
    out = gpu.attention(q, k, v, hidden, tiles=SMALL, interpret=True)
    want = reference.attention(q, k[:, 64:], v[:, 64:])
    np.testing.assert_allclose(out.astype(jnp.float32), want.astype(jnp.float32), atol=0.02)


def test_logits_far_below_zero_leave_the_gradients_at_a_ragged_end_finite():
    # exp(0 - lse), the weight that a row of zeros past the end would get, overflows float32 here.
    q, k, v, *_ = inputs(dataclasses.replace(HALF, queries=20, keys=21))
    q, k = 6 + q / 8, -6 + k / 8

    _, lse = reference.attention(q, k, v, return_lse=True)
    assert lse.max() < -150

    def loss(q, k, v):
        return jnp.square(gpu.attention(q, k, v, tiles=SMALL, interpret=True).astype(jnp.float32)).sum()

    for name, gradient in zip("qkv", jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v), strict=True):
        assert np.isfinite(np.asarray(gradient, np.float32)).all(), name
