"""Stage constants, sigmas and timesteps (diffusers classes ``HeliosScheduler`` and ``HeliosDMDScheduler``).

All arithmetic is NumPy float64 on the host. Sigma 1 is pure noise and sigma 0 the clean latents; a timestep is what
the transformer sees, 0...1000. In the pyramid a sigma is relative to its stage (every stage runs from 0.999 to 0)
and the timestep says where in the whole flow the stage lies. Training draws from the same :func:`stage_table`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from helios_jax.config import SchedulerConfig
from helios_jax.errors import UserError

FIRST_SIGMA = 0.999
# Upper border of the last stage's share of the flow: just below 1, so that flooring stays inside the table.
_LAST_RATIO = 0.9999999999999999
_MAX_TIMESTEP = 999.0
SHIFT_FROM = ("own", "previous")
_TOKENS_PER_PATCH = 4  # the transformer's patch is 1 x 2 x 2 latents


@dataclasses.dataclass(frozen=True)
class Stage:
    """Constants of one pyramid stage; index 0 is the lowest resolution.

    A stage's flow leads from start * noise + (1 - start) * up(clean of the stage below) to
    end * noise + (1 - end) * clean (:attr:`start` of stage 0 is not used: it begins at pure noise).

    Attributes:
      raw_start: global sigma at which the stage begins, and at which the stage below ends.
      start: the same after the correction for the block noise that is added at the transition.
      end: global sigma at which the stage ends; 0 for the last one.
      timestep_high, timestep_low: nominal first and last timestep. The last point of the grid lies one step before
        ``timestep_low``.
      alpha, beta: the transition into this stage is alpha * up(x) + beta * block noise; 1 and 0 for stage 0.
      gamma: correlation of the block noise.
      points: number of grid points (num_train_timesteps).
    """

    index: int
    raw_start: float
    start: float
    end: float
    timestep_high: float
    timestep_low: float
    alpha: float
    beta: float
    gamma: float
    points: int

    def timesteps(self) -> np.ndarray:
        """The stage's timestep grid, float64 [points], descending."""
        return np.linspace(self.timestep_high, self.timestep_low, self.points + 1)[:-1]

    def sigmas(self) -> np.ndarray:
        """The stage-relative sigma grid, float64 [points], descending; the same for every stage."""
        return np.linspace(FIRST_SIGMA, 0.0, self.points + 1)[:-1]


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """The steps of one stage (or of the only one).

    Attributes:
      sigmas: float64 [n + 1], descending, the last is 0.
      timesteps: float64 [n], one per step.
      model_timesteps: float64 [n], what the transformer is given: fractional in the one-stage mode, truncated toward
        zero in the pyramid, as the original pipelines do.
    """

    sigmas: np.ndarray
    timesteps: np.ndarray
    model_timesteps: np.ndarray

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)


def shift_sigmas(sigmas: Any, strength: float) -> Any:
    """s sigma / (1 + (s - 1) sigma), of NumPy or JAX arrays: 0 and 1 stay, what lies between rises with s."""
    return strength * sigmas / (1 + (strength - 1) * sigmas)


def global_sigmas(config: SchedulerConfig) -> np.ndarray:
    """The sigma of every training step with the static shift applied, float64 [num_train_timesteps], descending."""
    alphas = np.linspace(1, 1 / config.num_train_timesteps, config.num_train_timesteps + 1)
    sigmas = 1.0 - alphas
    return np.flip(shift_sigmas(sigmas, config.shift))[:-1]


