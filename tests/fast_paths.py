"""The plain path of sampling, and runs of the models in the box that both paths make; see test_fast_paths.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from helios_jax.models.transformer import TextRows
from helios_jax.pipeline.pipeline import HeliosPipeline
from helios_jax.pipeline.sampler import ChunkSampler, SamplingPlan
from helios_jax.sharding import MeshConfig
from kernels.attention import reference

ASSETS = Path(__file__).resolve().parents[1] / "assets"
LENGTH_AND_SEED = {"num_frames": 66, "seed": 5}
PROMPT = "a red circle moving right on a dark background"


class Run(NamedTuple):
    """Two chunks of a model in the box: the second sees history and anchor of the first.

    restricted: its history attends to itself only, which Base was not trained for.
    """

    model: str
    options: dict[str, Any]
    restricted: bool = False


# Sizes that are odd multiples of the smallest allowed one. The Distilled model's lowest level has 3 x 1 tokens a frame,
# the Base model 3 x 5, with guidance.
_BASE = {"height": 48, "width": 80, "steps": 2, "guidance_scale": 3.0}
RUNS = {
    "distilled": Run("helios-tiny-distilled", {"height": 192, "width": 64, "steps": (1, 1, 1)}),
    "base": Run("helios-tiny", _BASE),
    "restricted": Run("helios-tiny", _BASE, restricted=True),
}
# By name; five divides the five heads of the models in the box. With guidance, data divides the two samples.
MESHES = {"context": MeshConfig(context=5), "tensor": MeshConfig(tensor=5), "data": MeshConfig(data=2)}
SHARDED = [*(("base", mesh, dtype) for mesh in MESHES for dtype in ("float32", "bfloat16")),
           ("distilled", "context", "float32"), ("restricted", "context", "float32")]


class PlainPipeline(HeliosPipeline):
    """Everything anew in every step, from the prompt's rows and the history's latents; every block makes something of
    every token; attention is its formula; one loop over stacked layers (with ``unroll=1``).

    Attributes:
      text_once, history_once: to be set for what is then kept, as in any other pipeline.
    """

    text_once = history_once = False

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.change(for_sampling=False, attention=reference.attention)

    def change(self, **fields: Any) -> None:
        """Other fields of the transformer."""
        self.transformer = dataclasses.replace(self.transformer, **fields)

    def context(self, embedding: Any) -> Any:
        if self.text_once:
            return super().context(embedding)
        return TextRows(*self.transformer.text_rows(self.variables, embedding.rows, embedding.lengths,
                                                    embedding.total_rows))

    def sampler(self, plan: SamplingPlan, height: int, width: int) -> ChunkSampler:
        sampler = super().sampler(plan, height, width)
        if not self.history_once:
            def latents(variables: Any, history: jax.Array, anchor: jax.Array) -> Any:
                tiers = plan.layout.split(history, anchor)
                return jax.tree.map(lambda x: jnp.concatenate([x] * (1 + plan.guided)).astype(self.transformer.dtype),
                                    tiers)
            sampler._past, sampler._history_program = latents, None
        return sampler


def load(run: Run, dtype: str, kind: type[HeliosPipeline] = HeliosPipeline, with_frames: bool = False, **options: Any
         ) -> HeliosPipeline:
    """A pipeline for a run; options as for ``from_pretrained``. Without frames it makes one pixel in the VAE's place,
    whose programs take long to compile."""
    pipeline = kind.from_pretrained(ASSETS / run.model, dtype=dtype, **options)
    if run.restricted:
        config = dataclasses.replace(pipeline.transformer.config, restrict_self_attn=True)
        pipeline.transformer = dataclasses.replace(pipeline.transformer, config=config)
    if not with_frames:
        pipeline._decode = jax.jit(lambda params, latents: jnp.zeros((1, 33, 1, 1, 3)))
    return pipeline


def latents_of(pipeline: HeliosPipeline, run: Run, **options: Any) -> np.ndarray:
    """Both chunks' latents, float32 [2, 1, 9, h, w, 16]."""
    chunks = pipeline.stream(PROMPT, **LENGTH_AND_SEED, **run.options, **options)
    return np.stack([np.asarray(chunk.latents) for chunk in chunks])


class Stage(NamedTuple):
    """One stage of one chunk of one video: the latents it began with, history and anchor; what it made."""

    inputs: tuple[np.ndarray, np.ndarray, np.ndarray]
    made: np.ndarray


def stages_of(pipeline: HeliosPipeline, run: Run, begun: Sequence[Stage] = (), videos: int = 4, **options: Any
              ) -> list[Stage]:
    """All stages of several videos' two chunks, once per pipeline; with ``begun`` each begins with the inputs of that
    one, in place of what the stage and the chunk before it made here."""
    found: list[Stage] = []

    def watched(program: Callable[..., Any]) -> Callable[..., Any]:
        def call(variables: Any, x: jax.Array, block: Any, text: Any, history: jax.Array, anchor: jax.Array,
                 *others: Any) -> Any:
            inputs = begun[len(found)].inputs if begun else tuple(np.array(given) for given in (x, history, anchor))
            result = program(variables, inputs[0], block, text, *inputs[1:], *others)
            found.append(Stage(inputs, np.asarray(result.sample)))
            return result
        return call

    several = {**LENGTH_AND_SEED, "seed": [LENGTH_AND_SEED["seed"] + i for i in range(videos)]}
    stream = pipeline.stream([PROMPT] * videos, **several, **run.options, **options)
    stream._sampler._stage_programs = [watched(program) for program in stream._sampler._stage_programs]
    list(stream)
    return found
