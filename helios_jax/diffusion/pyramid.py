"""The resolution pyramid: noise and clean latents go down, samples go up with block noise.

Latents are channel-last [B, T, h, w, C]; only h and w change. Down-sampling is the mean of 2 x 2 blocks and
up-sampling repeats every value, written out because ``jax.image.resize`` antialiases.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from helios_jax.diffusion.schedules import Stage
from helios_jax.errors import UserError

# Keeps the covariance positive definite for gamma = 1/3, where it is singular. It vanishes in float32, hence float64.
_JITTER = 1e-8


def downsample_clean(x: jax.Array) -> jax.Array:
    """Mean of every 2 x 2 block (bilinear resizing to half size): [B, T, h, w, C] -> [B, T, h/2, w/2, C].

    Raises:
      UserError: h or w is odd.
    """
    b, t, h, w, c = x.shape
    if h % 2 or w % 2:
        raise UserError(f"latent size: rows and columns must be even to be halved, got {h}x{w}")
    return x.reshape(b, t, h // 2, 2, w // 2, 2, c).mean(axis=(3, 5))  # [B, T, h/2, w/2, C]


def downsample_noise(x: jax.Array) -> jax.Array:
    """Twice the mean of every 2 x 2 block, so that white noise keeps its variance; shapes as above."""
    return 2 * downsample_clean(x)


def upsample(x: jax.Array) -> jax.Array:
    """Every value becomes a 2 x 2 block: [B, T, h, w, C] -> [B, T, 2h, 2w, C]."""
    return x.repeat(2, axis=2).repeat(2, axis=3)


def clean_pyramid(x: jax.Array, stages: int) -> list[jax.Array]:
    """Clean latents at the resolution of every stage, lowest first; the last is ``x`` itself."""
    return _pyramid(x, stages, downsample_clean)


def noise_pyramid(x: jax.Array, stages: int) -> list[jax.Array]:
    """White noise at the resolution of every stage, lowest first; the last is ``x`` itself."""
    return _pyramid(x, stages, downsample_noise)


def _pyramid(x: jax.Array, stages: int, downsample) -> list[jax.Array]:
    levels = [x]
    for _ in range(stages - 1):
        levels.append(downsample(levels[-1]))
    return levels[::-1]


def flow_points(table: Sequence[Stage], noise: Sequence[jax.Array], clean: Sequence[jax.Array]
                ) -> list[tuple[jax.Array, jax.Array]]:
    """Where every stage's flow starts and ends in training; its velocity is start - end.

    A stage starts at start * noise + (1 - start) * up(clean of the stage below), the first one at pure noise, and ends
    at end * noise + (1 - end) * clean. :func:`transition` gives samples the distribution of the start.

    Args:
      table: of :func:`~helios_jax.diffusion.schedules.stage_table`.
      noise, clean: of :func:`noise_pyramid` and :func:`clean_pyramid`, [B, T, h_i, w_i, C].
    Returns: (start, end) per stage, lowest resolution first, in the shapes of ``clean``.
    """
    points = []
    for i, stage in enumerate(table):
        start = noise[0] if i == 0 else stage.start * noise[i] + (1 - stage.start) * upsample(clean[i - 1])
        points.append((start, stage.end * noise[i] + (1 - stage.end) * clean[i]))
    return points


def block_noise_shape(batch: int, frames: int, height: int, width: int, channels: int) -> tuple[int, ...]:
    """Shape of the white noise from which :func:`block_noise` makes [batch, frames, height, width, channels]."""
    return batch, frames, height // 2, width // 2, channels, 4


def block_covariance(gamma: float) -> np.ndarray:
    """Covariance of the 4 values of a 2 x 2 block: (1 + gamma) I - gamma 11^T, float64 [4, 4]."""
    return (1 + gamma) * np.eye(4) - gamma * np.ones((4, 4))


def block_noise(z: jax.Array, gamma: float) -> jax.Array:
    """Noise whose values repel each other within every 2 x 2 block (``sample_block_noise`` of the original).

    The original factorises the covariance in float32, where it is singular for the usual gamma of 1/3 and the CPU
    refuses; the factor here is the float64 one.

    Args:
      z: standard normal, :func:`block_noise_shape`; the last axis holds the block's values in the order
        (0,0), (0,1), (1,0), (1,1).
    Returns: [B, T, 2y, 2x, C] float32.
    """
    factor = np.linalg.cholesky(block_covariance(gamma) + _JITTER * np.eye(4)).astype(np.float32)
    b, t, y, x, c, _ = z.shape
    values = jnp.einsum("btyxcj,ij->btyxci", z.astype(jnp.float32), factor, precision=jax.lax.Precision.HIGHEST)
    values = values.reshape(b, t, y, x, c, 2, 2).transpose(0, 1, 2, 5, 3, 6, 4)  # [B, T, y, 2, x, 2, C]
    return values.reshape(b, t, 2 * y, 2 * x, c)  # [B, T, 2y, 2x, C]


def transition(x: jax.Array, z: jax.Array, stage: Stage) -> jax.Array:
    """The jump into a stage: alpha * up(x) + beta * block noise.

    Args:
      x: sample at the end of the stage below, [B, T, h, w, C].
      z: standard normal, [B, T, h, w, C, 4].
      stage: the stage entered.
    Returns: its first sample, which is also the DMD solver's start point, [B, T, 2h, 2w, C] float32.
    """
    return stage.alpha * upsample(x.astype(jnp.float32)) + stage.beta * block_noise(z, stage.gamma)
