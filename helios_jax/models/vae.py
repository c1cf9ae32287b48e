"""The causal video VAE of Wan 2.1 (diffusers ``AutoencoderKLWan``), encoder and decoder.

A chunk of F = 1 + 4k RGB frames of H x W becomes T = 1 + k latents of H/8 x W/8 with ``z_dim`` channels. Time flows
one way only, so a video may be worked whole or a latent at a time with the caches of :meth:`WanVAE.encode_step` and
:meth:`WanVAE.decode_step`; both give the same numbers. Each chunk of the pipelines starts with fresh caches.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from helios_jax.config import VAEConfig
from helios_jax.errors import UserError
from helios_jax.models.vae_layers import (
    CausalConv,
    Downsample,
    FrameMemory,
    Gamma,
    MidBlock,
    ResidualBlock,
    UpBlock,
    plain_init,
)
from helios_jax.models.vae_ops import CONV_FORMS

Array = jax.Array
Dtype = Any
Cache = list[Array]
Params = dict[str, Any]


class Encoder(nn.Module):
    """[B, 1 + 4k or 4k, H, W, 3] -> [B, 1 + k or k, H/8, W/8, 2 z_dim] (diffusers ``WanEncoder3d``)."""

    config: VAEConfig
    dtype: Dtype = jnp.float32
    conv_form: str = "taps"

    @nn.compact
    def __call__(self, x: Array, memory: FrameMemory) -> Array:
        config, common = self.config, (self.dtype, self.conv_form)
        x = CausalConv(config.base_dim, (3, 3, 3), *common, plain_init, name="conv_in")(x, memory)  # 3 -> base_dim
        names = (f"down_blocks_{i}" for i in range(len(config.dim_mult) * (config.num_res_blocks + 1)))
        for level, mult in enumerate(config.dim_mult):
            for _ in range(config.num_res_blocks):
                x = ResidualBlock(config.base_dim * mult, *common, name=next(names))(x, memory)
            if level < len(config.dim_mult) - 1:
                x = Downsample(config.temperal_downsample[level], *common, name=next(names))(x, memory)
        x = MidBlock(*common, name="mid_block")(x, memory)
        gamma = Gamma(name="norm_out")(x.shape[-1])
        return CausalConv(2 * config.z_dim, (3, 3, 3), *common, plain_init, name="conv_out")(x, memory, gamma)  # -> 2z


class Decoder(nn.Module):
    """[B, 1 + k or k, h, w, z_dim] -> [B, 1 + 4k or 4k, 8h, 8w, 3], not clamped (diffusers ``WanDecoder3d``)."""

    config: VAEConfig
    dtype: Dtype = jnp.float32
    conv_form: str = "taps"

    @nn.compact
    def __call__(self, x: Array, memory: FrameMemory) -> Array:
        config, common = self.config, (self.dtype, self.conv_form)
        base = config.decoder_base_dim or config.base_dim
        mults = config.dim_mult[::-1]
        temporal = config.temperal_downsample[::-1]
        x = CausalConv(base * mults[0], (3, 3, 3), *common, plain_init, name="conv_in")(x, memory)  # z -> C
        x = MidBlock(*common, name="mid_block")(x, memory)
        for level, mult in enumerate(mults):
            upsample = None if level == len(mults) - 1 else "3d" if temporal[level] else "2d"
            block = UpBlock(base * mult, config.num_res_blocks, upsample, *common, name=f"up_blocks_{level}")
            x = block(x, memory)  # h, w doubled and, for "3d", the frames after the first
        gamma = Gamma(name="norm_out")(x.shape[-1])
        return CausalConv(config.out_channels, (3, 3, 3), *common, plain_init, name="conv_out")(x, memory, gamma)


class WanVAE(nn.Module):
    """Encoder and decoder; call through ``apply(variables, ..., method=WanVAE.encode)``.

    Attributes:
      config: sizes.
      dtype: of the computation (parameters are cast at use); norms and softmax are float32 inside.
      conv_form: "taps" computes a 3-D convolution as one 2-D convolution over concatenated time taps, several times
        faster on a CPU; "3d" leaves it to the compiler's own 3-D convolution. Same parameters, same numbers.
    """

    config: VAEConfig
    dtype: Dtype = jnp.float32
    conv_form: str = "taps"

    def setup(self):
        if self.conv_form not in CONV_FORMS:
            raise UserError(f"conv_form: one of {', '.join(CONV_FORMS)}, got {self.conv_form!r}")
        common = (self.dtype, self.conv_form)
        z_dim = self.config.z_dim
        self.encoder = Encoder(self.config, *common)
        self.decoder = Decoder(self.config, *common)
        self.quant_conv = CausalConv(2 * z_dim, (1, 1, 1), *common, plain_init)
        self.post_quant_conv = CausalConv(z_dim, (1, 1, 1), *common, plain_init)

    def __call__(self, video: Array) -> Array:
        """Encodes and decodes the posterior's mean: touches every parameter, so ``init`` may use it."""
        return self.decode(self.encode(video)[0])

    def encode(self, video: Array) -> tuple[Array, Array]:
        """Posterior of a whole video.

        Args:
          video: [B, F, H, W, 3] in [-1, 1]. Frames beyond 1 + 4k are ignored, as the original does.
        Returns: mean and log-variance, each [B, 1 + (F-1)//4, H//8, W//8, z_dim], not normalised.
        """
        self.check("video", video, self.config.in_channels)
        factor = self.config.scale_factor_temporal
        kept = 1 + (video.shape[1] - 1) // factor * factor
        return self.encode_step(video[:, :kept], None)[0]

    def encode_step(self, frames: Array, cache: Cache | None) -> tuple[tuple[Array, Array], Cache]:
        """Posterior of the next frames of a video.

        Args:
          frames: [B, 1 + 4k, H, W, 3] with ``cache`` None (the start of a video), else [B, 4k, H, W, 3].
          cache: what the previous call returned; its shapes never change.
        Returns: (mean, logvar) each [B, 1 + k or k, H//8, W//8, z_dim], and the cache for the next call.
        """
        memory = FrameMemory(cache)
        moments = self.quant_conv(self.encoder(frames, memory), memory)
        mean, logvar = jnp.split(moments, 2, axis=-1)  # 2z -> z, z
        return (mean, logvar), memory.outgoing

    def decode(self, z: Array, clamp: bool = True) -> Array:
        """RGB frames of a whole chunk of latents.

        Args:
          z: [B, T, h, w, z_dim], not normalised.
          clamp: to [-1, 1] as the original; False keeps gradients alive in training.
        Returns: [B, 1 + 4(T-1), 8h, 8w, 3].
        """
        self.check("latents", z, self.config.z_dim)
        return self.decode_step(z, None, clamp)[0]

    def decode_step(self, z: Array, cache: Cache | None, clamp: bool = True) -> tuple[Array, Cache]:
        """RGB frames of the next latents of a chunk.

        Args:
          z: [B, k, h, w, z_dim].
          cache: None at the start of a chunk, else what the previous call returned; its shapes never change.
        Returns: frames [B, 1 + 4(k-1), 8h, 8w, 3] at the start, else [B, 4k, 8h, 8w, 3], and the next cache.
        """
        memory = FrameMemory(cache)
        frames = self.decoder(self.post_quant_conv(z, memory), memory)
        return jnp.clip(frames, -1, 1) if clamp else frames, memory.outgoing

    def check(self, name: str, x: Array, channels: int) -> None:
        """Raises a UserError unless x is [batch, frames, height, width, channels]."""
        if x.ndim != 5 or x.shape[1] == 0 or x.shape[-1] != channels:
            raise UserError(f"{name}: [batch, frames, height, width, {channels}] expected, got {list(x.shape)}")


