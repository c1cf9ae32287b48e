"""The Hopper attention kernels on a card: skipped without one.

    JAX_PLATFORMS=cuda,cpu python -m pytest tests/test_kernels_hopper.py

Cases and bounds are those of the interpreted kernels; here layouts, swizzles and registers are real, and cuDNN is
there to compare with.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_base import computed, error_ratios, inputs, wanted
from hopper_attention import CASES, HALF, check_case, check_hidden_tile, check_low_logits

from kernels.attention import cudnn, gpu, reference


@pytest.fixture(autouse=True)
def hopper():
    kind = jax.devices()[0].device_kind
    if not any(name in kind for name in gpu.HOPPER):
        pytest.skip(f"needs a Hopper GPU, the device is {kind}")


ON_A_CARD = CASES | {
    "many tiles, many heads": (dataclasses.replace(HALF, heads=4, queries=1100, keys=1500, size=128), None)}


@pytest.mark.parametrize("name", ON_A_CARD, ids=lambda name: name.replace(" ", "-").replace(",", ""))
def test_forward_lse_and_gradients_are_as_exact_as_plain_attention_in_the_same_dtype(name):
    check_case(gpu.attention, *ON_A_CARD[name])


@pytest.mark.parametrize("scale", [1.0, 3.0], ids=["plain", "sharp"])
@pytest.mark.parametrize("length", [512, 1104])
def test_the_kernels_err_no_more_than_cudnn_forward_and_backward(length, scale):
    case = dataclasses.replace(HALF, queries=length, keys=length, heads=5, size=128, scale=scale)
    ours = computed(lambda q, k, v, bias: gpu.attention(q, k, v), case, with_lse=False)
    theirs = computed(lambda q, k, v, bias: cudnn.attention(q, k, v), case, with_lse=False)
    ratios = error_ratios(ours, theirs, wanted(case, with_lse=False))
    assert max(ratios.values()) <= 1.01, ratios


@pytest.mark.parametrize("length", [11040, 4560, 2940])
def test_the_lengths_of_production_repeat_bit_for_bit_and_are_attention(length):
    q, k, v, *_ = inputs(dataclasses.replace(HALF, queries=length, keys=length, heads=4, size=128))

    def run(core):
        def loss(q, k, v):
            out = core(q, k, v)
            return jnp.square(out.astype(jnp.float32)).sum(), out

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
        return [np.asarray(x, np.float32) for x in (out, *gradients)]

    first, again, plain = run(gpu.attention), run(gpu.attention), run(reference.bounded_attention)
    for ours, repeated, want in zip(first, again, plain, strict=True):
        np.testing.assert_array_equal(ours, repeated)
        # Two computations that round to 8 bits at other places.
        assert np.linalg.norm(ours - want) < 0.01 * np.linalg.norm(want)


def test_a_tile_without_any_visible_key_gives_weight_zero():
    check_hidden_tile(gpu.attention)


def test_logits_far_below_zero_leave_the_gradients_at_a_ragged_end_finite():
    check_low_logits(gpu.attention)
