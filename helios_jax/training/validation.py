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

from helios_jax.config import ModelIndex, SchedulerConfig, TransformerConfig
from helios_jax.convert.export import export_pipeline
from helios_jax.convert.folder import ModelFolder, read_component_config
from helios_jax.convert.load import load_component
from helios_jax.convert.rules import param_dtype
from helios_jax.data import reader, shapes
from helios_jax.pipeline.pipeline import HeliosPipeline

PyTree = Any

# The one-stage schedule of Base: UniPC of order 2 with the exponential dynamic shift.
BASE_SCHEDULER = SchedulerConfig(stages=1, use_dynamic_shifting=True, time_shift_type="exponential")

# Clips whose captions are prompts of the validation.
_PROMPT_SEED = 2**63 + 2**41


def base_folder(model: str | Path, transformer: TransformerConfig, native_size: tuple[int, int]) -> ModelFolder:
    """The model that a stage-1 run is making: a new transformer among the other components of ``model``.

    Args:
      model: folder with vae/, text_encoder/ and tokenizer/; whatever else it holds is not read.
      transformer: configuration of the transformer in training.
      native_size: (height, width) in pixels.

    Raises:
      UserError: a configuration is missing or not supported.
    """
    root = Path(model)
    return ModelFolder(
        root=root, format="diffusers", index=ModelIndex(native_size=native_size), transformer=transformer,
        vae=read_component_config(root / "vae", "vae"),
        text_encoder=read_component_config(root / "text_encoder", "text_encoder"), scheduler=BASE_SCHEDULER)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How validation videos are made: number of frames, solver steps per section, guidance scale, seed of the noise."""

    num_frames: int
    steps: int
    guidance: float
    seed: int


class Validator:
    """Samples with the parameters in training; compiled programs are kept from round to round.

    Args:
      folder: of :func:`base_folder`.
      unroll: layers per iteration of the transformer's scan.
    """

    def __init__(self, folder: ModelFolder, unroll: int):
        self._folder, self._unroll = folder, unroll
        self._others = {name: load_component(folder.root / name, name, folder.config(name), dtype=jnp.float32)
                        for name in ("vae", "text_encoder")}
        self._pipeline: HeliosPipeline | None = None

    def videos(self, params: PyTree, prompts: Sequence[str], sampling: Sampling) -> np.ndarray:
        """One video per prompt in one batch, uint8 [B, F, H, W, 3]; the same noise in every round."""
        if self._pipeline is None:
            self._pipeline = HeliosPipeline(self._folder, {**self._others, "transformer": params}, unroll=self._unroll)
        self._pipeline.variables = {"params": params}
        seeds = [sampling.seed + i for i in range(len(prompts))]
        video = self._pipeline(prompts, num_frames=sampling.num_frames, steps=sampling.steps,
                               guidance_scale=sampling.guidance, seed=seeds)
        # The transformer's buffers are donated to the next step: nobody may hold on to them.
        self._pipeline.variables, self._pipeline.params = {}, self._others
        return np.rint(video * 255).astype(np.uint8)

    def named_videos(self, params: PyTree, prompts: Sequence[str], sampling: Sampling) -> dict[str, np.ndarray]:
        """``Objective.sample``: the videos under names made of their prompts."""
        names = [f"{i}_{re.sub('[^a-z0-9]+', '-', p.lower())[:40].strip('-')}" for i, p in enumerate(prompts)]
        return dict(zip(names, self.videos(params, prompts, sampling), strict=True))

    def reader_scores(self, params: PyTree, count: int, sampling: Sampling) -> dict[str, float]:
        """``Objective.evaluate``: share of videos whose attributes the rule-based reader finds as asked.

        The prompts are captions of held-out combinations, but other ones than those of the final evaluation.
        """
        clips = [shapes.sample_clip(_PROMPT_SEED + i, "held_out", 1) for i in range(count)]
        videos = self.videos(params, [clip.caption for clip in clips], sampling)
        score = reader.score([reader.read(video) for video in videos], [clip.attributes for clip in clips])
        return {"reader_all": score.all_fields, **{f"reader_{name}": rate for name, rate in score.per_field.items()}}


def make_export(folder: ModelFolder, dtype: str) -> Callable[[PyTree, str], None]:
    """``Objective.export``: the whole model as a folder that this library and diffusers load.

    Args:
      folder: of :func:`base_folder`.
      dtype: 'float32', 'float16' or 'bfloat16', of the stored transformer; the parameters that the original keeps in
        float32 stay so. VAE and text encoder keep the dtypes in which they are stored.
    """

    def export(params: PyTree, out: str) -> None:
        components = {name: load_component(folder.root / name, name, folder.config(name))
                      for name in ("vae", "text_encoder")}
        params = jax.tree_util.tree_map_with_path(
            lambda path, leaf: np.asarray(leaf).astype(
                param_dtype("transformer", tuple(key.key for key in path), jnp.dtype(dtype))), params)
        configs = {name: folder.config(name) for name in ("transformer", "vae", "text_encoder")}
        export_pipeline(out, {"transformer": params, **components}, configs, index=folder.index,
                        scheduler=folder.scheduler, tokenizer=folder.tokenizer, overwrite=True)

    return export
