"""Denoising of one chunk as a few compiled programs, one per stage shape.

A program holds all steps of its stage. What changes from chunk to chunk (noise, history, prompt, the number of steps
of an amplified first chunk) is data, so nothing is compiled again after the first chunk. On a GPU the number of steps
is compiled in: its runtime would wait for the device before every turn of a loop whose length is data.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from helios_jax import sharding
from helios_jax.config import ModelIndex, SchedulerConfig
from helios_jax.diffusion import guidance, noise, pyramid, solvers
from helios_jax.diffusion.history import HistoryLayout
from helios_jax.diffusion.noise import NoiseSource
from helios_jax.diffusion.schedules import Schedule, latent_tokens, make_schedule, pyramid_schedules, stage_table
from helios_jax.models.transformer import HeliosTransformer, HistoryContext, TextContext
from helios_jax.sharding import Partition

Array = jax.Array

# Platforms whose host follows a loop of unknown length.
COUNTED_LOOPS = ("gpu",)


@dataclasses.dataclass(frozen=True)
class SamplingPlan:
    """What is fixed for a whole run; a static argument of the compiled programs.

    Attributes:
      steps: denoising steps per stage, lowest resolution first; one entry for the one-stage Base model.
      guidance_scale: above 1 the model also runs on the negative prompt.
      cfg_zero_star: scale the unconditional velocity per sample (Mid).
      zero_steps: zero init, the velocity of stage 0 is zero for step indices up to this one; None for none.
      amplify_first_chunk: twice the steps for chunk 0 (Distilled).
      layout: frames of history and chunk.
    """

    steps: tuple[int, ...]
    guidance_scale: float = 1.0
    cfg_zero_star: bool = False
    zero_steps: int | None = None
    amplify_first_chunk: bool = False
    layout: HistoryLayout = HistoryLayout()

    @classmethod
    def for_model(cls, index: ModelIndex, *, steps: Sequence[int], guidance_scale: float, use_zero_init: bool = True,
                  zero_steps: int = 1, amplify_first_chunk: bool = True, layout: HistoryLayout | None = None
                  ) -> SamplingPlan:
        """Keeps of the options what the model's pipeline class makes use of."""
        zero_star = index.variant == "mid" and index.is_cfg_zero_star and guidance_scale > 1
        return cls(
            steps=tuple(steps),
            guidance_scale=float(guidance_scale),
            cfg_zero_star=zero_star,
            zero_steps=zero_steps if zero_star and use_zero_init else None,
            amplify_first_chunk=amplify_first_chunk and index.variant == "distilled",
            layout=layout or HistoryLayout(),
        )

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1


class ChunkSteps(NamedTuple):
    """The steps of one chunk: a schedule per stage and, where a run is observed, the indices of the steps whose input
    is kept, [k] per stage."""

    schedules: tuple[Schedule, ...]
    observed: tuple[np.ndarray, ...] | None = None


class StageTables(NamedTuple):
    """The steps of one stage as data: padded to the run's largest step count, with the count beside them."""

    coefficients: solvers.Coefficients
    timesteps: np.ndarray  # [n_max] float32, what the transformer is given
    count: np.ndarray  # [] int32, steps to run
    observed: np.ndarray  # [k_max] int32, steps whose input is kept; -1 for none


class StageResult(NamedTuple):
    """What a stage made: its last sample [B, T, h_i, w_i, C], and the inputs of the observed steps
    [k_max, B, T, h_i, w_i, C] (zeros where fewer were asked for); float32."""

    sample: Array
    observed: Array