@functools.lru_cache(maxsize=32)
def stage_table(config: SchedulerConfig) -> tuple[Stage, ...]:
    """Constants of every pyramid stage, lowest resolution first. Sampling and training share this table.

    Raises:
      UserError: ``stage_range`` does not ascend from 0 to 1, or gamma, shift or num_train_timesteps is out of range.
    """
    n, borders = config.num_train_timesteps, config.stage_range
    if n < 1:
        raise UserError(f"num_train_timesteps: must be positive, got {n}")
    if not config.shift > 0:
        raise UserError(f"shift: must be positive, got {config.shift}")
    if not 0 < config.gamma <= 1 / 3:
        raise UserError(f"gamma: must lie in (0, 1/3] for the block noise to have a covariance, got {config.gamma}")
    if list(borders) != sorted(set(borders)) or borders[0] < 0 or borders[-1] > 1:
        raise UserError(f"stage_range: must ascend within [0, 1], got {list(borders)}")
    sigmas = global_sigmas(config)
    timesteps = sigmas * n
    whitening = math.sqrt(1 + 1 / config.gamma)

    raw_starts, starts, ends, alphas, betas = [], [], [], [], []
    for i in range(config.stages):
        first, last = int(borders[i] * n), int(borders[i + 1] * n)
        raw = float(sigmas[first])
        signal = 1 - raw
        mix = whitening * (1 - signal) + signal
        raw_starts.append(raw)
        starts.append(raw if i == 0 else 1 - 1 / mix * signal)
        ends.append(float(sigmas[last]) if last < n else 0.0)
        alphas.append(1.0 if i == 0 else 1 / mix)
        betas.append(0.0 if i == 0 else 1 / mix * (1 - signal) / math.sqrt(config.gamma))

    lengths = [start - end for start, end in zip(starts, ends, strict=True)]
    cuts = [sum(lengths[:i]) / sum(lengths) for i in range(config.stages)] + [_LAST_RATIO]
    table = []
    for i in range(config.stages):
        high = min(float(timesteps[int(cuts[i] * n)]), _MAX_TIMESTEP)
        low = float(timesteps[min(int(cuts[i + 1] * n), n - 1)])
        table.append(Stage(i, raw_starts[i], starts[i], ends[i], high, low, alphas[i], betas[i], config.gamma, n))
    return tuple(table)


def latent_tokens(frames: int, height: int, width: int) -> int:
    """Transformer tokens of a latent of that many frames, rows and columns."""
    return frames * height * width // _TOKENS_PER_PATCH


def dynamic_shift_mu(config: SchedulerConfig, tokens: int) -> float:
    """The shift parameter mu of a token count: a line through two points, not clamped outside them."""
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return tokens * slope + (config.base_shift - slope * config.base_image_seq_len)


def time_shift(mu: float, sigmas: np.ndarray, kind: str) -> np.ndarray:
    """:func:`shift_sigmas` by e^mu ('exponential') or by mu itself ('linear').

    The linear kind with mu < 1, as small videos have, moves toward clean.
    """
    return shift_sigmas(sigmas, math.exp(mu) if kind == "exponential" else mu)


def pipeline_sigmas(steps: int) -> np.ndarray:
    """The unshifted sigmas that ``HeliosPipeline`` hands to its scheduler, float64 [steps]."""
    return np.linspace(FIRST_SIGMA, 0.0, steps + 1)[:-1]


def make_schedule(config: SchedulerConfig, steps: int, *, tokens: int, stage: int = 0, amplify: bool = False,
                  sigmas: Sequence[float] | np.ndarray | None = None) -> Schedule:
    """Sigmas and timesteps of one stage (``set_timesteps`` of the original's schedulers).

    Args:
      config: either scheduler class; ``stages == 1`` selects the one-stage mode.
      steps: denoising steps of the stage, at least 1.
      tokens: :func:`latent_tokens` of the latents *before* they are up-sampled into this stage; sets mu when
        ``use_dynamic_shifting``, otherwise ignored.
      stage: index of the pyramid stage; 0 in the one-stage mode.
      amplify: twice the steps (DMD only, ignored otherwise as in the original).
      sigmas: the caller's own unshifted sigmas in the one-stage mode, [steps] (DMD: [steps + 1], or
        [2 steps + 1] when amplified, of which the last is dropped), descending in (0, 1]; timesteps are 1000 sigma.
        None means :func:`pipeline_sigmas`; as in the original's pipelines a static shift does not act on either.

    Raises:
      UserError: steps, stage or sigmas are not what is described here.
    """
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 1:
        raise UserError(f"num_inference_steps: must be a whole number of at least 1, got {steps!r}")
    points = steps
    if config.is_dmd:
        points = 2 * steps + 1 if amplify else steps + 1

    one_stage = config.stages == 1
    if one_stage:
        if stage != 0:
            raise UserError(f"stage: the scheduler has one stage, got index {stage}")
        values = pipeline_sigmas(points) if sigmas is None else _checked_sigmas(sigmas, points)
        timesteps = values * config.num_train_timesteps
    else:
        if sigmas is not None:
            raise UserError(f"sigmas: own sigmas need a one-stage scheduler, this one has stages={config.stages}")
        table = stage_table(config)
        if not 0 <= stage < len(table):
            raise UserError(f"stage: must be 0...{len(table) - 1}, got {stage}")
        sigma_grid, timestep_grid = table[stage].sigmas(), table[stage].timesteps()
        values = np.linspace(sigma_grid[0], sigma_grid[-1], points)
        timesteps = np.linspace(timestep_grid[0], timestep_grid[-1], points)

    if config.is_dmd:  # the last point before 0 is only there to space the others
        values, timesteps = values[:-1], timesteps[:-1]
    values = np.append(values, 0.0)
    if not one_stage:
        return shifted_stage(config, stage, values, timesteps, tokens)
    if config.use_dynamic_shifting:
        values = time_shift(dynamic_shift_mu(config, tokens), values, config.time_shift_type)
        timesteps = values[:-1] * config.num_train_timesteps
    return Schedule(values, timesteps, timesteps)


