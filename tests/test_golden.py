"""The filler of the golden numbers reproduces its own published statistics."""

from __future__ import annotations

import numpy as np
import pytest
from golden import check, data, fill

# name, array, mean, std, first 4, last 2, probe
SELF_CHECK = [
    (fill("patch_embedding.weight", (32, 16, 1, 2, 2)), +0.0002626, 0.1262143,
     (+0.010143, +0.000271, -0.122146, -0.125942), (+0.134551, -0.000580), +0.027233),
    (fill("blocks.0.attn1.norm_q.weight", (32,)), +1.0056383, 0.0942080,
     (+1.097576, +1.017877, +1.187418, +0.955510), (+0.933527, +0.935367), +3.564797),
    (fill("blocks.0.scale_shift_table", (1, 6, 32)), -0.0060146, 0.2972053,
     (-0.038517, +0.253246, +0.265918, +0.383922), (-0.159079, -0.434406), -0.238682),
    (fill("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 3)), -0.1236609, 0.9788432,
     (-0.205966, +0.899054, -0.757378, +0.530743), (-0.416073, +0.338005), -0.248972),
    (data("x", 1, 16, 9, 8, 12), -0.0052151, 0.9930911,
     (-2.313544, +0.795485, -0.310628, +0.483489), (+1.153587, -0.461546), +0.295512),
    (data("text", 1, 7, 24), +0.0489553, 1.0536994,
     (-0.157218, +1.381406, +0.306433, -1.374234), (+1.269773, +0.743644), -0.274420),
    (data("prompt", 1, 6, 24), -0.0226874, 0.9842399,
     (-0.077758, -1.290093, +0.173022, -0.521090), (+1.382281, +0.065743), -0.169584),
]


@pytest.mark.parametrize("array,mean,std,first,last,probe", SELF_CHECK)
def test_filler_gives_the_recorded_statistics(array, mean, std, first, last, probe):
    check(array, mean=mean, std=std, first=first, last=last, probe=probe, atol=1e-6)


def test_check_fails_on_a_permutation_and_on_nan():
    array, mean, std, first, last, probe = SELF_CHECK[0]
    middle_swapped = array.copy()
    middle_swapped[10], middle_swapped[20] = array[20], array[10]  # mean, std and corners stay
    with pytest.raises(AssertionError, match="probe"):
        check(middle_swapped, mean=mean, std=std, first=first, last=last, probe=probe, atol=1e-6)
    with pytest.raises(AssertionError, match="mean"):
        check(array * np.nan, mean=mean, std=std, first=first, last=last, probe=probe, atol=1e-6)
