"""Distribution matching and the adversarial terms as functions of arrays; networks are the caller's.

Notation of the specification of training stage 3, sections 6 to 8: X is the student's chunk, f and r the clean latents
that the critic and the guided teacher predict for X with noise of level sigma.

    r in (0, 1):  student Beta(1 + (a - 1) k, 1 + (b - 1) k) with k = (1 + cos(pi min(g / G, 1))) / 2, critic uniform
    t = 1000 mu r / (1 + (mu - 1) r), clamped and rounded; sigma of the nearest entry of the shifted table
    student       g_dm = (f - r) / mean |X - r|;  L = mean g_dm^2 / 2, whose gradient in X is g_dm / size
    critic        mean (v - (eps - X))^2
    heads         mean softplus(-D(fake)) + mean softplus(D(real)), D being the logit of "made by the student"
    approximate R1    mean (D(real) - D(real + 0.1 xi))^2
    student's adversarial term    mean softplus(D(fake))
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from helios_jax.config import SchedulerConfig
from helios_jax.diffusion.schedules import Schedule, dynamic_shift_mu, latent_tokens, shift_sigmas
from helios_jax.training.config import require

TRAIN_TIMESTEPS = 1000


@dataclasses.dataclass(frozen=True)
class RenoiseConfig:
    """How much noise the student's chunk is given before the scores see it.

    Attributes:
      alpha, beta: of the Beta distribution at step 0, towards strong noise.
      decay_steps: after so many steps it is uniform.
      lowest, highest: limits of the timestep.
      shift: mu; 0 takes the one that follows from the resolution, as the original's runs do. Small videos have less
        than 1, which is little noise.
    """

    alpha: float = 4.0
    beta: float = 1.5
    decay_steps: int = 500
    lowest: int = 20
    highest: int = 980
    shift: float = 0.0

    def __post_init__(self):
        require(self.alpha >= 1 and self.beta >= 1,
                f"objective.renoise.alpha, beta: at least 1, got {self.alpha}, {self.beta}")
        require(self.decay_steps > 0, f"objective.renoise.decay_steps: must be positive, got {self.decay_steps}")
        require(0 < self.lowest < self.highest < TRAIN_TIMESTEPS,
                f"objective.renoise.lowest, highest: 0 < lowest < highest < 1000, got {self.lowest}, {self.highest}")
        require(self.shift >= 0, f"objective.renoise.shift: 0 or more, got {self.shift}")


def beta_parameters(config: RenoiseConfig, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both parameters of the student's distribution at a step: (alpha, beta) at 0, (1, 1) from ``decay_steps`` on."""
    share = 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(step / config.decay_steps, 1.0)))
    return 1 + (config.alpha - 1) * share, 1 + (config.beta - 1) * share


def score_shift(config: RenoiseConfig, scheduler: SchedulerConfig, *, frames: int, height: int, width: int) -> float:
    """mu for chunks of this full-resolution size."""
    return config.shift or dynamic_shift_mu(scheduler, latent_tokens(frames, height, width))


def score_table(mu: float) -> Schedule:
    """The noise levels of the scores: u = 1 ... 0.001, shifted; timesteps are 1000 sigma."""
    sigmas = shift_sigmas(np.linspace(1, 1 / TRAIN_TIMESTEPS, TRAIN_TIMESTEPS), mu)
    return Schedule(np.append(sigmas, 0.0), TRAIN_TIMESTEPS * sigmas, TRAIN_TIMESTEPS * sigmas)


def score_timestep(config: RenoiseConfig, mu: float, numbers: jax.Array) -> jax.Array:
    """Whole timesteps of numbers in (0, 1), float32 of the same shape."""
    shifted = TRAIN_TIMESTEPS * shift_sigmas(numbers, mu)
    return jnp.round(jnp.clip(shifted, config.lowest, config.highest))


def matching_loss(chunk: jax.Array, fake: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The loss whose gradient in ``chunk`` is the normalised difference of the scores.

    Args:
      chunk: X, float32 [B, T, h, w, C]; the only argument that a gradient reaches.
      fake, real: f and the guided r, of the same shape.
    Returns: the loss [], and mean |f - r| / mean |X - r| of the samples, [].
    """
    fixed, fake, real = (jax.lax.stop_gradient(x.astype(jnp.float32)) for x in (chunk, fake, real))
    axes = tuple(range(1, chunk.ndim))
    distance = jnp.abs(fixed - real).mean(axes, keepdims=True)  # [B, 1, 1, 1, 1]
    # A chunk that equals r has no direction. What is not finite stays so, and the turn is skipped and counted.
    gradient = jnp.where(distance == 0, 0.0, (fake - real) / jnp.where(distance == 0, 1.0, distance))
    return 0.5 * jnp.mean(jnp.square(chunk - (fixed - gradient))), jnp.abs(gradient).mean()


def flow_loss(velocity: jax.Array, chunk: jax.Array, noise: jax.Array) -> jax.Array:
    """mean (v - (noise - X))^2 in float32; gradients reach ``velocity`` only."""
    target = jax.lax.stop_gradient(noise - chunk)
    return jnp.mean(jnp.square(velocity.astype(jnp.float32) - target))


def head_loss(fake: jax.Array, real: jax.Array) -> jax.Array:
    """What the heads minimise; logits float32 [B, K] are positive for "made by the student"."""
    return jax.nn.softplus(-fake).mean() + jax.nn.softplus(real).mean()


def adversarial_loss(fake: jax.Array) -> jax.Array:
    """What the student minimises, of the logits of its own chunk."""
    return jax.nn.softplus(fake).mean()


def r1_penalty(real: jax.Array, disturbed: jax.Array) -> jax.Array:
    """mean (D(real) - D(real + noise))^2 of logits for the same crop."""
    return jnp.mean(jnp.square(real - disturbed))


def crop(latents: jax.Array, corner: jax.Array, size: tuple[int, int]) -> jax.Array:
    """A window of every sample.

    Args:
      latents: [B, T, h, w, C].
      corner: uniforms of [0, 1), [B, 2], of the window's place among all possible ones.
      size: its rows and columns.
    Returns: [B, T, *size, C].
    """
    _, frames, height, width, channels = latents.shape
    room = np.array([height - size[0] + 1, width - size[1] + 1], np.float32)
    places = jnp.floor(corner * room).astype(jnp.int32)  # [B, 2]

    def one(sample: jax.Array, place: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(sample, (0, place[0], place[1], 0), (frames, *size, channels))

    return jax.vmap(one)(latents, places)