def encode_in_steps(vae: WanVAE, params: Params, video: Array) -> tuple[Array, Array]:
    """:meth:`WanVAE.encode` as a scan over latents: the same numbers, memory independent of the video's length."""
    apply = functools.partial(vae.apply, {"params": params}, method=WanVAE.encode_step)
    vae.check("video", video, vae.config.in_channels)
    size = vae.config.scale_factor_temporal
    first, cache = apply(video[:, :1], None)

    def step(cache: Cache, frames: Array):
        moments, cache = apply(frames, cache)
        return cache, moments

    steps = (video.shape[1] - 1) // size
    rest = video[:, 1 : 1 + steps * size]
    rest = jnp.moveaxis(rest.reshape(len(video), steps, size, *video.shape[2:]), 1, 0)  # [steps, B, size, H, W, 3]
    _, moments = lax.scan(step, cache, rest)  # 2 x [steps, B, 1, h, w, z]
    return tuple(_append_steps(start, later) for start, later in zip(first, moments, strict=True))


def decode_in_steps(vae: WanVAE, params: Params, z: Array, clamp: bool = True) -> Array:
    """:meth:`WanVAE.decode` as a scan over latents: the same numbers, memory independent of the chunk's length."""
    apply = functools.partial(vae.apply, {"params": params}, clamp=clamp, method=WanVAE.decode_step)
    vae.check("latents", z, vae.config.z_dim)
    first, cache = apply(z[:, :1], None)

    def step(cache: Cache, latent: Array):
        frames, cache = apply(latent, cache)
        return cache, frames

    _, frames = lax.scan(step, cache, jnp.moveaxis(z[:, 1:, None], 1, 0))  # [T-1, B, 1, h, w, z] -> [T-1, B, 4, ...]
    return _append_steps(first, frames)


def _append_steps(first: Array, later: Array) -> Array:
    later = jnp.moveaxis(later, 0, 1)  # [steps, B, n, ...] -> [B, steps, n, ...]
    later = later.reshape(later.shape[0], -1, *first.shape[2:])  # -> [B, steps * n, ...]
    return jnp.concatenate([first, later], axis=1)


def normalize_latents(z: Array, config: VAEConfig) -> Array:
    """(z - mean) * (1 / std) per channel in z's dtype; the reciprocal is taken first, as the original does."""
    mean, inverse_std = _statistics(z, config)
    return (z - mean) * inverse_std


def denormalize_latents(z: Array, config: VAEConfig) -> Array:
    """z / (1 / std) + mean per channel in z's dtype: the inverse of :func:`normalize_latents`."""
    mean, inverse_std = _statistics(z, config)
    return z / inverse_std + mean


def _statistics(z: Array, config: VAEConfig) -> tuple[Array, Array]:
    return jnp.asarray(config.latents_mean, z.dtype), 1 / jnp.asarray(config.latents_std, z.dtype)  # [z_dim] each


def posterior_sample(mean: Array, logvar: Array, eps: Array) -> Array:
    """mean + exp(clamp(logvar, -30, 20) / 2) * eps, all of one shape (diffusers ``DiagonalGaussianDistribution``)."""
    return mean + jnp.exp(0.5 * jnp.clip(logvar, -30.0, 20.0)) * eps
