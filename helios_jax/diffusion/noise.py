"""The one source of random numbers of a run.

Sampling asks a :class:`NoiseSource` for every random number it needs and says what for: a purpose (one of the
constants below, listed in the order in which the original draws) and an index that counts within the purpose, such
as the chunk. Three sources exist: :class:`SeededNoise` is the library's own; :class:`TorchGeneratorNoise` is the
stream of a PyTorch CPU generator, for comparisons with the original; :class:`RecordedNoise` plays arrays back.

Shapes are channel-last, [B, T, h, w, C], and [B, T, y, x, C, 4] for :data:`BLOCK`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from helios_jax.errors import UserError

# Index (): the VAE posterior of the anchor (the image, or the first frame of the video).
ANCHOR_POSTERIOR = "anchor_posterior"
# Index (): the posterior of the image repeated as a video, whose last latent frame becomes the history. I2V only.
HISTORY_POSTERIOR = "history_posterior"
# Index (chunk of the input video,): the posterior of 33 frames. V2V only.
VIDEO_POSTERIOR = "video_posterior"
# Index (): level and noise added to the anchor.
ANCHOR_SIGMA = "anchor_sigma"
ANCHOR_NOISE = "anchor_noise"
# Index (): level and noise added to the history frame. I2V only.
HISTORY_SIGMA = "history_sigma"
HISTORY_NOISE = "history_noise"
# Index (chunk of the input video,): levels (one per latent frame) and noise. V2V only.
VIDEO_SIGMA = "video_sigma"
VIDEO_NOISE = "video_noise"
# Index (chunk,): the noise that becomes the chunk, at full resolution.
CHUNK = "chunk"
# Index (chunk, stage): the white noise behind the block noise of the transition into a stage.
BLOCK = "block"

# The position is part of the determinism contract: append, never reorder.
PURPOSES = (ANCHOR_POSTERIOR, HISTORY_POSTERIOR, VIDEO_POSTERIOR, ANCHOR_SIGMA, ANCHOR_NOISE, HISTORY_SIGMA,
            HISTORY_NOISE, VIDEO_SIGMA, VIDEO_NOISE, CHUNK, BLOCK)


class NoiseSource(Protocol):
    """Where a run's random numbers come from."""

    def normal(self, purpose: str, index: tuple[int, ...], shape: Sequence[int]) -> jax.Array:
        """Standard-normal float32 of the given channel-last shape; the first axis is the batch."""
        ...

    def uniform(self, purpose: str, index: tuple[int, ...], n: int) -> np.ndarray:
        """Uniforms of [0, 1), float32 [B, n], or [1, n] where the source has one draw for the whole batch."""
        ...


class SeededNoise:
    """Noise that is a function of (seed, purpose, index, shape of one item) and of nothing else.

    Every item of the batch has its own seed and its own threefry stream, so its noise depends neither on the other
    items, nor on the order of draws, the part of a run in which a chunk is made, or the number of devices. Numbers
    are the same on every platform up to the last bits of the inverse error function.

    Args:
      seeds: one per item of the batch, 0...2^64-1.
    Raises:
      UserError: a seed is no whole number in that range, or there is none.
    """

    def __init__(self, seeds: Sequence[int]):
        seeds = tuple(seeds)
        for seed in seeds:
            _check_seed(seed)
        if not seeds:
            raise UserError("seed: one seed per batch item expected, got none")
        self.seeds = seeds

    def normal(self, purpose: str, index: tuple[int, ...], shape: Sequence[int]) -> jax.Array:
        if shape[0] != len(self.seeds):
            raise ValueError(f"noise for a batch of {shape[0]} was asked of a source with {len(self.seeds)} seeds")
        return jnp.stack([_draw(_normal, seed, purpose, index, tuple(shape[1:])) for seed in self.seeds])

    def uniform(self, purpose: str, index: tuple[int, ...], n: int) -> np.ndarray:
        return np.stack([np.asarray(_draw(_uniform, seed, purpose, index, (n,))) for seed in self.seeds])


