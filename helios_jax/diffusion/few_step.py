"""Few-step sampling of a pyramid level as the distilled student is trained for it.

A level's few-step grid has N points at equal distances in the level's sigma table, and 0; the dynamic shift moves them
towards noise or away from it. Which resolution sets the shift is a choice (``shift_from`` everywhere below):

  'own'       the level's own; timesteps go to the network as they are. The original trains with it.
  'previous'  that of the level below, before it is enlarged; timesteps are truncated to whole numbers. Samplers, the
              original's as well as this library's, do it; a student that is trained so meets what it will be used with.

One step of the student is ``renoise(x0(velocity, x, sigma), start, next_sigma)`` with the point at which the level
began as noise; :mod:`helios_jax.diffusion.solvers` has the same step as a row of coefficients.

Source: specification of training stage 3, sections 2.3, 2.4, 3.1 and 12.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from helios_jax.config import SchedulerConfig
from helios_jax.diffusion.schedules import Schedule, make_schedule, shift_tokens, shifted_stage, stage_table
from helios_jax.errors import UserError

# Points that are no further apart than this are one step.
_SAME_TIMESTEP = 1e-4


def student_scheduler(stages: int = 3, stage_range: tuple[float, ...] = (0.0, 1 / 3, 2 / 3, 1.0), gamma: float = 1 / 3
                      ) -> SchedulerConfig:
    """The scheduler that a distilled model is published with: DMD steps and the linear dynamic shift."""
    return SchedulerConfig("HeliosDMDScheduler", stages=stages, stage_range=stage_range, gamma=gamma,
                           use_dynamic_shifting=True, time_shift_type="linear")


def level_grid(config: SchedulerConfig, steps: int, *, frames: int, height: int, width: int, stage: int,
               shift_from: str = "own") -> Schedule:
    """The few-step grid of one pyramid level.

    Args:
      config: levels and shift; the solver does not matter.
      steps: N.
      frames, height, width: full-resolution latent size of the chunk, whatever the level.
      stage: index of the level, 0 being the lowest resolution.
      shift_from: 'own' or 'previous', see above.

    Raises:
      UserError: of :func:`~helios_jax.diffusion.schedules.make_schedule`, or another ``shift_from``.
    """
    return _level(_with_class(config, "HeliosDMDScheduler"), steps, frames, height, width, stage, shift_from)


def level_table(config: SchedulerConfig, *, frames: int, height: int, width: int, stage: int,
                shift_from: str = "own") -> Schedule:
    """All training points of a level (1000) after the shift; arguments as :func:`level_grid`."""
    return _level(_with_class(config, "HeliosScheduler"), config.num_train_timesteps, frames, height, width, stage,
                  shift_from)


def _with_class(config: SchedulerConfig, class_name: str) -> SchedulerConfig:
    return dataclasses.replace(config, class_name=class_name)


def _level(config: SchedulerConfig, steps: int, frames: int, height: int, width: int, stage: int, shift_from: str
           ) -> Schedule:
    tokens = shift_tokens(config, stage, frames=frames, height=height, width=width, shift_from=shift_from)
    return _as_seen(make_schedule(config, steps, tokens=tokens, stage=stage), shift_from)


def _as_seen(schedule: Schedule, shift_from: str) -> Schedule:
    """A schedule whose network timesteps are whole numbers only where sampling has them so."""
    return dataclasses.replace(schedule, model_timesteps=schedule.timesteps) if shift_from == "own" else schedule


def sigma_at(table: Schedule, timestep: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """The sigma of the table's entry whose timestep is nearest; any shape, NumPy or jax.

    Args:
      table: of :func:`level_table`, or any other schedule.
      timestep: not truncated.
    """
    xp = timestep.__array_namespace__()
    distance = xp.abs(xp.asarray(table.timesteps, dtype=timestep.dtype) - timestep[..., None])  # [..., n]
    return xp.asarray(table.sigmas[:-1], dtype=timestep.dtype)[xp.argmin(distance, axis=-1)]


def x0(velocity: jax.Array, sample: jax.Array, sigma: jax.Array | float) -> jax.Array:
    """The level's end point that a velocity means: sample - sigma velocity, float32 [B, ...].

    For all levels but the last that is a latent with noise left in it. ``sigma`` is a scalar or [B].
    """
    return sample.astype(jnp.float32) - _per_sample(sigma, sample) * velocity.astype(jnp.float32)


def renoise(clean: jax.Array, noise: jax.Array, sigma: jax.Array | float) -> jax.Array:
    """(1 - sigma) clean + sigma noise, float32 [B, ...]; ``sigma`` is a scalar or [B]."""
    sigma = _per_sample(sigma, clean)
    return (1 - sigma) * clean.astype(jnp.float32) + sigma * noise.astype(jnp.float32)


def _per_sample(sigma: jax.Array | float, like: jax.Array) -> jax.Array:
    sigma = jnp.asarray(sigma, jnp.float32)
    return sigma.reshape(sigma.shape + (1,) * (like.ndim - sigma.ndim))


def trajectory_schedule(config: SchedulerConfig, steps: int, few_steps: int, *, frames: int, height: int, width: int,
                        stage: int, shift_from: str = "own") -> tuple[Schedule, np.ndarray]:
    """A teacher's schedule that passes through the student's few-step grid (section 3.1).

    The grid's points that are no steps already are added before the shift, each with the sigma of the nearest entry
    of the level's table, so that a stored point differs from the student's by up to half an entry of the table.

    Args:
      config: the teacher's.
      steps: of the teacher, before points are added.
      few_steps: N of the student's grid.
      frames, height, width, stage, shift_from: as :func:`level_grid`.
    Returns: the schedule, whose network timesteps are truncated as in all sampling, and [N] indices of the steps that
      begin nearest to the student's points.

    Raises:
      UserError: so many points and steps that two of them share a sigma.
    """
    unshifted = dataclasses.replace(config, use_dynamic_shifting=False)
    teacher = make_schedule(_with_class(unshifted, "HeliosScheduler"), steps, tokens=0, stage=stage)
    points = make_schedule(_with_class(unshifted, "HeliosDMDScheduler"), few_steps, tokens=0, stage=stage).timesteps
    distance = np.abs(teacher.timesteps[None] - points[:, None]).min(axis=1)  # [N]
    added = points[distance > _SAME_TIMESTEP]
    grid = stage_table(config)[stage]
    table = Schedule(np.append(grid.sigmas(), 0.0), grid.timesteps(), grid.timesteps())
    timesteps = np.concatenate([teacher.timesteps, added])
    sigmas = np.concatenate([teacher.sigmas[:-1], sigma_at(table, added)])
    order = np.argsort(-timesteps)
    tokens = shift_tokens(config, stage, frames=frames, height=height, width=width, shift_from=shift_from)
    schedule = shifted_stage(config, stage, np.append(sigmas[order], 0.0), timesteps[order], tokens)
    if not (np.diff(schedule.sigmas) < 0).all():
        raise UserError(f"few_steps: {few_steps} points a level lie too close to the teacher's {steps} steps; fewer of "
                        "either")
    wanted = level_grid(config, few_steps, frames=frames, height=height, width=width, stage=stage,
                        shift_from=shift_from).timesteps
    return schedule, np.abs(schedule.timesteps[None] - wanted[:, None]).argmin(axis=1)
