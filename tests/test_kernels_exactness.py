"""The TPU kernels err no more than the kernels that come with JAX do, on the same inputs in bfloat16.

All of them run interpreted on a CPU; whatever a kernel rounds to bfloat16 is rounded. What no interpreter shows is the
matrix unit's own arithmetic, which is the same for all. cuDNN has no interpreter: it is not compared here.
"""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import pytest
from attention_base import Case, computed, error_ratios, wanted
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from kernels.attention import reference, tpu, tpu_tiles

# Plain and sharp softmax: standard deviation 1 and 3 of the logits. Whole tiles of 128, as the library kernels need.
PLAIN = Case(batch=1, queries=256, keys=256, heads=5, size=128, dtype=jnp.bfloat16)
SHARP = Case(batch=1, queries=256, keys=256, heads=5, size=128, dtype=jnp.bfloat16, scale=3.0)
# Kernels that round at the same places differ by the order of their sums alone: medians agree to a fraction of this.
EQUAL = 1.005


def ours(bounded: bool):
    """The kernels as a chip without or with the softmax by a bound runs them, with tiles as the library kernels'.

    Where softmax goes tile by tile, the largest weight of each is exact, so smaller tiles err less.
    """
    chip = tpu_tiles.Chip(100 << 20, bounded, ((256, tpu_tiles.Tiles((128, 128), (128, 128))),))

    def attention(q, k, v, bias):
        return tpu._checked(q, k, v, bias, False, chip, True)

    return attention


def flash(q, k, v, bias):
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return flash_attention(q, k, v, sm_scale=q.shape[-1] ** -0.5).swapaxes(1, 2)


def splash(q, k, v, bias):
    """It leaves the scale to its caller, which rounds the queries once more."""
    mask = splash_attention_mask.FullMask((q.shape[1], k.shape[1]))
    kernel = splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([mask] * q.shape[2]), interpret=True)
    q = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    q, k, v = (x[0].swapaxes(0, 1) for x in (q, k, v))
    # Its product of weights and values takes float32 operands, which the matrix unit rounds and a CPU would not.
    with jax.default_matmul_precision("BF16_BF16_F32"):
        return kernel(q, k, v).swapaxes(0, 1)[None]


LIBRARY = {"flash": (flash, pltpu.force_tpu_interpret_mode), "splash": (splash, contextlib.nullcontext)}


def results(attention, case, interpreter=contextlib.nullcontext):
    with interpreter():
        return computed(attention, case, with_lse=False)


@pytest.mark.parametrize("case", [PLAIN, SHARP], ids=["plain", "sharp"])
def test_tpu_kernels_err_no_more_than_library_kernels_forward_and_backward(case):
    found, want = results(ours(bounded=False), case), wanted(case, with_lse=False)
    for name, (library, interpreter) in LIBRARY.items():
        ratios = error_ratios(found, results(library, case, interpreter), want)
        assert max(ratios.values()) <= EQUAL, f"against {name}: {ratios}"


@pytest.mark.parametrize("case", [PLAIN, SHARP], ids=["plain", "sharp"])
def test_softmax_by_a_bound_errs_forward_as_plain_attention_does(case):
    """And more than under a running maximum, where the largest weight is 1, which bfloat16 holds exactly.

    The forward pass' error reaches the gradients of q and k through the row sums of output times gradient, which plain
    attention takes from the weights; it shows where softmax is sharp.
    """
    found, plain = results(ours(bounded=True), case), results(reference.attention, case)
    ratios = error_ratios(found, plain, wanted(case, with_lse=False))
    assert ratios["out"] <= EQUAL and ratios["d_v"] <= EQUAL, ratios
    assert max(ratios.values()) <= (1.35 if case is SHARP else EQUAL), ratios
