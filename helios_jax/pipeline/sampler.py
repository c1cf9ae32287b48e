"""Denoising of one chunk as a few compiled programs, one per stage shape.

A program holds all steps of its stage. What changes from chunk to chunk (noise, history, prompt, the number of steps
of an amplified first chunk) is data, so nothing is compiled again after the first chunk.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
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
from helios_jax.models.transformer import HeliosTransformer, TextContext
from helios_jax.sharding import Partition

Array = jax.Array


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


class StageTables(NamedTuple):
    """The steps of one stage as data: padded to the run's largest step count, with the count beside them."""

    coefficients: solvers.Coefficients
    timesteps: np.ndarray  # [n_max] float32, what the transformer is given
    count: np.ndarray  # [] int32, steps to run


class ChunkSampler:
    """Denoises chunks with one transformer and one scheduler.

    Args:
      model: the transformer.
      scheduler: its configuration; ``stages`` sets the number of pyramid levels.
      plan: the run.
      height, width: pixel size; multiples of 16 * 2**(stages - 1).
      latent_channels: of the VAE.
      partition: the mesh to run on, or None.
    """

    def __init__(self, model: HeliosTransformer, scheduler: SchedulerConfig, plan: SamplingPlan, height: int,
                 width: int, latent_channels: int = 16, partition: Partition | None = None):
        self.model, self.scheduler, self.plan = model, scheduler, plan
        self.size = (height // 8, width // 8)
        self.channels = latent_channels
        self.stages = len(plan.steps)
        self._tables = {amplify: self._stage_tables(amplify) for amplify in {False, plan.amplify_first_chunk}}
        self._noise_shape = sharding.jit(partition, lambda x: pyramid.noise_pyramid(x, self.stages)[0])
        # Later stages enlarge their input, whose memory is then of no use to them.
        self._stage_programs = [sharding.jit(partition, functools.partial(self._stage, stage),
                                             donate_argnums=() if stage else 1) for stage in range(self.stages)]

    def schedules(self, amplify: bool = False) -> tuple[Schedule, ...]:
        """The schedules of every stage, in float64."""
        frames, (h, w) = self.plan.layout.chunk, self.size
        if self.stages == 1:
            tokens = latent_tokens(frames, h, w)
            return (make_schedule(self.scheduler, self.plan.steps[0], tokens=tokens, amplify=amplify),)
        return pyramid_schedules(self.scheduler, self.plan.steps, frames=frames, height=h, width=w, amplify=amplify)

    def _stage_tables(self, amplify: bool) -> list[StageTables]:
        tables = []
        for schedule, steps in zip(self.schedules(amplify), self.plan.steps, strict=True):
            largest = steps * (2 if self.plan.amplify_first_chunk else 1)
            pad = largest - schedule.num_steps
            coefficients = jax.tree.map(lambda c, pad=pad: np.pad(c, [(0, pad)] + [(0, 0)] * (c.ndim - 1)),
                                        solvers.solver_coefficients(self.scheduler, schedule))
            timesteps = np.pad(schedule.model_timesteps, (0, pad)).astype(np.float32)
            tables.append(StageTables(coefficients, timesteps, np.int32(schedule.num_steps)))
        return tables

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
        """One chunk of clean latents.

        Args:
          variables: of the transformer, ``{"params": ..., "lora": ...}``.
          drawn: noise of :meth:`draw`; the first array's memory is given up.
          chunk: its index in the video.
          text: context of the B prompts, followed by the B negative prompts where guidance is on ([2B]).
          history: [B, 19, h, w, C] float32; anchor: [B, 1, h, w, C].
        Returns: [B, 9, h, w, C] float32.
        """
        x, *blocks = drawn
        tables = self._tables[self.plan.amplify_first_chunk and chunk == 0]
        if self.stages > 1:
            x = self._noise_shape(x)  # full-resolution noise -> the lowest level's
        for stage, (program, block) in enumerate(zip(self._stage_programs, [None, *blocks], strict=True)):
            x = program(variables, x, block, text, history, anchor, tables[stage])
        return x

    def input_shapes(self, stage: int, batch: int) -> tuple[tuple[int, ...] | None, ...]:
        """Shapes of what one stage's program reads beside the text: latents, noise of the transition into the stage
        (None for the first), history, anchor; all float32."""
        frames, size = self.plan.layout.chunk, (*self.size, self.channels)
        h, w = (length // 2 ** (self.stages - 1 - stage) for length in self.size)
        before = 2 if stage else 1  # a later stage enlarges what the one before it made
        return ((batch, frames, h // before, w // before, self.channels),
                pyramid.block_noise_shape(batch, frames, h, w, self.channels) if stage else None,
                (batch, self.plan.layout.frames, *size), (batch, 1, *size))

    def trace(self, stage: int, variables: Mapping[str, Any], text: TextContext, inputs: Sequence[Any]
              ) -> jax.stages.Traced:
        """The program of one stage, to be counted or compiled; nothing runs.

        Args:
          stage: its index, lowest resolution first.
          variables, text: as for :meth:`denoise`; ``jax.ShapeDtypeStruct`` will do, here and in ``inputs``.
          inputs: arrays of :meth:`input_shapes`.
        """
        x, block, history, anchor = inputs
        return self._stage_programs[stage].trace(variables, x, block, text, history, anchor, self._tables[False][stage])

    def compiled_programs(self) -> int:
        """How many programs have been compiled so far."""
        return self._noise_shape._cache_size() + sum(program._cache_size() for program in self._stage_programs)

    def _stage(self, stage: int, variables: Mapping[str, Any], x: Array, block: Array | None, text: TextContext,
               history: Array, anchor: Array, tables: StageTables) -> Array:
        """All steps of one stage; compiled once per stage."""
        plan = self.plan
        if stage:
            x = pyramid.transition(x, block, stage_table(self.scheduler)[stage])
        tiers = plan.layout.split(history, anchor)
        tiers = jax.tree.map(lambda part: part.astype(self.model.dtype), tiers)
        # The history's tokens depend on neither the step nor the prompt.
        past = self.model.embed_history(variables, tiers)
        past = jnp.concatenate([past, past]) if plan.guided else past  # [B or 2B, S_history, C]

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

        def body(i: Array, state: solvers.SolverState) -> solvers.SolverState:
            v = velocity(state.sample, tables.timesteps[i])
            return solvers.step(solvers.row(tables.coefficients, i), state, v)

        return jax.lax.fori_loop(first, tables.count, body, state).sample
