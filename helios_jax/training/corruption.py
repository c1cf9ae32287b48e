"""Corruption of the history against drift: the model learns to repair what it continues from.

At sampling time the history is the model's own imperfect output, so in training clean history frames are degraded:
by noise, by blur, and (optionally) by a change of saturation. Only frames that hold something are touched, because an
empty history is exactly zero when sampling, too. All decisions are made per sample; nothing tells the model about
them. Source: the original's ``corrupt_history`` (which decides once per device batch, and noises empty frames).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from helios_jax.diffusion.history import HistoryLayout, add_noise
from helios_jax.training.config import require

MODES = ("noise", "blur", "random")


@dataclasses.dataclass(frozen=True)
class CorruptionConfig:
    """How the history is degraded; the defaults are those of the original's stages 1 and 2.

    Attributes:
      mode: 'noise'; 'blur' (the original's 'downsample'); 'random': per sample noise with probability
        ``noise_probability``, else blur.
      clean_probability: of leaving a sample's history as it is (saturation excepted).
      ratio_long, ratio_mid, ratio_short: largest noise level of a frame; the level is uniform between 0 and it.
      segments: which frames have which ratio: 'original' (the 12 oldest frames long, the 7 newest mid, the anchor
        short) or 'tier' (each frame that of the tier it is fed through).
      frame_independent: one level per frame, or one per segment.
      blur_min, blur_max: range of the factor by which frames are shrunk before being enlarged again.
      saturation: change the contrast between channels.
      saturation_clean_probability: of leaving a segment's saturation as it is.
      saturation_min, saturation_max: range of the factor; values within 0.001 of 1 are left out.
    """

    mode: str = "noise"
    noise_probability: float = 0.9
    clean_probability: float = 0.1
    ratio_long: float = 1 / 3
    ratio_mid: float = 1 / 3
    ratio_short: float = 1 / 3
    segments: str = "original"
    frame_independent: bool = True
    blur_min: float = 0.9
    blur_max: float = 1.0
    saturation: bool = False
    saturation_clean_probability: float = 0.1
    saturation_min: float = 0.3
    saturation_max: float = 1.7

    def __post_init__(self):
        require(self.mode in MODES, f"corruption.mode: one of {', '.join(MODES)}, got {self.mode!r}")
        require(self.segments in ("original", "tier"),
                f"corruption.segments: 'original' or 'tier', got {self.segments!r}")
        for field in ("noise_probability", "clean_probability", "ratio_long", "ratio_mid", "ratio_short",
                      "saturation_clean_probability"):
            require(0 <= getattr(self, field) <= 1, f"corruption.{field}: in [0, 1], got {getattr(self, field)}")
        require(0 < self.blur_min <= self.blur_max <= 1,
                f"corruption.blur_min, blur_max: 0 < min <= max <= 1, got {self.blur_min}, {self.blur_max}")
        require(0 <= self.saturation_min < 0.999 and self.saturation_max > 1.001,
                "corruption.saturation_min, saturation_max: below 0.999 and above 1.001, got "
                f"{self.saturation_min}, {self.saturation_max}")


class Segments(NamedTuple):
    """Segment number of every frame of [anchor, history...]: 0 anchor, 1 tail, 2, 3, ... windows of chunk size.

    ``blur`` has the newest window whole, ``saturation`` splits it where the ratios change (its first frames belong to
    the long tier in the original's table), so does ``noise``.
    """

    noise: np.ndarray
    blur: np.ndarray
    ratios: np.ndarray


def frame_segments(config: CorruptionConfig, layout: HistoryLayout) -> Segments:
    """Segments and largest noise levels of the frames [anchor, history 0 ... 18].

    For 19 = 1 + 2 * 9 frames: the tail is frame 0, the first window frames 1 to 9, the second frames 10, 11 | 12 to
    18. The split of the second one lies where it would if the window held all of the mid tier.
    """
    total, chunk = layout.frames, layout.chunk
    tail = total % chunk
    windows = (np.arange(total) - tail) // chunk + 2  # frame -> 2, 3, ...; negative quotients are the tail
    blur = np.concatenate([[0], np.where(np.arange(total) < tail, 1, windows)])
    split = tail + (total // chunk - 1) * chunk + layout.sizes[1]  # 1 + 9 + 2 = 12
    is_new = np.concatenate([[False], np.arange(total) >= split])
    noise = np.where(is_new, blur.max() + 1, blur)
    if config.segments == "original":
        history = np.where(np.arange(total) < split, config.ratio_long, config.ratio_mid)
    else:
        history = np.repeat([config.ratio_long, config.ratio_mid, config.ratio_short], layout.sizes)
    return Segments(noise, blur, np.concatenate([[config.ratio_short], history]).astype(np.float32))


class CorruptionRandomness(NamedTuple):
    """All random numbers for one sample of F = 1 + 19 frames: uniforms of [0, 1) but for ``noise`` (normal).

    clean, mode: []; level: [F] (per segment: the first frame's counts); noise: [F, h, w, C]; blur: [F] (of each
    segment the first counts); saturation: [F, 3] (keep?, weaker or stronger?, how much), likewise.
    """

    clean: jax.Array
    mode: jax.Array
    level: jax.Array
    noise: jax.Array
    blur: jax.Array
    saturation: jax.Array

    @classmethod
    def draw(cls, key: jax.Array, shape: tuple[int, ...]) -> CorruptionRandomness:
        """For frames of ``shape`` [F, h, w, C]; what a configuration does not use is never computed under jit."""
        keys = jax.random.split(key, 6)
        frames = shape[0]
        return cls(jax.random.uniform(keys[0]), jax.random.uniform(keys[1]), jax.random.uniform(keys[2], (frames,)),
                   jax.random.normal(keys[3], shape), jax.random.uniform(keys[4], (frames,)),
                   jax.random.uniform(keys[5], (frames, 3)))


def _first_of_segment(segments: np.ndarray) -> np.ndarray:
    """For every frame, the index of the first frame of its segment."""
    return np.array([int(np.argmax(segments == s)) for s in segments])


def resize_matrix(size: int, new_size: int) -> np.ndarray:
    """The antialiased bilinear resize of ``size`` samples to ``new_size`` as a matrix, float64 [new_size, size].

    Equal to PyTorch's ``interpolate(mode='bilinear', align_corners=False, antialias=True)`` along one axis.
    """
    scale = size / new_size
    width = max(scale, 1.0)  # a triangle as wide as the output's spacing, but never narrower than the input's
    centres = (np.arange(new_size) + 0.5) * scale
    weights = np.maximum(1 - np.abs((np.arange(size) + 0.5)[None, :] - centres[:, None]) / width, 0)
    return weights / weights.sum(1, keepdims=True)


def blur_matrices(size: int, low: float, high: float) -> tuple[np.ndarray, int]:
    """Shrinking to n samples and enlarging back, for every n that a factor in [low, high] can round to.

    Returns: float32 [count, size, size], and the smallest n.
    """
    first, last = max(1, round(size * low)), max(1, round(size * high))
    pairs = [resize_matrix(n, size) @ resize_matrix(size, n) for n in range(first, last + 1)]
    return np.stack(pairs).astype(np.float32), first


def _blur(frames: jax.Array, factors: jax.Array, config: CorruptionConfig) -> jax.Array:
    """Every frame [F, h, w, C] shrunk by its factor [F] to whole sizes and enlarged again."""
    for axis in (1, 2):
        matrices, smallest = blur_matrices(frames.shape[axis], config.blur_min, config.blur_max)
        chosen = jnp.maximum(jnp.round(frames.shape[axis] * factors).astype(jnp.int32), 1) - smallest  # [F]
        chosen = jnp.clip(chosen, 0, len(matrices) - 1)
        frames = jnp.moveaxis(jnp.einsum("fij,fj...->fi...", jnp.asarray(matrices)[chosen],
                                         jnp.moveaxis(frames, axis, 1)), 1, axis)
    return frames


def _saturate(frames: jax.Array, uniforms: jax.Array, config: CorruptionConfig) -> jax.Array:
    """Stretches every frame's [F, h, w, C] deviation from its channel mean; uniforms [F, 3]."""
    keep, stronger, amount = uniforms[:, 0], uniforms[:, 1] >= 0.5, uniforms[:, 2]
    weak = config.saturation_min + amount * (0.999 - config.saturation_min)
    strong = 1.001 + amount * (config.saturation_max - 1.001)
    factor = jnp.where(keep < config.saturation_clean_probability, 1.0, jnp.where(stronger, strong, weak))
    factor = factor.at[0].set(1.0)[:, None, None, None]  # [F] -> [F, 1, 1, 1]; never the anchor
    mean = frames.mean(-1, keepdims=True)
    return mean + factor * (frames - mean)


def corrupt(frames: jax.Array, random: CorruptionRandomness, config: CorruptionConfig, layout: HistoryLayout
            ) -> jax.Array:
    """Degrades one sample's [anchor, history...] frames.

    Args:
      frames: float32 [1 + 19, h, w, C]; frames that are all zero stay so.
      random: numbers for this sample.
      config: what may happen.
      layout: of the history.
    Returns: float32 of the same shape.
    """
    segments = frame_segments(config, layout)
    level = random.level if config.frame_independent else random.level[_first_of_segment(segments.noise)]
    noisy = add_noise(frames[None], random.noise[None], (segments.ratios * level)[None])[0]
    if config.mode == "noise":
        degraded = noisy
    else:
        low, high = config.blur_min, config.blur_max
        factors = low + (high - low) * random.blur[_first_of_segment(segments.blur)]
        blurred = _blur(frames, factors, config)
        degraded = blurred if config.mode == "blur" else jnp.where(random.mode < config.noise_probability, noisy,
                                                                    blurred)
    out = jnp.where(random.clean < config.clean_probability, frames, degraded)
    if config.saturation:
        out = _saturate(out, random.saturation[_first_of_segment(segments.noise)], config)
    exists = jnp.any(frames != 0, axis=(1, 2, 3), keepdims=True)  # [F, 1, 1, 1]
    return jnp.where(exists, out, 0.0)
