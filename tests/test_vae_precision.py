"""Decoding in bfloat16 loses less than a level of eight bits: at least 50 dB against float32."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.config import VAEConfig
from helios_jax.convert.folder import read_component_config
from helios_jax.convert.load import load_component
from helios_jax.models.vae import WanVAE
from helios_jax.pipeline.pipeline import decode_chunk

BOX = Path(__file__).resolve().parents[1] / "assets" / "helios-tiny" / "vae"


def psnr(config: VAEConfig, params: dict, latents: jax.Array) -> float:
    """Of bfloat16 frames in [0, 1] against float32 ones, in decibels."""

    def frames(dtype):
        own = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        return jax.jit(lambda p, z: decode_chunk(WanVAE(config, dtype), p, z))(own, latents)

    exact = np.asarray(frames(jnp.float32), np.float64)
    assert 0.02 < exact.std() < 0.5  # a picture
    found = -10 * np.log10(np.mean((np.asarray(frames(jnp.bfloat16), np.float64) - exact) ** 2))
    print(f"\nbfloat16 against float32, {list(latents.shape)}: {found:.1f} dB")
    return found


def test_decoding_with_the_vae_in_the_box():
    config = read_component_config(BOX, "vae")
    latents = jax.random.normal(jax.random.key(0), (1, 3, 8, 8, config.z_dim))
    assert psnr(config, load_component(BOX, "vae", config, dtype=jnp.float32), latents) >= 50


@pytest.mark.slow
def test_decoding_with_a_vae_of_the_published_size():
    config = VAEConfig()
    video = jnp.zeros((1, 1, 16, 16, 3))
    params = jax.jit(WanVAE(config).init)(jax.random.key(1), video)["params"]
    assert psnr(config, params, jax.random.normal(jax.random.key(0), (1, 2, 4, 4, config.z_dim))) >= 50
