"""The Hopper attention kernels, interpreted on a CPU, against attention in float64.

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
from attention_base import Case, bound, computed, exact, inputs, relative_errors

from kernels.attention import gpu, gpu_tiles, reference
from kernels.attention.gpu_tiles import LoopTiles, Tiles

try:
    from kernels.attention.gpu_common import interpret_support
except ImportError as error:
    missing = why_not_interpreted = f"Pallas Mosaic GPU cannot be imported: {error}"
else:
    missing, why_not_interpreted = None, interpret_support()
importable = pytest.mark.skipif(missing is not None, reason=str(missing))
interpreted = pytest.mark.skipif(why_not_interpreted is not None, reason=str(why_not_interpreted))

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
# attention rounds the weights' gradient: errors of the same size, one drawn a little larger here, the other there.
AS_EXACT_AS_PLAIN = {"out": 1.0, "d_q": 1.15, "d_k": 1.15, "d_v": 1.05}


def root_mean_square(x) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


@interpreted
@pytest.mark.parametrize("name", CASES, ids=lambda name: name.replace(" ", "-").replace(",", ""))
def test_forward_lse_and_gradients_are_as_exact_as_plain_attention_in_the_same_dtype(name):
    case, tiles = CASES[name]
    want = exact(*inputs(case))
    ours = computed(functools.partial(gpu.attention, tiles=tiles, interpret=True), case)
    plain = computed(reference.attention, case)
    for part, factor in AS_EXACT_AS_PLAIN.items():
        assert ours[part].dtype == case.dtype and ours[part].shape == want[part].shape
        error, allowed = (root_mean_square(np.asarray(x[part], np.float64) - want[part]) for x in (ours, plain))
        assert error <= factor * allowed, f"{part}: {error} against {allowed}"
    np.testing.assert_allclose(ours["lse"], want["lse"], atol=3e-6, rtol=0)
    if case.dtype == jnp.bfloat16:
        assert max(relative_errors(ours, want).values()) < bound(case)


@interpreted
def test_the_kernels_have_no_data_race_and_repeat_bit_for_bit():
    from jax.experimental.pallas import mosaic_gpu as plgpu

    case = dataclasses.replace(HALF, queries=70, keys=200)
    watched = plgpu.InterpretGPUParams(detect_races=True, on_race="raise")
    first = computed(functools.partial(gpu.attention, tiles=SMALL, interpret=watched), case)
    again = computed(functools.partial(gpu.attention, tiles=SMALL, interpret=True), case)
    for name, x in first.items():
        np.testing.assert_array_equal(np.asarray(x), np.asarray(again[name]), err_msg=name)


@interpreted
def test_a_tile_without_any_visible_key_gives_weight_zero():
    q, k, v, *_ = inputs(dataclasses.replace(HALF, queries=20, keys=70))
    hidden = jnp.where(jnp.arange(70) < 64, -jnp.inf, 0.0)[None]  # the whole first tile
    out = gpu.attention(q, k, v, hidden, tiles=SMALL, interpret=True)
    want = reference.attention(q, k[:, 64:], v[:, 64:])
    np.testing.assert_allclose(out.astype(jnp.float32), want.astype(jnp.float32), atol=0.02)


@interpreted
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


def hopper(sizes=(), names=()):
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    kinds = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh(sizes, names, kinds, abstract_device=device))


@importable
def test_gradients_trace_under_jit_scan_and_remat_for_a_hopper_gpu():
    layers, shape = 3, (1, 300, 2, 64)

    def loss(scales, x):
        @jax.checkpoint
        def layer(x, scale):
            return gpu.attention(x * scale, x, x), None

        x, _ = jax.lax.scan(layer, x, scales)
        return x.astype(jnp.float32).sum()

    with hopper():
        arguments = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((layers,), shape)]
        gradients = jax.eval_shape(jax.jit(jax.grad(loss, argnums=(0, 1))), *arguments)
    assert gradients[0].shape == (layers,) and gradients[1].shape == shape


@importable
def test_gradients_trace_under_shard_map_with_heads_over_devices():
    spec = jax.sharding.PartitionSpec(None, None, "context")
    x = jax.ShapeDtypeStruct((1, 301, 8, 64), jnp.bfloat16)
    with hopper((4,), ("context",)):
        spread = jax.shard_map(gpu.attention, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)

        def loss(*x):
            return spread(*x).astype(jnp.float32).sum()

        gradients = jax.eval_shape(jax.jit(jax.grad(loss, argnums=(0, 1, 2))), x, x, x)
    assert [g.shape for g in gradients] == [x.shape] * 3


@pytest.mark.parametrize("change, reason", [
    (dict(size=32), "head size 32"),
    (dict(dtype=jnp.float32), "float32"),
    (dict(keys=0), "empty"),
])
def test_calls_that_the_kernels_do_not_serve_are_refused_with_the_reason(change, reason):
    case = dataclasses.replace(HALF, **change)
    q = jnp.zeros((case.batch, case.queries, case.heads, case.size), case.dtype)
    k = jnp.zeros((case.batch, case.keys, case.heads, case.size), case.dtype)
    with hopper(), pytest.raises(NotImplementedError, match=reason):
        gpu.attention(q, k, k)


def test_other_devices_are_refused_by_name():
    q, k, v, *_ = inputs(HALF)
    with pytest.raises(NotImplementedError, match="Hopper GPU .* the device is cpu"):
        gpu.attention(q, k, v)


def test_every_row_of_the_tile_table_fits_into_shared_memory():
    for _, size, tiles in gpu_tiles.TABLE:
        loops = ((tiles.forward, 1), (tiles.dq, 2), (tiles.dkv, 2))
        for loop, resident in loops:
            assert gpu_tiles.shared_memory(loop, size, resident) + 8192 <= gpu_tiles.SHARED_MEMORY_BYTES
    with pytest.raises(NotImplementedError, match="head size 96"):
        gpu_tiles.tiles_for("NVIDIA H100 80GB HBM3", 96)
