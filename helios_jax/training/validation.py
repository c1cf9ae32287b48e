"""What a training run shows and leaves behind: sample videos of fixed prompts, and the model in published layout."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from helios_jax import sharding
from helios_jax.config import ModelIndex, SchedulerConfig, TransformerConfig
from helios_jax.convert.export import export_pipeline
from helios_jax.convert.folder import ModelFolder, read_component_config
from helios_jax.convert.load import load_component
from helios_jax.convert.rules import param_dtype
from helios_jax.data import reader, shapes
from helios_jax.pipeline.pipeline import HeliosPipeline
from helios_jax.pipeline.placement import Placement
from helios_jax.training.config import require
from helios_jax.training.weights import TrainedWeights

PyTree = Any

# The one-stage schedule of Base: UniPC of order 2 with the exponential dynamic shift.
BASE_SCHEDULER = SchedulerConfig(stages=1, use_dynamic_shifting=True, time_shift_type="exponential")

# Clips whose captions are prompts of the validation.
_PROMPT_SEED = 2**63 + 2**41


def model_folder(model: str | Path, transformer: TransformerConfig, index: ModelIndex, scheduler: SchedulerConfig
                 ) -> ModelFolder:
    """The model that a run is making: a new transformer among the other components of ``model``.

    Args:
      model: folder with vae/, text_encoder/ and tokenizer/; whatever else it holds is not read.
      transformer: configuration of the transformer in training.
      index: pipeline class, its flags and the native size.
      scheduler: what the model is sampled with.

    Raises:
      UserError: a configuration is missing or not supported, VAE or text encoder are not made for the transformer, or
        there is no tokenizer.
    """
    root = Path(model)
    folder = ModelFolder(
        root=root, format="diffusers", index=index, transformer=transformer,
        vae=read_component_config(root / "vae", "vae"),
        text_encoder=read_component_config(root / "text_encoder", "text_encoder"), scheduler=scheduler)
    require(folder.vae.z_dim == transformer.in_channels, f"objective.model: the VAE of {root} makes latents of "
            f"{folder.vae.z_dim} channels, the transformer takes {transformer.in_channels}")
    require(folder.text_encoder.d_model == transformer.text_dim, f"objective.model: the text encoder of {root} makes "
            f"rows of width {folder.text_encoder.d_model}, the transformer takes {transformer.text_dim}")
    require((root / "tokenizer").is_dir(), f"objective.model: {root} has no tokenizer/")
    return folder


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How validation videos are made: number of frames, solver steps per section and pyramid level, guidance scale,
    seed of the noise, negative prompt, whether later chunks see the first frame."""

    num_frames: int
    steps: int
    guidance: float
    seed: int
    negative_prompt: str = ""
    keep_first_frame: bool = True


class Validator:
    """Samples with the parameters in training, on the mesh that is in use when it is made; compiled programs are kept
    from round to round.

    Args:
      folder: of :func:`model_folder`.
      unroll: layers per iteration of the transformer's scan.
      dtype: of the computation, 'float32' or 'bfloat16'; the VAE is float32.
    """

    def __init__(self, folder: ModelFolder, unroll: int, dtype: str = "float32"):
        self._folder, self._unroll, self._dtype = folder, unroll, jnp.dtype(dtype)
        self._partition = sharding.current()
        self._pipeline: HeliosPipeline | None = None

    def _make_pipeline(self, variables: PyTree) -> HeliosPipeline:
        dtypes = {"vae": jnp.float32, "text_encoder": self._dtype, "transformer": self._dtype}
        places = Placement(self._folder, dtypes, partition=self._partition).shardings()
        others = {name: load_component(self._folder.root / name, name, self._folder.config(name), dtypes[name],
                                       places[name])
                  for name in ("vae", "text_encoder")}
        return HeliosPipeline(self._folder, {**others, "transformer": variables["params"]}, dtype=self._dtype,
                              unroll=self._unroll, partition=self._partition)

    def videos(self, variables: PyTree, prompts: Sequence[str], sampling: Sampling) -> np.ndarray:
        """One video per prompt in one batch, uint8 [B, F, H, W, 3]; the same noise in every round.

        ``variables`` are the transformer's, ``{"params": ..., "lora": ...}``.
        """
        if self._pipeline is None:
            self._pipeline = self._make_pipeline(variables)
        self._pipeline.variables = variables
        seeds = [sampling.seed + i for i in range(len(prompts))]
        video = self._pipeline(prompts, num_frames=sampling.num_frames, steps=sampling.steps,
                               guidance_scale=sampling.guidance, seed=seeds, negative_prompt=sampling.negative_prompt,
                               keep_first_frame=sampling.keep_first_frame)
        # The transformer's buffers are donated to the next step: nobody may hold on to them.
        self._pipeline.variables = {}
        self._pipeline.params.pop("transformer", None)
        return np.rint(video * 255).astype(np.uint8)

    def named_videos(self, variables: PyTree, prompts: Sequence[str], sampling: Sampling) -> dict[str, np.ndarray]:
        """``Objective.sample``: the videos under names made of their prompts."""
        names = [f"{i}_{re.sub('[^a-z0-9]+', '-', p.lower())[:40].strip('-')}" for i, p in enumerate(prompts)]
        return dict(zip(names, self.videos(variables, prompts, sampling), strict=True))

    def reader_scores(self, variables: PyTree, count: int, sampling: Sampling) -> dict[str, float]:
        """``Objective.evaluate``: share of videos whose attributes the rule-based reader finds as asked.

        The prompts are captions of held-out combinations, but other ones than those of the final evaluation.
        """
        clips = [shapes.sample_clip(_PROMPT_SEED + i, "held_out", 1) for i in range(count)]
        videos = self.videos(variables, [clip.caption for clip in clips], sampling)
        score = reader.score([reader.read(video) for video in videos], [clip.attributes for clip in clips])
        return {"reader_all": score.all_fields, **{f"reader_{name}": rate for name, rate in score.per_field.items()}}


def make_export(folder: ModelFolder, dtype: str, weights: TrainedWeights, load_base: Callable[[], PyTree]
                ) -> Callable[[PyTree, str], None]:
    """``Objective.export``: the whole model as a folder that this library and diffusers load.

    A LoRA run's folder holds the merged transformer and, in ``lora/``, the adapters by themselves. All processes call
    it; parameters come from the mesh one after another, and only the first process keeps and writes them.

    Args:
      folder: of :func:`model_folder`.
      dtype: 'float32', 'float16' or 'bfloat16', of the stored transformer; the parameters that the original keeps in
        float32 stay so. VAE and text encoder keep the dtypes in which they are stored.
      weights: of the run.
      load_base: gives the parameters that the run does not train.
    """

    def export(params: PyTree, out: str) -> None:
        base = load_base()
        if base is not None:  # merged in the wider of the two types, so that sums are rounded once
            base = jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, dtype)), base)
        merged = jax.tree_util.tree_map_with_path(
            lambda path, leaf: sharding.gather(leaf.astype(
                param_dtype("transformer", tuple(key.key for key in path), jnp.dtype(dtype)))),
            weights.merged(params, base))
        if jax.process_index() == 0:
            components = {name: load_component(folder.root / name, name, folder.config(name))
                          for name in ("vae", "text_encoder")}
            configs = {name: folder.config(name) for name in ("transformer", "vae", "text_encoder")}
            export_pipeline(out, {"transformer": merged, **components}, configs, index=folder.index,
                            scheduler=folder.scheduler, tokenizer=folder.tokenizer, overwrite=True)
        weights.write_parts(params, Path(out) / "lora")

    return export
