"""A video that is continued: only what the history can hold is encoded, and no number changes by that."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.config import VAEConfig
from helios_jax.diffusion import noise
from helios_jax.diffusion.history import HistoryLayout, add_noise, noise_sigma
from helios_jax.diffusion.noise import SeededNoise, TorchGeneratorNoise
from helios_jax.pipeline.conditioning import Condition, ConditionEncoder

SIGMA = (0.1, 0.2)


def latents_of(video, eps):
    """Stands for the VAE: [1, F, 16, 16, 3] and [1, T, 2, 2, C] -> [1, T, 2, 2, C]; every frame shows."""
    frames = jnp.asarray(video).reshape(1, video.shape[1], -1).mean(-1)
    parts = jnp.stack([part.mean(axis=1) for part in jnp.array_split(frames, eps.shape[1], axis=1)], axis=1)
    return parts[:, :, None, None, None] + 0.1 * eps


def all_chunks_encoded(source, video, layout, config, window) -> Condition:
    """Every chunk, in the original's order of draws."""
    chunks = video.shape[1] // window
    start = video.shape[1] - chunks * window
    shape = (len(video), layout.chunk, 2, 2, config.z_dim)

    def encode(frames, eps):
        return jnp.concatenate([latents_of(frames[i:i + 1], eps[i:i + 1]) for i in range(len(frames))])

    def noised(z, sigma, eps, index):
        level = noise_sigma(jnp.asarray(source.uniform(sigma, index, z.shape[1])), *SIGMA)
        return add_noise(z, source.normal(eps, index, z.shape), level)

    anchor = encode(video[:, :1], source.normal(noise.ANCHOR_POSTERIOR, (), (len(video), 1, *shape[2:])))
    latents = [encode(video[:, start + i * window:start + (i + 1) * window],
                      source.normal(noise.VIDEO_POSTERIOR, (i,), shape)) for i in range(chunks)]
    anchor = noised(anchor, noise.ANCHOR_SIGMA, noise.ANCHOR_NOISE, ())
    history = layout.empty(len(video), 2, 2, config.z_dim)
    for i, z in enumerate(latents):
        history = layout.append(history, noised(z, noise.VIDEO_SIGMA, noise.VIDEO_NOISE, (i,)))
    return Condition(history, anchor, True)


@pytest.mark.parametrize("source", [lambda: SeededNoise([3, 4]), lambda: TorchGeneratorNoise(3)])
@pytest.mark.parametrize("chunks", [1, 3, 5])
def test_of_a_long_clip_only_the_newest_chunks_are_encoded_and_the_numbers_stay(source, chunks):
    config, layout, calls = VAEConfig(), HistoryLayout(), []

    def encode(video, eps):
        calls.append(video.shape[1])
        return latents_of(video, eps)

    encoder = ConditionEncoder(encode, config, layout, SIGMA)
    clip = np.random.default_rng(0).uniform(-1, 1, (2, chunks * 33 + 2, 16, 16, 3)).astype(np.float32)
    ours, theirs = source(), source()
    found, wanted = encoder.video(ours, clip), all_chunks_encoded(theirs, clip, layout, config, 33)
    assert calls == [1, 1] + [33, 33] * min(chunks, 3)
    for name in ("history", "anchor"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
    assert (np.ptp(np.asarray(found.history), axis=(0, 2, 3, 4)) > 0).sum() == min(19, 9 * chunks)
    shape = (2, 9, 2, 2, 16)  # the stream goes on where it would have
    np.testing.assert_array_equal(ours.normal(noise.CHUNK, (0,), shape), theirs.normal(noise.CHUNK, (0,), shape))
