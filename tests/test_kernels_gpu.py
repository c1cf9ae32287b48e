"""The Hopper attention kernels on a machine without a GPU: interpreted, traced, refused with a reason."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from attention_base import Case, inputs

from kernels.attention import gpu, gpu_tiles

try:
    from kernels.attention.gpu_common import interpret_support
except ImportError as error:
    missing = why_not_interpreted = f"Pallas Mosaic GPU cannot be imported: {error}"
else:
    missing, why_not_interpreted = None, interpret_support()
importable = pytest.mark.skipif(missing is not None, reason=str(missing))
HALF = Case(batch=1, heads=1, size=64, dtype=jnp.bfloat16)


@pytest.mark.skipif(why_not_interpreted is not None, reason=str(why_not_interpreted))
def test_interpreted_kernels_equal_exact_attention():
    # A process of its own with more threads for XLA: every interpreted warpgroup holds one while it waits at a
    # barrier, and with one per core of a small machine they can wait for each other for ever.
    tests = Path(__file__).with_name("interpreted_gpu_attention.py")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)],
                          env={**os.environ, "NPROC": "16", "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
                          timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr


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