def shifted_stage(config: SchedulerConfig, stage: int, sigmas: np.ndarray, timesteps: np.ndarray,
                  tokens: int) -> Schedule:
    """The schedule of a pyramid stage after the dynamic shift, or as it is where the configuration has none.

    Args:
      sigmas, timesteps: unshifted, [n + 1] (the last is 0) and [n].
      tokens: that set mu.
    """
    if config.use_dynamic_shifting:
        sigmas = time_shift(dynamic_shift_mu(config, tokens), sigmas, config.time_shift_type)
        grid = stage_table(config)[stage].timesteps()
        timesteps = grid.min() + sigmas[:-1] * (grid.max() - grid.min())
    return Schedule(sigmas, timesteps, np.trunc(timesteps))


def _checked_sigmas(sigmas: Sequence[float] | np.ndarray, points: int) -> np.ndarray:
    try:
        values = np.asarray(sigmas, np.float64)
    except (TypeError, ValueError):
        raise UserError(f"sigmas: must be numbers, got {sigmas!r}") from None
    if values.shape != (points,):
        raise UserError(f"sigmas: {points} values expected for this number of steps, got shape {values.shape}")
    # "not all" instead of "any not": NaN must be refused too.
    if not (np.all(values > 0) and np.all(values <= 1) and np.all(np.diff(values) < 0)):
        raise UserError(f"sigmas: must descend strictly within (0, 1], got {values.tolist()}")
    return values


def pyramid_schedules(config: SchedulerConfig, steps: Sequence[int], *, frames: int, height: int, width: int,
                      amplify: bool = False) -> tuple[Schedule, ...]:
    """The schedules of all stages of one chunk.

    Args:
      steps: denoising steps per stage, lowest resolution first, one entry per stage of the scheduler.
      frames, height, width: full-resolution latent size of the chunk (9, H/8, W/8).
      amplify: the chunk is the first one and is given twice the steps (DMD only).

    The shift of a stage follows from the latents before their up-sampling into it, so stages 0 and 1 share theirs
    (the original's inference does this; its training-time twin does not).

    Raises:
      UserError: the number of entries differs from the number of stages (the original stops early or crashes).
    """
    if len(steps) != config.stages:
        raise UserError(f"pyramid_num_inference_steps_list: {config.stages} entries expected (the scheduler's stages), "
                        f"got {list(steps)}")
    schedules = []
    for stage, count in enumerate(steps):
        tokens = shift_tokens(config, stage, frames=frames, height=height, width=width, shift_from="previous")
        schedules.append(make_schedule(config, count, tokens=tokens, stage=stage, amplify=amplify))
    return tuple(schedules)


def shift_tokens(config: SchedulerConfig, stage: int, *, frames: int, height: int, width: int, shift_from: str) -> int:
    """The token count that sets the shift of a pyramid stage.

    Args:
      stage: its index.
      frames, height, width: full-resolution latent size of the chunk.
      shift_from: 'own', the stage's own resolution, as the original trains; 'previous', that of the stage below (for
        stage 0 its own), as it samples.

    Raises:
      UserError: ``shift_from`` is neither.
    """
    if shift_from not in SHIFT_FROM:
        raise UserError(f"shift_from: {' or '.join(map(repr, SHIFT_FROM))}, got {shift_from!r}")
    halvings = config.stages - 1 - (stage if shift_from == "own" else max(stage - 1, 0))
    return latent_tokens(frames, height >> halvings, width >> halvings)
