"""The pyramid, its block noise and the sources of random numbers do what the original's do, and keep their promises."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import check, data
from test_schedules import scheduler_config

from helios_jax.diffusion import noise, pyramid
from helios_jax.diffusion.schedules import stage_table
from helios_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("fully_optimized")


def to_torch_order(x) -> np.ndarray:
    """[B, T, h, w, C] -> [B, C, T, h, w]."""
    return np.moveaxis(np.asarray(x), -1, 1)


def to_library_order(x: np.ndarray) -> np.ndarray:
    """[B, C, T, h, w] -> [B, T, h, w, C]."""
    return np.moveaxis(np.asarray(x), 1, -1)


# --- pyramid ---------------------------------------------------------------------------------------------------------


def test_noise_is_halved_as_recorded():
    x = to_library_order(data("px", 1, 16, 8, 16)[:, :, None])
    check(to_torch_order(pyramid.downsample_noise(x)), mean=+0.0110307, std=1.0320758,
          first=(-1.308967, -0.896856, -0.530211, +0.724539), last=(+0.935379, -1.310453), probe=-0.784705, atol=1e-6)


def test_resizing_equals_torch_interpolation():
    torch = pytest.importorskip("torch")
    x = data("resize", 2, 5, 3, 8, 12)
    frames = torch.from_numpy(x).permute(0, 2, 1, 3, 4).reshape(6, 5, 8, 12)

    def back(y):
        return y.reshape(2, 3, *y.shape[1:]).permute(0, 2, 1, 3, 4).numpy()

    half = back(torch.nn.functional.interpolate(frames, size=(4, 6), mode="bilinear"))
    double = back(torch.nn.functional.interpolate(frames, size=(16, 24), mode="nearest"))
    np.testing.assert_allclose(to_torch_order(pyramid.downsample_clean(to_library_order(x))), half, rtol=0, atol=5e-7)
    np.testing.assert_array_equal(to_torch_order(pyramid.upsample(to_library_order(x))), double)


def test_noise_keeps_unit_variance_and_clean_keeps_its_mean_at_every_level():
    x = to_library_order(data("levels", 1, 16, 9, 32, 32))
    levels = pyramid.noise_pyramid(x, 3)
    assert [level.shape[2:4] for level in levels] == [(8, 8), (16, 16), (32, 32)]
    np.testing.assert_allclose([float(level.std()) for level in levels], 1, atol=0.03)
    clean = pyramid.clean_pyramid(x, 3)
    np.testing.assert_allclose([float(level.mean()) for level in clean], x.mean(), atol=1e-6)
    np.testing.assert_allclose(clean[0] * 4, levels[0], atol=1e-5)


def test_an_odd_size_is_named():
    with pytest.raises(UserError, match="3x4"):
        pyramid.downsample_noise(jnp.zeros((1, 1, 3, 4, 1)))


def test_block_noise_from_the_torch_stream_is_the_recorded_one():
    shape = pyramid.block_noise_shape(1, 9, 4, 8, 16)
    z = noise.TorchGeneratorNoise(5).normal(noise.BLOCK, (0, 1), shape)
    check(to_torch_order(pyramid.block_noise(z, 1 / 3)), mean=-0.0000013, std=0.9824009,
          first=(+1.842330, -0.124898, +2.019419, -0.926392), last=(-0.232723, +1.041309), probe=-0.191413, atol=2e-6)


@pytest.mark.parametrize("gamma", [1 / 3, 0.2])
def test_block_noise_equals_the_original_sampler_with_an_exact_factor(gamma, monkeypatch):
    torch = pytest.importorskip("torch")
    pipelines = pytest.importorskip("diffusers.pipelines.helios.pipeline_helios_pyramid")

    class Owner:  # the only part of the pipeline that the method looks at
        scheduler = type("Scheduler", (), {"config": type("Config", (), {"gamma": gamma})})

    cholesky = torch.linalg.cholesky
    exact = pyramid.block_covariance(gamma) + 1e-8 * np.eye(4)
    monkeypatch.setattr(torch.linalg, "cholesky", lambda _: cholesky(torch.from_numpy(exact)).float())
    want = pipelines.HeliosPyramidPipeline.sample_block_noise(
        Owner(), 2, 3, 5, 6, 8, generator=torch.Generator().manual_seed(11))
    z = noise.TorchGeneratorNoise(11).normal(noise.BLOCK, (0, 1), pyramid.block_noise_shape(2, 5, 6, 8, 3))
    np.testing.assert_allclose(to_torch_order(pyramid.block_noise(z, gamma)), want.numpy(), rtol=0, atol=2e-6)


def linear_map(function, size: int) -> np.ndarray:
    """The matrix [4, size] of a linear function from ``size`` numbers to one 2 x 2 block."""
    return np.stack([np.asarray(function(jnp.eye(size)[i])).reshape(4) for i in range(size)], axis=1)


@pytest.mark.parametrize("gamma", [1 / 3, 0.2])
def test_block_noise_has_the_wanted_covariance(gamma):
    factor = linear_map(lambda z: pyramid.block_noise(z.reshape(1, 1, 1, 1, 1, 4), gamma), 4)
    np.testing.assert_allclose(factor @ factor.T, pyramid.block_covariance(gamma), rtol=0, atol=1e-6)
    assert abs(factor.sum(axis=0)).max() < 1e-3 or gamma != 1 / 3  # the values of a block sum to zero


@pytest.mark.parametrize("options", [{}, {"gamma": 0.25}, {"shift": 3.0}])
def test_transition_gives_exactly_the_start_distribution_of_the_next_stage(options):
    """end * noise + (1 - end) * clean becomes start * white noise + (1 - start) * up(clean)."""
    stages = stage_table(scheduler_config(**options))
    for below, stage in zip(stages[:-1], stages[1:], strict=True):
        def jump(inputs, stage=stage):
            return pyramid.transition(inputs[0].reshape(1, 1, 1, 1, 1), inputs[1:].reshape(1, 1, 1, 1, 1, 4), stage)

        matrix = linear_map(jump, 5)  # columns: the low-resolution value, then z
        np.testing.assert_allclose((1 - below.end) * matrix[:, 0], 1 - stage.start, rtol=0, atol=1e-6)
        from_noise = np.concatenate([below.end * matrix[:, :1], matrix[:, 1:]], axis=1)
        np.testing.assert_allclose(from_noise @ from_noise.T, stage.start**2 * np.eye(4), rtol=0, atol=1e-6)


# --- the stream of a PyTorch generator -------------------------------------------------------------------------------


def test_first_chunk_noise_of_seed_0_is_the_recorded_one():
    x = noise.TorchGeneratorNoise(0).normal(noise.CHUNK, (0,), (1, 9, 8, 16, 16))
    check(to_torch_order(x), mean=-0.0106872, std=1.0051042, first=(-1.125840, -1.152360, -0.250579, -0.433879),
          last=(+0.467129, +0.824653), probe=-0.373052, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 42, 2**32 + 7, noise.TorchGeneratorNoise.DEFAULT_SEED])
def test_mixed_draws_equal_a_torch_generator(seed):
    torch = pytest.importorskip("torch")
    theirs, ours = torch.Generator().manual_seed(seed), noise.TorchGeneratorNoise(seed)
    # Odd numbers of few normals leave a value in the cache, which survives other draws.
    for n in (3, 16, 1, 5, 17, 15, 100, 1000, 2, 31, 4096, 7):
        np.testing.assert_allclose(ours.randn(n), torch.randn(n, generator=theirs).numpy(), rtol=0, atol=5e-7)
        np.testing.assert_array_equal(ours.rand(n), torch.rand(n, generator=theirs).numpy())


def test_a_generator_without_seed_is_the_default_seed():
    torch = pytest.importorskip("torch")
    want = torch.randn(20, generator=torch.Generator()).numpy()
    got = noise.TorchGeneratorNoise(noise.TorchGeneratorNoise.DEFAULT_SEED).randn(20)
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-7)


def test_the_source_draws_in_the_axis_order_of_the_original():
    torch = pytest.importorskip("torch")
    theirs, ours = torch.Generator().manual_seed(3), noise.TorchGeneratorNoise(3)
    first = ours.normal(noise.ANCHOR_POSTERIOR, (), (2, 3, 4, 5, 6))
    sigma = ours.uniform(noise.ANCHOR_SIGMA, (), 9)
    block = ours.normal(noise.BLOCK, (0, 1), (2, 3, 4, 5, 6, 4))
    np.testing.assert_allclose(to_torch_order(first), torch.randn(2, 6, 3, 4, 5, generator=theirs), atol=5e-7)
    np.testing.assert_array_equal(sigma, torch.rand(9, generator=theirs).numpy()[None])
    rows = torch.randn(2 * 6 * 3 * 4 * 5, 4, generator=theirs).numpy().reshape(2, 6, 3, 4, 5, 4)
    np.testing.assert_allclose(np.moveaxis(np.asarray(block), 4, 1), rows, rtol=0, atol=5e-7)


# --- the library's own source: the determinism contract --------------------------------------------------------------

SHAPE = (2, 3, 4, 4)


def draw(seeds, purpose=noise.CHUNK, index=(0,), shape=SHAPE) -> np.ndarray:
    return np.asarray(noise.SeededNoise(seeds).normal(purpose, index, (len(seeds), *shape)))


def test_the_noise_of_an_item_does_not_depend_on_its_batch():
    alone = draw([7])[0]
    np.testing.assert_array_equal(draw([1, 7, 3])[1], alone)
    np.testing.assert_array_equal(draw([7, 7])[1], alone)
    uniforms = noise.SeededNoise([1, 7]).uniform(noise.VIDEO_SIGMA, (0,), 9)
    assert uniforms.shape == (2, 9) and uniforms.dtype == np.float32 and 0 <= uniforms.min() < uniforms.max() < 1
    np.testing.assert_array_equal(uniforms[1:], noise.SeededNoise([7]).uniform(noise.VIDEO_SIGMA, (0,), 9))


def test_the_noise_of_a_chunk_does_not_depend_on_what_was_drawn_before():
    source = noise.SeededNoise([5])
    in_order = [np.asarray(source.normal(noise.CHUNK, (k,), (1, *SHAPE))) for k in range(3)]
    resumed = noise.SeededNoise([5])
    resumed.uniform(noise.ANCHOR_SIGMA, (), 1)
    np.testing.assert_array_equal(resumed.normal(noise.CHUNK, (2,), (1, *SHAPE)), in_order[2])
    np.testing.assert_array_equal(resumed.normal(noise.CHUNK, (0,), (1, *SHAPE)), in_order[0])


def test_seeds_purposes_and_indices_give_unrelated_noise():
    draws = [draw([seed]) for seed in (0, 1, 2**32, 2**32 + 1, 2**64 - 1)]
    draws += [draw([0], purpose, (0,)) for purpose in noise.PURPOSES if purpose != noise.CHUNK]
    draws += [draw([0], noise.BLOCK, index) for index in ((0, 1), (0, 2), (1, 0), (1, 2))]
    correlation = np.corrcoef([d.reshape(-1) for d in draws])
    np.fill_diagonal(correlation, 0)
    assert abs(correlation).max() < 0.5  # 96 numbers each: equal streams would give 1, unrelated ones 0.1 each


def test_the_noise_is_standard_normal():
    x = draw([0], shape=(9, 48, 80, 16))
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01 and abs((x**4).mean() - 3) < 0.05


def test_the_noise_is_the_recorded_one():
    """A change here breaks the promise that a seed keeps giving the same video."""
    np.testing.assert_allclose(draw([42]).reshape(-1)[:4], RECORDED_NORMALS, rtol=0, atol=1e-6)
    uniforms = noise.SeededNoise([2**40 + 3]).uniform(noise.VIDEO_SIGMA, (2,), 3)[0]
    np.testing.assert_allclose(uniforms, RECORDED_UNIFORMS, rtol=0, atol=1e-7)


RECORDED_NORMALS = (0.2984199, -1.1575284, 0.5729340, 1.2075895)
RECORDED_UNIFORMS = (0.2974628, 0.5681249, 0.9410557)


def digest() -> str:
    return hashlib.sha256(draw([1, 2], shape=(9, 8, 8, 16)).tobytes()).hexdigest()


def test_the_noise_does_not_depend_on_devices_nor_on_the_random_flags_of_jax():
    program = ("import sys; sys.path[:0] = ['tests', '.']\nimport jax, test_pyramid_noise as t\n"
               "assert jax.device_count() == 3\nprint(t.digest())")
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=3", "JAX_PLATFORMS": "cpu",
                                "JAX_THREEFRY_PARTITIONABLE": "0", "JAX_DEFAULT_PRNG_IMPL": "rbg"}
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    result = subprocess.run([sys.executable, "-c", program], env=environment, cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == digest()


@pytest.mark.parametrize("seeds", [[-1], [2**64], [1.5], ["1"], [True], []])
def test_a_wrong_seed_is_named(seeds):
    with pytest.raises(UserError, match="seed"):
        noise.SeededNoise(seeds)


def test_a_batch_without_its_seeds_is_refused():
    with pytest.raises(ValueError, match="batch of 2"):
        noise.SeededNoise([1]).normal(noise.CHUNK, (0,), (2, *SHAPE))


# --- recorded arrays -------------------------------------------------------------------------------------------------


def test_recorded_noise_gives_back_what_it_was_given_and_names_what_is_missing():
    source = noise.RecordedNoise({(noise.CHUNK, (1,)): np.ones((1, *SHAPE)),
                                  (noise.VIDEO_SIGMA, (0,)): np.full((1, 9), 0.5)})
    np.testing.assert_array_equal(source.normal(noise.CHUNK, (1,), (1, *SHAPE)), np.ones((1, *SHAPE), np.float32))
    assert source.uniform(noise.VIDEO_SIGMA, (0,), 9).dtype == np.float32
    with pytest.raises(UserError, match=r"chunk\(2,\): not recorded"):
        source.normal(noise.CHUNK, (2,), (1, *SHAPE))
    with pytest.raises(UserError, match="shape"):
        source.normal(noise.CHUNK, (1,), (2, *SHAPE))
    with pytest.raises(UserError, match="shape"):
        source.uniform(noise.VIDEO_SIGMA, (0,), 1)


def test_sources_return_float32_jax_arrays():
    for source in (noise.SeededNoise([0]), noise.TorchGeneratorNoise(0),
                   noise.RecordedNoise({(noise.CHUNK, (0,)): np.zeros((1, *SHAPE))})):
        x = source.normal(noise.CHUNK, (0,), (1, *SHAPE))
        assert isinstance(x, jax.Array) and x.dtype == jnp.float32
