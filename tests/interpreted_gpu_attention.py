"""The Hopper attention kernels, interpreted on a CPU, against attention in float64. Run by test_kernels_gpu.py.

The interpreter runs warpgroups as threads, honours every barrier, fills shared memory with NaN at the start and treats
bulk copies past an array's end as the hardware does.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
from attention_base import computed, error_ratios, wanted
from hopper_attention import CASES, HALF, SMALL, check_case, check_hidden_tile, check_low_logits
from jax.experimental.pallas.ops.gpu import attention as library_attention

from kernels.attention import gpu

interpreted = functools.partial(gpu.attention, interpret=True)


@pytest.mark.parametrize("name", CASES, ids=lambda name: name.replace(" ", "-").replace(",", ""))
def test_forward_lse_and_gradients_are_as_exact_as_plain_attention_in_the_same_dtype(name):
    check_case(interpreted, *CASES[name])


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
    check_hidden_tile(interpreted)


def test_logits_far_below_zero_leave_the_gradients_at_a_ragged_end_finite():
    check_low_logits(interpreted)