def _check_seed(seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**64:
        raise UserError(f"seed: must be a whole number in 0...2^64-1, got {seed!r}")


def _draw(sample, seed: int, purpose: str, index: tuple[int, ...], shape: tuple[int, ...]) -> jax.Array:
    seed = int(seed)
    words = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
    path = np.array([PURPOSES.index(purpose), *index], np.uint32)
    # Items one by one through the same small program: a batched one might round differently for another batch size.
    # The flag decides which numbers come out; set here, they do not depend on the caller's configuration.
    with jax.threefry_partitionable(True):
        return sample(words, path, shape)


def _key(words: jax.Array, path: jax.Array) -> jax.Array:
    key = jax.random.wrap_key_data(words, impl="threefry2x32")
    for i in range(path.shape[0]):
        key = jax.random.fold_in(key, path[i])
    return key


@functools.partial(jax.jit, static_argnums=2)
def _normal(words: jax.Array, path: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(_key(words, path), shape, jnp.float32)


@functools.partial(jax.jit, static_argnums=2)
def _uniform(words: jax.Array, path: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.uniform(_key(words, path), shape, jnp.float32)


class RecordedNoise:
    """Plays recorded arrays back.

    Args:
      arrays: from (purpose, index) to an array in the shapes of :class:`NoiseSource`.
    """

    def __init__(self, arrays: Mapping[tuple[str, tuple[int, ...]], np.ndarray]):
        self.arrays = dict(arrays)

    def normal(self, purpose: str, index: tuple[int, ...], shape: Sequence[int]) -> jax.Array:
        array = self._get(purpose, index)
        if array.shape != tuple(shape):
            raise UserError(f"recorded noise {purpose}{index}: shape {tuple(shape)} is needed, got {array.shape}")
        return jnp.asarray(array)

    def uniform(self, purpose: str, index: tuple[int, ...], n: int) -> np.ndarray:
        array = self._get(purpose, index)
        if array.ndim != 2 or array.shape[1] != n:
            raise UserError(f"recorded noise {purpose}{index}: shape [B, {n}] is needed, got {array.shape}")
        return array

    def _get(self, purpose: str, index: tuple[int, ...]) -> np.ndarray:
        try:
            return np.asarray(self.arrays[purpose, tuple(index)], np.float32)
        except KeyError:
            raise UserError(f"recorded noise {purpose}{tuple(index)}: not recorded") from None


class TorchGeneratorNoise:
    """The stream of one PyTorch CPU generator (``torch.Generator("cpu").manual_seed(seed)``), without PyTorch.

    Purpose and index are ignored: numbers come in the order in which they are asked for, as in the original. They are
    drawn in the original's axis order, [B, C, T, h, w] or rows (B, C, T, y, x) of 4, and the channel axis is moved.
    Uniforms equal PyTorch's exactly, normals up to 5e-7 (PyTorch's logarithm and sine are vectorised approximations).
    Generators of GPUs have other streams.
    """

    DEFAULT_SEED = 67280421310721  # of a generator that was given none

    def __init__(self, seed: int):
        _check_seed(seed)
        self._words = np.random.RandomState(int(seed) & 0xFFFFFFFF)
        self._cached: float | None = None

    def normal(self, purpose: str, index: tuple[int, ...], shape: Sequence[int]) -> jax.Array:
        batch, frames, height, width, channels, *rest = shape
        x = self.randn(batch, channels, frames, height, width, *rest)
        return jnp.asarray(np.moveaxis(x, 1, 4))  # [B, C, T, h, w, ...] -> [B, T, h, w, C, ...]

    def uniform(self, purpose: str, index: tuple[int, ...], n: int) -> np.ndarray:
        return self.rand(1, n)

    def rand(self, *shape: int) -> np.ndarray:
        """``torch.rand``: float32 of the given shape."""
        return self._uniforms(math.prod(shape)).reshape(shape)

    def randn(self, *shape: int) -> np.ndarray:
        """``torch.randn``: float32 of the given shape."""
        n = math.prod(shape)
        if n < 16:
            return np.array([self._one_normal() for _ in range(n)], np.float32).reshape(shape)
        values = self._uniforms(n)
        whole = n - n % 16
        values[:whole] = _box_muller(values[:whole])
        if n % 16:  # the last 16 values, some of them finished before, are drawn afresh
            values[-16:] = _box_muller(self._uniforms(16))
        return values.reshape(shape)

    def _raw(self, n: int) -> np.ndarray:
        return self._words.randint(0, 2**32, size=n, dtype=np.uint32)

    def _uniforms(self, n: int) -> np.ndarray:
        return (self._raw(n) & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2**-24)

    def _one_normal(self) -> float:
        """Scalar Box-Muller in double; the second value of a pair waits for the next call, whenever that is."""
        if self._cached is not None:
            value, self._cached = self._cached, None
            return value
        high_low = self._raw(4).astype(object).reshape(2, 2)
        u1, u2 = (((int(a) << 32) + int(b)) % 2**53 * 2.0**-53 for a, b in high_low)
        radius = math.sqrt(-2 * math.log1p(-u2))
        self._cached = radius * math.sin(2 * math.pi * u1)
        return radius * math.cos(2 * math.pi * u1)


def _box_muller(uniforms: np.ndarray) -> np.ndarray:
    """Every 16 uniforms become 16 normals: 8 radii from the first half, 8 angles from the second. float32 [16 k]."""
    blocks = uniforms.reshape(-1, 2, 8)
    radius = np.sqrt(-2 * np.log(1 - blocks[:, 0]))  # [k, 8]
    angle = np.float32(2 * math.pi) * blocks[:, 1]  # [k, 8]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)  # [k, 2, 8] -> [16 k]
