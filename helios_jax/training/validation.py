"""What a training run shows and leaves behind: sample videos of fixed prompts, and the model in published layout."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from helios_jax.config import ModelIndex, SchedulerConfig, TransformerConfig
from helios_jax.convert import export_pipeline, load_component
from helios_jax.convert.folder import ModelFolder, read_component_config
from helios_jax.pipeline.pipeline import HeliosPipeline

PyTree = Any

# The one-stage schedule of Base: UniPC of order 2 with the exponential dynamic shift.
BASE_SCHEDULER = SchedulerConfig(stages=1, use_dynamic_shifting=True, time_shift_type="exponential")


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


def _frozen_params(folder: ModelFolder) -> dict[str, PyTree]:
    return {name: load_component(folder.root / name, name, folder.config(name), dtype=jnp.float32)
            for name in ("vae", "text_encoder")}


def make_sampler(folder: ModelFolder, prompts: tuple[str, ...], *, num_frames: int, steps: int, guidance: float,
                 seed: int, unroll: int) -> Callable[[PyTree, int], dict[str, np.ndarray]]:
    """``Objective.sample``: one video per prompt, all in one batch, with the same noise in every round.

    Args:
      folder: of :func:`base_folder`.
      prompts: what the videos shall show; their names are made of them.
      num_frames, steps, guidance, seed: of the sampling.
      unroll: layers per iteration of the transformer's scan.
    """
    others = _frozen_params(folder)
    names = [f"{i}_{re.sub('[^a-z0-9]+', '-', prompt.lower())[:40].strip('-')}" for i, prompt in enumerate(prompts)]
    pipeline = None

    def sample(params: PyTree, step: int) -> dict[str, np.ndarray]:
        nonlocal pipeline
        del step
        if pipeline is None:  # compiled programs are kept from round to round
            pipeline = HeliosPipeline(folder, {**others, "transformer": params}, unroll=unroll)
        pipeline.variables = {"params": params}
        video = pipeline(prompts, num_frames=num_frames, steps=steps, guidance_scale=guidance, seed=seed)
        frames = np.rint(video * 255).astype(np.uint8)  # [B, F, H, W, 3]
        pipeline.variables = {}  # the parameters are donated to the next step
        return dict(zip(names, frames, strict=True))

    return sample


def make_export(folder: ModelFolder, dtype: str) -> Callable[[PyTree, str], None]:
    """``Objective.export``: the whole model as a folder that this library and diffusers load.

    Args:
      folder: of :func:`base_folder`.
      dtype: 'float32', 'float16' or 'bfloat16', of the stored transformer. VAE and text encoder keep the dtypes in
        which they are stored.
    """

    def export(params: PyTree, out: str) -> None:
        components = {name: load_component(folder.root / name, name, folder.config(name))
                      for name in ("vae", "text_encoder")}
        params = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.dtype(dtype)), params)
        configs = {name: folder.config(name) for name in ("transformer", "vae", "text_encoder")}
        export_pipeline(out, {"transformer": params, **components}, configs, index=folder.index,
                        scheduler=folder.scheduler, tokenizer=folder.tokenizer, overwrite=True)

    return export
