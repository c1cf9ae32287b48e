"""Image and video conditions: what stands in the history and the anchor before the first chunk.

Text, image and video input are one form. T2V begins with an empty history and no anchor; an image or a video fills
them. The order of the draws is that of the original, so that its noise can be fed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from helios_jax.config import VAEConfig
from helios_jax.diffusion import noise
from helios_jax.diffusion.history import HistoryLayout, add_noise, noise_sigma
from helios_jax.diffusion.noise import NoiseSource
from helios_jax.errors import UserError

Array = jax.Array


class Condition(NamedTuple):
    """history: [B, 19, h, w, C] float32; anchor: [B, 1, h, w, C] float32; has_anchor: whether an input gave it."""

    history: Array
    anchor: Array
    has_anchor: bool


class ConditionEncoder:
    """Encodes images and videos into a :class:`Condition`.

    Args:
      encode: (video [1, F, H, W, 3], normals for the posterior [1, T, h, w, C]) -> normalised latents [1, T, h, w, C]
        float32; a compiled program of the pipeline.
      config: the VAE's sizes.
      layout: frames of history and chunk.
      sigma: range of the noise level that the condition frames are given; None adds no noise.
    """

    def __init__(self, encode: Callable[[Array, Array], Array], config: VAEConfig, layout: HistoryLayout,
                 sigma: tuple[float, float] | None):
        self.config, self.layout, self.sigma = config, layout, sigma
        self.window = (layout.chunk - 1) * config.scale_factor_temporal + 1
        self._encode_one = encode

    def _encode(self, video: Array, eps: Array) -> Array:
        """Video by video, so that the result does not depend on the batch."""
        return jnp.concatenate([self._encode_one(video[i:i + 1], eps[i:i + 1]) for i in range(len(video))])

    def empty(self, batch: int, height: int, width: int) -> Condition:
        """Text to video: zeros."""
        h, w = height // 8, width // 8
        history = self.layout.empty(batch, h, w, self.config.z_dim)
        return Condition(history, history[:, :1], False)

    def image(self, source: NoiseSource, image: Array) -> Condition:
        """Image to video.

        Args:
          image: [B, H, W, 3] in [-1, 1].
        The anchor is the image's latent; the newest history frame is the last latent of the image held still for a
        whole chunk. Both are noised.
        """
        b, height, width, _ = image.shape
        shape = (b, self.layout.chunk, height // 8, width // 8, self.config.z_dim)
        one = (b, 1, *shape[2:])
        anchor = self._encode(image[:, None], source.normal(noise.ANCHOR_POSTERIOR, (), one))
        still = jnp.repeat(image[:, None], self.window, axis=1)  # [B, 33, H, W, 3]
        newest = self._encode(still, source.normal(noise.HISTORY_POSTERIOR, (), shape))[:, -1:]
        anchor = self._noised(source, anchor, noise.ANCHOR_SIGMA, noise.ANCHOR_NOISE, ())
        newest = self._noised(source, newest, noise.HISTORY_SIGMA, noise.HISTORY_NOISE, ())
        return Condition(self.layout.append(self.empty(b, height, width).history, newest), anchor, True)

    def video(self, source: NoiseSource, video: Array) -> Condition:
        """Video to video (continuation).

        Args:
          video: [B, F, H, W, 3] in [-1, 1]; whole chunks of 33 frames are taken from its end. Of those only the newest
            that fill the history are encoded; numbers are drawn for all, as the original does.
        Raises:
          UserError: fewer than 33 frames.
        """
        b, frames, height, width, _ = video.shape
        if frames < self.window:
            raise UserError(f"video: at least {self.window} frames are needed, got {frames}")
        shape = (b, self.layout.chunk, height // 8, width // 8, self.config.z_dim)
        chunks = frames // self.window
        start = frames - chunks * self.window
        anchor = self._encode(video[:, :1], source.normal(noise.ANCHOR_POSTERIOR, (), (b, 1, *shape[2:])))
        oldest = max(0, chunks - math.ceil(self.layout.frames / self.layout.chunk))
        latents = {}
        for i in range(chunks):
            eps, first = source.normal(noise.VIDEO_POSTERIOR, (i,), shape), start + i * self.window
            if i >= oldest:
                latents[i] = self._encode(video[:, first: first + self.window], eps)
        anchor = self._noised(source, anchor, noise.ANCHOR_SIGMA, noise.ANCHOR_NOISE, ())
        history = self.empty(b, height, width).history
        for i in range(chunks):
            # A chunk that was not encoded leaves the history before it ends.
            z = latents[i] if i in latents else jnp.zeros(shape)
            history = self.layout.append(history, self._noised(source, z, noise.VIDEO_SIGMA, noise.VIDEO_NOISE, (i,)))
        return Condition(history, anchor, True)

    def _noised(self, source: NoiseSource, z: Array, sigma: str, eps: str, index: tuple[int, ...]) -> Array:
        if self.sigma is None:
            return z
        level = noise_sigma(jnp.asarray(source.uniform(sigma, index, z.shape[1])), *self.sigma)  # [B or 1, T]
        return add_noise(z, source.normal(eps, index, z.shape), level)
