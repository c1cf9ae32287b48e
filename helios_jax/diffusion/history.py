"""The history that a chunk is conditioned on: 19 latent frames of constant size, and an anchor frame.

A frame is [h, w, C] at full resolution whatever the pyramid stage. The history buffer is [B, 19, h, w, C] float32,
oldest frame first; frames that do not exist yet are zeros, which the model attends to like any other. The anchor
[B, 1, h, w, C] keeps the first frame of the video in sight.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from helios_jax.errors import UserError
from helios_jax.models.inputs import FrameIndices, History

_FRAMES = -4  # the axis of frames in [B, T, h, w, C] and in [T, h, w, C]


class TrainingWindow(NamedTuple):
    """One training item: anchor [1, h, w, C], history [19, h, w, C], target [9, h, w, C] (batch axis optional)."""

    anchor: np.ndarray
    history: np.ndarray
    target: np.ndarray


@dataclasses.dataclass(frozen=True)
class HistoryLayout:
    """How many frames the tiers and a chunk have.

    Attributes:
      sizes: frames of the long, mid and newest tier; sorted descending, as the original does.
      chunk: latent frames per chunk.
    """

    sizes: tuple[int, int, int] = (16, 2, 1)
    chunk: int = 9

    def __post_init__(self):
        sizes = tuple(self.sizes)
        if len(sizes) != 3 or any(not isinstance(s, int) or s < 1 for s in sizes):
            raise UserError(f"history_sizes: three positive whole numbers expected, got {list(sizes)}")
        if self.chunk < 1:
            raise UserError(f"num_latent_frames_per_chunk: must be positive, got {self.chunk}")
        object.__setattr__(self, "sizes", tuple(sorted(sizes, reverse=True)))

    @property
    def frames(self) -> int:
        """Frames of the history buffer (19)."""
        return sum(self.sizes)

    def tokens(self, height: int, width: int) -> tuple[int, int, int]:
        """Of the long, the mid and the short tier (with the anchor), for latents of ``height`` x ``width``."""
        long, mid, short = self.sizes
        return tuple(math.ceil(frames / k) * math.ceil(height / (2 * k)) * math.ceil(width / (2 * k))
                     for frames, k in ((long, 4), (mid, 2), (1 + short, 1)))

    def indices(self) -> FrameIndices:
        """Anchor 0, long 1...16, mid 17, 18, newest 19, current 20...28."""
        return FrameIndices.for_history(self.sizes, self.chunk)

    def empty(self, batch: int, height: int, width: int, channels: int) -> jax.Array:
        """The history before anything exists: zeros [B, 19, h, w, C] float32."""
        return jnp.zeros((batch, self.frames, height, width, channels), jnp.float32)

    def append(self, history: jax.Array, frames: jax.Array) -> jax.Array:
        """The newest 19 frames after ``frames`` [B, t, h, w, C] were added: [B, 19, h, w, C] float32.

        To condition on an image or a video, append its latents to :meth:`empty`: one frame of an image takes the
        newest slot, and of a longer video only the last 19 frames remain.
        """
        # [B, 19 + t, h, w, C] -> [B, 19, h, w, C]
        return jnp.concatenate([history, frames.astype(jnp.float32)], axis=1)[:, -self.frames:]

    def split(self, history: jax.Array, anchor: jax.Array) -> History:
        """The transformer's three tiers of a history [B, 19, h, w, C] and an anchor [B, 1, h, w, C]."""
        long_size, mid_size, _ = self.sizes
        long = history[:, :long_size]
        mid = history[:, long_size:long_size + mid_size]
        newest = history[:, long_size + mid_size:]
        return History(jnp.concatenate([anchor.astype(history.dtype), newest], axis=1), mid, long)

    def training_window(self, latents: np.ndarray, section: int) -> TrainingWindow:
        """Cuts the item of one section out of a record.

        Args:
          latents: the record's sections one after another, [T, h, w, C] or [B, T, h, w, C], NumPy or jax; T is a
            multiple of the chunk.
          section: which one is the target; 0 has neither history nor anchor (both zero).
        Raises:
          UserError: the record has no such section, or T is not a multiple of the chunk.
        """
        total = latents.shape[_FRAMES]
        if total % self.chunk:
            raise UserError(f"latents: frames must be a multiple of {self.chunk}, got {total}")
        if not 0 <= section < total // self.chunk:
            raise UserError(f"section: must be 0...{total // self.chunk - 1}, got {section}")
        xp = latents.__array_namespace__()
        first = section * self.chunk
        target, past = (latents[..., a:b, :, :, :] for a, b in ((first, first + self.chunk),
                                                                 (max(first - self.frames, 0), first)))
        missing = self.frames - past.shape[_FRAMES]
        anchor = latents[..., :1, :, :, :]
        zeros = xp.zeros((*latents.shape[:_FRAMES], missing, *latents.shape[_FRAMES + 1:]), latents.dtype)
        history = xp.concatenate([zeros, past], axis=_FRAMES)  # [..., 19, h, w, C]
        return TrainingWindow(anchor if section else xp.zeros_like(anchor), history, target)


def replaces_anchor(chunk: int, has_anchor: bool, skip_first_chunk: bool) -> bool:
    """Whether the first frame of this chunk's result becomes the anchor.

    Args:
      chunk: index of the chunk just denoised.
      has_anchor: an image or a video gave the anchor before the first chunk.
      skip_first_chunk: anchor anew on the second chunk, over any other anchor; drops nothing from the output.
    """
    return (chunk == 0 and not has_anchor) or (skip_first_chunk and chunk == 1)


def update_anchor(anchor: jax.Array, latents: jax.Array, replace: bool | jax.Array) -> jax.Array:
    """The anchor [B, 1, h, w, C] after a chunk [B, 9, h, w, C]; ``replace`` may be traced."""
    return jnp.where(replace, latents[:, :1].astype(anchor.dtype), anchor)


def noise_sigma(uniform: jax.Array, low: float, high: float) -> jax.Array:
    """Maps uniforms of [0, 1) to noise levels of [low, high)."""
    return uniform * (high - low) + low


def add_noise(latents: jax.Array, noise: jax.Array, sigma: jax.Array) -> jax.Array:
    """sigma * noise + (1 - sigma) * latents: the noise that condition frames are given before use.

    Args:
      latents, noise: [B, T, h, w, C].
      sigma: one level per sample and frame, [B, T]; either axis may be 1.
    """
    sigma = jnp.asarray(sigma)[:, :, None, None, None]  # [B, T] -> [B, T, 1, 1, 1]
    return sigma * noise + (1 - sigma) * latents
