"""The student's chunk: staged backward simulation with a random exit per level.

Per level of N steps an exit e in 0 ... N - 1 is drawn. With p the point at which the level begins (noise on level 0,
else the transition from the level below) and t_i, sigma_i the level's few-step grid,

    x = p
    for i < e:  x = renoise(x0(v(x, t_i), x, sigma_i), p, sigma_{i+1})      without gradient
    result      x0(v(x, t_e), x, sigma_e)                                   with gradient

so noise is added back with the level's own start point, the steps after e are not made, and what enters the exit step
is a constant if e > 0. The gradient of the last level's result therefore reaches the exit step of a lower level only
where every exit above it is 0. A chunk without any history takes twice the steps ("amplified").

The exits of a batch come from one random number per level, as the original shares them among its devices; samples with
and without history differ in N. Every shape is static: one loop makes as many steps without gradient as the batch
needs, samples past their exit stay as they are, then one step with gradient serves all.

Source: specification of training stage 3, section 5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from helios_jax.config import SchedulerConfig
from helios_jax.diffusion import few_step, pyramid
from helios_jax.diffusion.schedules import SHIFT_FROM, Stage
from helios_jax.training.config import require

PyTree = Any
# velocity(conditions, noisy [B, T, h_i, w_i, C], timestep [B]) -> [B, T, h_i, w_i, C]
Velocity = Callable[[PyTree, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How the student makes a chunk.

    Attributes:
      steps: per level, lowest resolution first; their number is that of the levels.
      amplify_first_chunk: twice the steps where there is no history at all.
      shift_from: 'own' or 'previous', see :mod:`helios_jax.diffusion.few_step`.
    """

    steps: tuple[int, ...] = (2, 2, 2)
    amplify_first_chunk: bool = True
    shift_from: str = "own"

    def __post_init__(self):
        require(len(self.steps) > 1 and min(self.steps) > 0,
                f"objective.rollout.steps: two or more positive whole numbers, got {list(self.steps)}")
        require(self.shift_from in SHIFT_FROM,
                f"objective.rollout.shift_from: {' or '.join(map(repr, SHIFT_FROM))}, got {self.shift_from!r}")


class LevelGrid(NamedTuple):
    """The few-step grids of one level, row 0 with history and row 1 without; zeros behind a row's last point.

    counts: [2] steps; timesteps: [2, n] as the network sees them; sigmas: [2, n + 1].
    """

    counts: np.ndarray
    timesteps: np.ndarray
    sigmas: np.ndarray


def level_grids(config: RolloutConfig, scheduler: SchedulerConfig, *, frames: int, height: int, width: int
                ) -> tuple[LevelGrid, ...]:
    """The grids of all levels of a chunk.

    Args:
      config: steps and shift.
      scheduler: of :func:`~helios_jax.diffusion.few_step.student_scheduler`.
      frames, height, width: full-resolution latent size of the chunk.
    """
    grids = []
    for stage, steps in enumerate(config.steps):
        counts = np.array([steps, 2 * steps if config.amplify_first_chunk else steps])
        timesteps, sigmas = np.zeros((2, counts[1]), np.float32), np.zeros((2, counts[1] + 1), np.float32)
        for row, count in enumerate(counts):
            grid = few_step.level_grid(scheduler, int(count), frames=frames, height=height, width=width, stage=stage,
                                       shift_from=config.shift_from)
            timesteps[row, :count], sigmas[row, :count + 1] = grid.model_timesteps, grid.sigmas
        grids.append(LevelGrid(counts, timesteps, sigmas))
    return tuple(grids)


class RolloutNoise(NamedTuple):
    """Normal numbers of a chunk: start [T, h_0, w_0, C]; blocks [T, h_i / 2, w_i / 2, C, 4] of every higher level."""

    start: jax.Array
    blocks: tuple[jax.Array, ...]

    @classmethod
    def draw(cls, key: jax.Array, levels: int, frames: int, size: tuple[int, int, int]) -> RolloutNoise:
        """For one sample of full-resolution latents of ``size`` (h, w, C)."""
        height, width, channels = size
        keys = jax.random.split(key, levels)
        sizes = [(height >> i, width >> i) for i in reversed(range(levels))]
        blocks = tuple(jax.random.normal(k, pyramid.block_noise_shape(1, frames, *hw, channels)[1:])
                       for k, hw in zip(keys[1:], sizes[1:], strict=True))
        return cls(jax.random.normal(keys[0], (frames, *sizes[0], channels)), blocks)


def rollout(velocity: Velocity, conditions: PyTree, grids: Sequence[LevelGrid], table: Sequence[Stage],
            noise: RolloutNoise, is_first: jax.Array, exits: jax.Array) -> jax.Array:
    """The chunk that the student makes, with gradients as described above.

    Args:
      velocity: the student's network; one call is one forward pass.
      conditions: whatever gradients may reach besides the latents: parameters, tokens of history and text.
      grids: of :func:`level_grids`.
      table: of :func:`~helios_jax.diffusion.schedules.stage_table`.
      noise: with the batch in front of every array.
      is_first: bool [B], which samples have no history.
      exits: [S] uniforms of [0, 1), one per level.
    Returns: float32 [B, T, h, w, C].
    """
    rows = is_first.astype(jnp.int32)
    x = noise.start
    for i, (grid, stage) in enumerate(zip(grids, table, strict=True)):
        if i:
            x = pyramid.transition(x, noise.blocks[i - 1], stage)
        chosen = jnp.floor(exits[i] * jnp.asarray(grid.counts)[rows]).astype(jnp.int32)  # [B]
        x = _level(velocity, conditions, grid, x, rows, chosen)
    return x


def _level(velocity: Velocity, conditions: PyTree, grid: LevelGrid, start: jax.Array, rows: jax.Array,
           exits: jax.Array) -> jax.Array:
    """One level from its start point; ``exits`` [B] are step numbers."""

    def at(values: np.ndarray, index: jax.Array | int) -> jax.Array:
        return jnp.asarray(values)[rows, index]  # [2, n] -> [B]

    def where(condition: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(condition[:, None, None, None, None], a, b)

    def clean(conditions: PyTree, x: jax.Array, index: jax.Array | int) -> jax.Array:
        return few_step.x0(velocity(conditions, x, at(grid.timesteps, index)), x, at(grid.sigmas, index))

    fixed, fixed_start = jax.lax.stop_gradient((conditions, start))

    def step(index: jax.Array, x: jax.Array) -> jax.Array:
        ahead = few_step.renoise(clean(fixed, x, index), fixed_start, at(grid.sigmas, index + 1))
        return where(index < exits, ahead, x)

    before_exit = jax.lax.fori_loop(0, exits.max(), step, fixed_start)
    return clean(conditions, where(exits > 0, before_exit, start), exits)
