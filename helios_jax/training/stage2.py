"""Stage 2: flow matching on a pyramid of resolutions, all levels in every step.

The context of a sample is that of :mod:`helios_jax.training.flow`; history and anchor stay at full resolution
whatever the level, and low-resolution tokens count their own rows and columns, both as in sampling. Then, level 0
being the lowest resolution and level S - 1 the full one,

    c_{S-1} = x, c_{i-1} = mean over 2x2 of c_i; eps_{S-1} ~ N(0, I), eps_{i-1} = 2 mean over 2x2 of eps_i
    start a_0 = eps_0, a_i = s_i eps_i + (1 - s_i) up(c_{i-1}); end b_i = e_i eps_i + (1 - e_i) c_i
    for every entry: k = floor(1000 U(0, 1)), sigma and t from row k of the level's table (diffusion.schedules.Stage)
    loss = mean over entries of mean((model(sigma a_i + (1 - sigma) b_i, t, history, caption) - (a_i - b_i))^2)

An entry is one noisy version of the sample; ``sample_ratios`` says how many each level has. The versions of a sample
share its noise and its context, and differ in u. Every entry weighs the same, however many tokens it has.

The original packs the entries of a sample into one sequence with block-diagonal attention, which computes the same
as separate passes. Here each level is one call of the model, in which its entries stand along the batch axis: shapes
stay static, attention stays dense, and the tokens of the history are embedded once for all levels. Every call has its
own pass over those tokens, as every packed block has.

A model of stage 1 is at first wrong by a factor: its velocity is per unit of the whole flow, that of a level per
unit of the level's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from helios_jax.config import ModelIndex, SchedulerConfig
from helios_jax.data.buckets import latent_folders
from helios_jax.diffusion import pyramid
from helios_jax.diffusion.history import HistoryLayout
from helios_jax.diffusion.schedules import stage_table
from helios_jax.models.transformer import HeliosTransformer
from helios_jax.training import flow
from helios_jax.training.config import RunConfig, require
from helios_jax.training.flow import Context, Errors, FlowConfig, PyTree, Randomness
from helios_jax.training.objective import Objective
from helios_jax.training.weights import TrainedWeights


@dataclasses.dataclass(frozen=True)
class Config(FlowConfig):
    """Settings of the objective; the others are those of :class:`helios_jax.training.flow.FlowConfig`.

    Attributes:
      sample_ratios: noisy versions of a sample per level, lowest resolution first; their number is that of the levels.
      stage_range: borders of the levels in the flow.
      gamma: correlation of the block noise that sampling adds between levels; sets the start points.
      level_weights: of each level's errors, in the loss and in its curves; all 1 if not given, as in the original. A
        level's velocity spans a part of the flow only, so its errors are small: with three equal parts, those of level
        0 are a ninth of what they would be over the whole flow.
    """

    timesteps: str = "uniform"
    sample_ratios: tuple[int, ...] = (1, 2, 1)
    stage_range: tuple[float, ...] = (0.0, 1 / 3, 2 / 3, 1.0)
    gamma: float = 1 / 3
    level_weights: tuple[float, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        require(len(self.sample_ratios) > 1 and min(self.sample_ratios) > 0,
                f"objective.sample_ratios: two or more positive whole numbers, got {list(self.sample_ratios)}")
        require(len(self.stage_range) == len(self.sample_ratios) + 1,
                f"objective.stage_range: {len(self.sample_ratios) + 1} borders for {len(self.sample_ratios)} levels, "
                f"got {len(self.stage_range)}")
        flow.checked_level_weights(self.level_weights, len(self.sample_ratios))
        stage_table(self.scheduler)  # checks the borders and gamma

    @property
    def entries(self) -> tuple[int, ...]:
        return tuple(level for level, count in enumerate(self.sample_ratios) for _ in range(count))

    @property
    def scheduler(self) -> SchedulerConfig:
        """What the trained model is sampled with (Mid); training uses its table of levels, without the shift."""
        return SchedulerConfig(stages=len(self.sample_ratios), stage_range=self.stage_range, gamma=self.gamma,
                               use_dynamic_shifting=True, time_shift_type="exponential")


class Level(NamedTuple):
    """The entries of one sample at one level.

    noisy: [r, 9, h_i, w_i, C]; timestep, sigma: [r], sigma relative to the level; velocity: [9, h_i, w_i, C], the same
    for all r.
    """

    noisy: jax.Array
    timestep: jax.Array
    sigma: jax.Array
    velocity: jax.Array


class Example(NamedTuple):
    """What the model sees of one sample, and what it shall say: the levels, lowest resolution first; the context."""

    levels: tuple[Level, ...]
    frames: jax.Array
    text: jax.Array
    text_length: jax.Array


def prepare(config: Config, layout: HistoryLayout, random: Randomness, item: dict[str, jax.Array],
            empty: dict[str, jax.Array]) -> Example:
    """One sample's training example; a deterministic function of its random numbers.

    Arguments as :func:`helios_jax.training.flow.make_context`.
    """
    context = flow.make_context(config, layout, random, item, empty)
    table = stage_table(config.scheduler)
    target, noise = item["target"].astype(jnp.float32)[None], random.noise[None]  # [9, ...] -> [1, 9, h, w, C]
    points = pyramid.flow_points(table, pyramid.noise_pyramid(noise, len(table)),
                                 pyramid.clean_pyramid(target, len(table)))
    rows = flow.timestep_index(random.timestep, config.timesteps)  # [E]
    levels, first = [], 0
    for stage, repeats, (start, end) in zip(table, config.sample_ratios, points, strict=True):
        row = rows[first:first + repeats]
        sigma = jnp.asarray(stage.sigmas(), jnp.float32)[row]  # [r]
        timestep = jnp.asarray(stage.timesteps(), jnp.float32)[row]
        mix = sigma[:, None, None, None, None]
        levels.append(Level(mix * start + (1 - mix) * end, timestep, sigma, (start - end)[0]))
        first += repeats
    return Example(tuple(levels), *context)


def make_errors(config: Config, layout: HistoryLayout, model: HeliosTransformer,
                weights: TrainedWeights) -> flow.ErrorFunction:
    """The squared errors of a batch, see :data:`helios_jax.training.flow.ErrorFunction`."""
    level_weights = flow.checked_level_weights(config.level_weights, len(config.sample_ratios))

    def errors(params, frozen, batch: dict[str, jax.Array], keys: jax.Array) -> Errors:
        examples = flow.draw_examples(prepare, config, layout, keys, batch, frozen["empty"])
        context = Context(examples.frames, examples.text, examples.text_length)
        predicted = level_velocities(model, weights.variables(params, frozen), layout, context,
                                     [(level.noisy, level.timestep) for level in examples.levels])
        squared = [weight * jnp.square(velocity - level.velocity[:, None]).mean((2, 3, 4, 5))  # [B, r]
                   for weight, velocity, level in zip(level_weights, predicted, examples.levels, strict=True)]
        sigma = jnp.concatenate([level.sigma for level in examples.levels], axis=1)
        return Errors(jnp.concatenate(squared, axis=1), sigma < 0.5, flow.has_history(examples.frames))

    return errors


def level_velocities(model: HeliosTransformer, variables: PyTree, layout: HistoryLayout, context: Context,
                     levels: Sequence[tuple[jax.Array, jax.Array]]) -> list[jax.Array]:
    """What the model says of noisy versions of every sample, level by level.

    Args:
      model, variables: the transformer and its parameters.
      layout: of the history.
      context: of the samples, [B, ...]; the tokens of its history and caption are made once for all levels.
      levels: noisy versions [B, r, 9, h_i, w_i, C] and their timesteps [B, r].
    Returns: velocities, float32 in the shapes of the noisy versions.
    """
    conditions = flow.make_conditions(model, variables, layout, context)

    def velocity(noisy: jax.Array, timestep: jax.Array) -> jax.Array:
        merged = noisy.reshape(-1, *noisy.shape[2:])  # [B, r, 9, ...] -> [B r, 9, h_i, w_i, C]
        predicted = flow.velocity(model, layout, context.frames.shape[2:4],
                                  flow.conditions_repeated(conditions, timestep.shape[1]), merged,
                                  timestep.reshape(-1))
        return predicted.astype(jnp.float32).reshape(noisy.shape)

    return [velocity(*level) for level in levels]


def check_size(levels: int, height: int, width: int) -> None:
    """Checks that latents of ``height`` x ``width`` can be halved for every level and then cut into 2 x 2 patches.

    Raises:
      UserError: they cannot; the smallest level must have even rows and columns.
    """
    divisor = 2**levels
    require(height % divisor == 0 and width % divisor == 0,
            f"objective.data: latents of {height}x{width} cannot have {levels} levels; rows and "
            f"columns must be multiples of {divisor}, which is {8 * divisor} pixels")


def sampled_as(config: Config) -> tuple[ModelIndex, SchedulerConfig]:
    """What the model in training is sampled as: Mid."""
    return ModelIndex(class_name="HeliosPyramidPipeline", is_cfg_zero_star=True), config.scheduler


def build(run: RunConfig) -> Objective:
    """The objective of a run.

    Raises:
      UserError: the data or the model folder is missing or does not fit the transformer or the pyramid.
    """
    config: Config = run.objective
    for folder in latent_folders(config.data).values():
        check_size(len(config.sample_ratios), folder.height, folder.width)
    return flow.build(run, make_errors, *sampled_as(config))