class ChunkSampler:
    """Denoises chunks with one transformer and one scheduler.

    Args:
      model: the transformer.
      scheduler: its configuration; ``stages`` sets the number of pyramid levels.
      plan: the run.
      height, width: pixel size; multiples of 16 * 2**(stages - 1).
      latent_channels: of the VAE.
      own_steps: of the first chunk and of all others, in place of the plan's.
      partition: the mesh to run on, or None.
    """

    def __init__(self, model: HeliosTransformer, scheduler: SchedulerConfig, plan: SamplingPlan, height: int,
                 width: int, latent_channels: int = 16, *, own_steps: tuple[ChunkSteps, ChunkSteps] | None = None,
                 partition: Partition | None = None):
        self.model, self.scheduler, self.plan = model, scheduler, plan
        self.size = (height // 8, width // 8)
        self.channels = latent_channels
        self._on_mesh = partition is not None and partition.mesh.size > 1
        platform = jax.default_backend() if partition is None else partition.mesh.devices.flat[0].platform
        self._counted = platform in COUNTED_LOOPS
        self.stages = len(plan.steps)
        steps = own_steps or (ChunkSteps(self.schedules(plan.amplify_first_chunk)), ChunkSteps(self.schedules()))
        self._first_tables, self._tables = _stage_tables(scheduler, steps)
        self._noise_shape = sharding.jit(partition, lambda x: pyramid.noise_pyramid(x, self.stages)[0])
        self._history_program = sharding.jit(partition, self._past) if model.config.restrict_self_attn else None
        # Later stages enlarge their input, whose memory is then of no use to them.
        self._stage_programs = [sharding.jit(partition, functools.partial(self._stage, stage), static_argnums=8,
                                             donate_argnums=() if stage else 1) for stage in range(self.stages)]

    def schedules(self, amplify: bool = False) -> tuple[Schedule, ...]:
        """The schedules of every stage, in float64."""
        frames, (h, w) = self.plan.layout.chunk, self.size
        if self.stages == 1:
            tokens = latent_tokens(frames, h, w)
            return (make_schedule(self.scheduler, self.plan.steps[0], tokens=tokens, amplify=amplify),)
        return pyramid_schedules(self.scheduler, self.plan.steps, frames=frames, height=h, width=w, amplify=amplify)

    def draw(self, source: NoiseSource, chunk: int, batch: int) -> list[Array]:
        """All noise of one chunk, in the order in which the original draws it.

        Returns: per stage, the starting noise [B, 9, h, w, C] and the white noise [B, 9, y, x, C, 4] behind the block
          noise of each transition.
        """
        h, w = self.size
        frames = self.plan.layout.chunk
        drawn = [source.normal(noise.CHUNK, (chunk,), (batch, frames, h, w, self.channels))]
        for stage in range(1, self.stages):
            factor = 2 ** (self.stages - 1 - stage)
            shape = pyramid.block_noise_shape(batch, frames, h // factor, w // factor, self.channels)
            drawn.append(source.normal(noise.BLOCK, (chunk, stage), shape))
        return drawn

    def denoise(self, variables: Mapping[str, Any], drawn: Sequence[Array], chunk: int, text: TextContext,
                history: Array, anchor: Array) -> Array:
        """One chunk of clean latents, [B, 9, h, w, C] float32; arguments as :meth:`trajectory`."""
        return self.trajectory(variables, drawn, chunk, text, history, anchor)[-1].sample

    def trajectory(self, variables: Mapping[str, Any], drawn: Sequence[Array], chunk: int, text: TextContext,
                   history: Array, anchor: Array) -> list[StageResult]:
        """One chunk, with what every stage made of it; the last stage's sample is the clean latents.

        Args:
          variables: of the transformer, ``{"params": ..., "lora": ...}``.
          drawn: noise of :meth:`draw`; the first array's memory is given up.
          chunk: its index in the video.
          text: context of the B prompts, followed by the B negative prompts where guidance is on ([2B]).
          history: [B, 19, h, w, C] float32; anchor: [B, 1, h, w, C].
        """
        x, *blocks = drawn
        tables = self._tables if chunk else self._first_tables
        if self.stages > 1:
            x = self._noise_shape(x)  # full-resolution noise -> the lowest level's
        # Where the history sees itself alone, its keys and values serve all steps of all stages.
        past = self._history_program and self._history_program(variables, history, anchor)
        results = []
        for program, block, stage_tables in zip(self._stage_programs, [None, *blocks], tables, strict=True):
            results.append(program(variables, x, block, text, history, anchor, stage_tables, past,
                                   self._known_steps(stage_tables)))
            x = results[-1].sample
        return results

    def input_shapes(self, stage: int, batch: int) -> tuple[tuple[int, ...] | None, ...]:
        """Shapes of what one stage's program reads beside the text: latents, noise of the transition into the stage
        (None for the first), history, anchor; all float32."""
        frames, size = self.plan.layout.chunk, (*self.size, self.channels)
        h, w = (length // 2 ** (self.stages - 1 - stage) for length in self.size)
        before = 2 if stage else 1  # a later stage enlarges what the one before it made
        return ((batch, frames, h // before, w // before, self.channels),
                pyramid.block_noise_shape(batch, frames, h, w, self.channels) if stage else None,
                (batch, self.plan.layout.frames, *size), (batch, 1, *size))

    def _known_steps(self, tables: StageTables) -> int | None:
        return int(tables.count) if self._counted else None

    def trace(self, stage: int, variables: Mapping[str, Any], text: TextContext, inputs: Sequence[Any],
              tables: StageTables | None = None) -> jax.stages.Traced:
        """The program of one stage, to be counted or compiled; nothing runs.

        Args:
          stage: its index, lowest resolution first.
          variables, text: as for :meth:`denoise`; ``jax.ShapeDtypeStruct`` will do, here and in ``inputs``.
          inputs: arrays of :meth:`input_shapes`.
          tables: the stage's steps; default: those of every chunk but the first.
        """
        x, block, history, anchor = inputs
        tables = tables or self._tables[stage]
        past = self._history_program and jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=history.sharding),
            jax.eval_shape(self._history_program, variables, history, anchor))
        return self._stage_programs[stage].trace(variables, x, block, text, history, anchor, tables, past,
                                                 self._known_steps(tables))

    def lowerings(self, variables: Mapping[str, Any], text: TextContext, batch: int, place: jax.sharding.Sharding | None
                  ) -> list[Callable[[], jax.stages.Lowered]]:
        """Functions that trace the programs of a chunk exactly as :meth:`denoise` calls them; compiled, they serve it.

        Args:
          variables, text: as for :meth:`trace`.
          batch: videos of one program.
          place: where text, history, anchor and what programs make lie; None where nothing is bound to a device. (JAX
            compiles anew for an array that is bound to one where the array before was not. Noise is not.)
        """
        def array(shape: tuple[int, ...] | None, place: jax.sharding.Sharding | None) -> jax.ShapeDtypeStruct | None:
            return shape and jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)

        def stage(index: int, tables: StageTables) -> jax.stages.Lowered:
            x, block, history, anchor = self.input_shapes(index, batch)
            is_made = index > 0 or (self.stages > 1 and self._on_mesh)  # by a program whose result has a place
            inputs = [array(x, place if is_made else None), array(block, None)]
            inputs += [array(history, place), array(anchor, place)]
            return self.trace(index, variables, text, inputs, tables).lower()

        noise_shape = (batch, self.plan.layout.chunk, *self.size, self.channels)
        _, _, *past = (array(shape, place) for shape in self.input_shapes(0, batch))
        first = [(index, tables) for index, tables in enumerate(self._first_tables)
                 if self._known_steps(tables) != self._known_steps(self._tables[index])]
        found = [functools.partial(stage, *of_stage) for of_stage in (*enumerate(self._tables), *first)]
        if self.stages > 1:
            found.append(lambda: self._noise_shape.lower(array(noise_shape, None)))
        if self._history_program:
            found.append(lambda: self._history_program.lower(variables, *past))
        return found

    def compiled_programs(self) -> int:
        """How many programs have been compiled so far."""
        programs = [self._noise_shape, *self._stage_programs, *filter(None, [self._history_program])]
        return sum(program._cache_size() for program in programs)

    def _past(self, variables: Mapping[str, Any], history: Array, anchor: Array) -> Array | HistoryContext:
        """What the transformer is given of the past: tokens [B or 2B, S_history, C], or their keys and values."""
        tiers = self.plan.layout.split(history, anchor)
        tiers = jax.tree.map(lambda part: part.astype(self.model.dtype), tiers)
        if self.model.config.restrict_self_attn:
            context = self.model.history_context(variables, tiers, self.plan.layout.indices())
            return jax.tree.map(lambda x: jnp.concatenate([x, x], axis=1), context) if self.plan.guided else context
        tokens = self.model.embed_history(variables, tiers)
        return jnp.concatenate([tokens, tokens]) if self.plan.guided else tokens

    def _stage(self, stage: int, variables: Mapping[str, Any], x: Array, block: Array | None, text: TextContext,
               history: Array, anchor: Array, tables: StageTables, past: HistoryContext | None, steps: int | None
               ) -> StageResult:
        """All steps of one stage; compiled once per stage and known number of steps (None where it is data)."""
        plan = self.plan
        if stage:
            x = pyramid.transition(x, block, stage_table(self.scheduler)[stage])
        if past is None:  # tokens depend on neither the step nor the prompt
            past = self._past(variables, history, anchor)

        def velocity(sample: Array, timestep: Array) -> Array:
            batch = sample.shape[0]
            latents = sample.astype(self.model.dtype)
            if plan.guided:  # conditional and unconditional in one batch
                latents = jnp.concatenate([latents, latents])
            v = self.model.apply(variables, latents, jnp.full(latents.shape[0], timestep), text, past,
                                 history_size=self.size, indices=plan.layout.indices())
            if not plan.guided:
                return v
            guide = guidance.cfg_zero_star if plan.cfg_zero_star else guidance.classifier_free_guidance
            return guide(v[:batch], v[batch:], plan.guidance_scale)

        state = solvers.init_state(x, tables.coefficients.memory)
        first = 0
        if plan.zero_steps is not None:
            # Zero init: the network's result would be thrown away, so it does not run.
            while first < plan.steps[stage] and guidance.is_zero_init_step(stage, first, plan.zero_steps):
                state = solvers.step(solvers.row(tables.coefficients, first), state, jnp.zeros_like(state.sample))
                first += 1

        def body(i: Array, carry: tuple[solvers.SolverState, Array]) -> tuple[solvers.SolverState, Array]:
            state, observed = carry
            here = (tables.observed == i).reshape(-1, *[1] * state.sample.ndim)  # [k, 1, ...]
            observed = jnp.where(here, state.sample, observed)
            v = velocity(state.sample, tables.timesteps[i])
            return solvers.step(solvers.row(tables.coefficients, i), state, v), observed

        nothing = jnp.zeros((len(tables.observed), *state.sample.shape), jnp.float32)
        last = tables.count if steps is None else steps
        state, observed = jax.lax.fori_loop(first, last, body, (state, nothing))
        return StageResult(state.sample, observed)


def _stage_tables(scheduler: SchedulerConfig, chunks: Sequence[ChunkSteps]) -> list[list[StageTables]]:
    """The tables of every stage, for each of several kinds of chunks that share the programs and so the shapes."""
    stages = range(len(chunks[0].schedules))
    largest = [max(chunk.schedules[stage].num_steps for chunk in chunks) for stage in stages]
    observed = [[np.asarray(chunk.observed[stage] if chunk.observed else (), np.int32) for stage in stages]
                for chunk in chunks]
    most = [max(len(kept[stage]) for kept in observed) for stage in stages]

    def tables(schedule: Schedule, kept: np.ndarray, stage: int) -> StageTables:
        pad = largest[stage] - schedule.num_steps
        coefficients = jax.tree.map(lambda c: np.pad(c, [(0, pad)] + [(0, 0)] * (c.ndim - 1)),
                                    solvers.solver_coefficients(scheduler, schedule))
        timesteps = np.pad(schedule.model_timesteps, (0, pad)).astype(np.float32)
        return StageTables(coefficients, timesteps, np.int32(schedule.num_steps),
                           np.pad(kept, (0, most[stage] - len(kept)), constant_values=-1))

    return [[tables(chunk.schedules[stage], kept[stage], stage) for stage in stages]
            for chunk, kept in zip(chunks, observed, strict=True)]
