"""Stage 1: flow matching at full resolution on a chunk that continues a history.

The context of a sample is that of :mod:`helios_jax.training.flow`; then

    u = sigmoid(N(0, 1)); sigma = 1 - floor(1000 u) / 1000, shifted; eps ~ N(0, I)
    loss = mean((model((1 - sigma) x + sigma eps, 1000 sigma, history, caption) - (eps - x))^2)

Training from scratch differs from the original, which starts from Wan 2.1, in three ways: all parameters are trained,
an average of them is kept, and a tenth of the captions is replaced by the encoded empty prompt, so that guidance has
an unconditional model to lean on. (The original's option for the latter, off in all its runs, sets the embedding to
zeros, which is no prompt that sampling could ever encode.)
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from helios_jax.config import ModelIndex
from helios_jax.diffusion.history import HistoryLayout
from helios_jax.diffusion.schedules import shift_sigmas
from helios_jax.models.transformer import HeliosTransformer
from helios_jax.training import flow
from helios_jax.training.config import RunConfig, require
from helios_jax.training.flow import TRAIN_TIMESTEPS, Errors, FlowConfig, Randomness
from helios_jax.training.objective import Objective
from helios_jax.training.weights import TrainedWeights


@dataclasses.dataclass(frozen=True)
class Config(FlowConfig):
    """Settings of the objective; the others are those of :class:`helios_jax.training.flow.FlowConfig`.

    Attributes:
      timestep_shift: a in sigma' = a sigma / (1 + (a - 1) sigma). The original's runs have 1. Above 1 there is more
        training where noise is strong, which is where background, place and motion are decided.
    """

    timestep_shift: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        require(self.timestep_shift > 0, f"objective.timestep_shift: must be positive, got {self.timestep_shift}")


class Example(NamedTuple):
    """What the model sees of one sample, and what it shall say.

    noisy, velocity: [9, h, w, C]; timestep: [] in (0, 1000]; frames, text, text_length: the context.
    """

    noisy: jax.Array
    velocity: jax.Array
    timestep: jax.Array
    frames: jax.Array
    text: jax.Array
    text_length: jax.Array


def prepare(config: Config, layout: HistoryLayout, random: Randomness, item: dict[str, jax.Array],
            empty: dict[str, jax.Array]) -> Example:
    """One sample's training example; a deterministic function of its random numbers.

    Arguments as :func:`helios_jax.training.flow.make_context`.
    """
    context = flow.make_context(config, layout, random, item, empty)
    index = flow.timestep_index(random.timestep, config.timesteps).astype(jnp.float32)
    sigma = shift_sigmas((TRAIN_TIMESTEPS - index) / TRAIN_TIMESTEPS, config.timestep_shift)
    target = item["target"].astype(jnp.float32)
    noisy = (1 - sigma) * target + sigma * random.noise
    return Example(noisy, random.noise - target, TRAIN_TIMESTEPS * sigma, *context)


def make_errors(config: Config, layout: HistoryLayout, model: HeliosTransformer,
                weights: TrainedWeights) -> flow.ErrorFunction:
    """The squared errors of a batch, see :data:`helios_jax.training.flow.ErrorFunction`."""

    def errors(params, frozen, batch: dict[str, jax.Array], keys: jax.Array) -> Errors:
        examples = flow.draw_examples(prepare, config, layout, keys, batch, frozen["empty"])
        variables = weights.variables(params, frozen)
        history = layout.split(examples.frames[:, 1:], examples.frames[:, :1])
        text = model.text_rows(variables, examples.text, examples.text_length)
        predicted = model.apply(variables, examples.noisy.astype(model.dtype), examples.timestep, text,
                                jax.tree.map(lambda tier: tier.astype(model.dtype), history), indices=layout.indices())
        squared = jnp.square(predicted.astype(jnp.float32) - examples.velocity).mean((1, 2, 3, 4))  # [B]
        low_noise = examples.timestep < TRAIN_TIMESTEPS / 2
        return Errors(squared[:, None], low_noise[:, None], flow.has_history(examples.frames))

    return errors


def build(run: RunConfig) -> Objective:
    """The objective of a run.

    Raises:
      UserError: the data or the model folder is missing or does not fit the transformer.
    """
    from helios_jax.training.validation import BASE_SCHEDULER

    return flow.build(run, make_errors, ModelIndex(), BASE_SCHEDULER)
