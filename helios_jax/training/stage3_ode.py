"""Stage 3, first part: the student regresses where its teacher's trajectories end (ODE initialisation).

A record holds the teacher's states x_j at the steps of the student's few-step grid and the end y of every pyramid
level (:mod:`helios_jax.data.ode_records`). Of each record K sections are chosen, and of each level of these one step:

    loss = weight * mean over sections and levels of 1/2 mean((x_j - sigma_j v(x_j, t_j, history, prompt) - y)^2)

y is the end of the level, with noise left in it for all levels but the last. History and anchor are the teacher's own
results, clean; prompts are never dropped, and there is no guidance: the trajectories contain it. Sections are
independent of one another once the history is known, so they stand along the batch axis, and every level is one call
of the model for all of them.

The result is a distilled model: three levels, few steps with the DMD solver, no guidance. Samples during training are
made so (the original's are made with the teacher's solver and understate the student).

Source: specification of training stage 3, section 3.2.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from helios_jax.config import ModelIndex
from helios_jax.data.ode_records import OdeFolder, ode_items
from helios_jax.data.pipeline import MakeItem, record_dataset
from helios_jax.diffusion.few_step import student_scheduler, x0
from helios_jax.diffusion.history import HistoryLayout
from helios_jax.models.transformer import HeliosTransformer
from helios_jax.training import flow
from helios_jax.training.config import RunConfig, require
from helios_jax.training.flow import Context, Data, Errors, ModelConfig, SampleConfig
from helios_jax.training.objective import Objective
from helios_jax.training.stage2 import level_velocities
from helios_jax.training.weights import TrainedWeights


@dataclasses.dataclass(frozen=True)
class Config(ModelConfig):
    """Settings of the objective; the others are those of :class:`helios_jax.training.flow.ModelConfig`.

    ``data`` is written by :mod:`helios_jax.tools.ode_pairs`.

    Attributes:
      sections: K, sections chosen of each record.
      weight: of the loss.
      levels: pyramid levels of the records.
      level_weights: of each level's errors besides, as in :class:`helios_jax.training.stage2.Config`.
    """

    sample: SampleConfig = SampleConfig(steps=2, guidance=1.0)
    sections: int = 3
    weight: float = 80.0
    levels: int = 3
    level_weights: tuple[float, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        for field in ("sections", "weight", "levels"):
            require(getattr(self, field) > 0, f"objective.{field}: must be positive, got {getattr(self, field)}")
        flow.checked_level_weights(self.level_weights, self.levels)
        require(self.sample.guidance <= 1,
                f"objective.sample.guidance: a distilled model is sampled without (1), got {self.sample.guidance}")

    @property
    def entries(self) -> tuple[int, ...]:
        return tuple(range(self.levels))


def make_errors(config: Config, layout: HistoryLayout, model: HeliosTransformer,
                weights: TrainedWeights) -> flow.ErrorFunction:
    """The weighted errors of a batch, see :data:`helios_jax.training.flow.ErrorFunction`; a row per chosen section.

    The batch is that of :func:`helios_jax.data.ode_records.ode_item`; it holds every random choice, so the keys are
    not used.
    """
    level_weights = flow.checked_level_weights(config.level_weights, config.levels)

    def errors(params, frozen, batch: dict[str, jax.Array], keys: jax.Array) -> Errors:
        del keys
        text, length = (jnp.repeat(batch[name], config.sections, axis=0) for name in ("text", "text_length"))
        merged = {name: array.reshape(-1, *array.shape[2:])  # [B, K, ...] -> [B K, ...]
                  for name, array in batch.items() if name not in ("text", "text_length")}
        noisy = [merged[f"noisy_{level}"] for level in config.entries]
        velocities = level_velocities(
            model, weights.variables(params, frozen), layout, Context(merged["frames"], text, length),
            [(x[:, None], merged["timestep"][:, level, None]) for level, x in enumerate(noisy)])
        squared = []
        for level, (x, velocity) in enumerate(zip(noisy, velocities, strict=True)):
            end = x0(velocity[:, 0], x, merged["sigma"][:, level])  # [B K, 9, h_i, w_i, C]
            weight = 0.5 * config.weight * level_weights[level]
            squared.append(weight * jnp.square(end - merged[f"end_{level}"]).mean((1, 2, 3, 4)))
        return Errors(jnp.stack(squared, axis=1), merged["sigma"] < 0.5, flow.has_history(merged["frames"]))

    return errors


def build(run: RunConfig) -> Objective:
    """The objective of a run.

    Raises:
      UserError: the data or a model folder is missing or does not fit the transformer or the number of levels.
    """
    config: Config = run.objective
    folder = OdeFolder.open(config.data)
    require(len(folder.stage_range) == config.levels + 1,
            f"objective.levels: {config.data} has {len(folder.stage_range) - 1}, got {config.levels}")

    def make_data(run: RunConfig, layout: HistoryLayout) -> Data:
        def items(one: OdeFolder) -> MakeItem:
            for field in ("stage_range", "gamma", "shift_from"):
                wanted, found = getattr(folder, field), getattr(one, field)
                require(found == wanted, f"objective.validation.data: {one.root} was sampled with {field}={found}, the "
                        f"training data with {wanted}")
            return ode_items(one, layout, config.sections)

        dataset = record_dataset(folder, items(folder), run.batch_size, run.seed, config.threads)
        return Data(folder, folder.text_rows, items, dataset, {})

    index = ModelIndex("HeliosPyramidPipeline", "HeliosDMDScheduler", is_distilled=True)
    scheduler = student_scheduler(config.levels, folder.stage_range, folder.gamma)
    return flow.build(run, make_errors, index, scheduler, make_data)
