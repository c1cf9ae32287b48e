"""A model folder of random components and latents made with it, for runs of the trainer through its real doors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from helios_jax.config import ModelIndex, TextEncoderConfig, TransformerConfig, VAEConfig
from helios_jax.convert.export import export_pipeline
from helios_jax.data import build_latents
from helios_jax.diffusion.history import HistoryLayout
from helios_jax.models.umt5 import UMT5Encoder
from helios_jax.models.vae import WanVAE
from helios_jax.training import flow
from helios_jax.training.config import RunConfig
from helios_jax.training.loop import train
from helios_jax.training.metrics import VideoFileWriter
from helios_jax.training.validation import BASE_SCHEDULER
from helios_jax.training.weights import FullTraining

ROOT = Path(__file__).resolve().parents[1]


def write_model_folder(folder: Path, transformer: TransformerConfig | None = None,
                       params: Mapping[str, Any] | None = None) -> Path:
    """Random VAE and text encoder, the tokenizer of the model in the box, and a transformer only if one is given."""
    vae = VAEConfig(base_dim=4, num_res_blocks=1)
    text = TextEncoderConfig(vocab_size=1024, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    video = np.zeros((1, 5, 16, 16, 3), np.float32)
    components = {"vae": jax.jit(lambda key: WanVAE(vae).init(key, video)["params"])(jax.random.key(0)),
                  "text_encoder": jax.jit(UMT5Encoder(text).init_params)(jax.random.key(1))}
    configs = {"vae": vae, "text_encoder": text}
    if transformer is not None:
        components["transformer"], configs["transformer"] = params, transformer
    export_pipeline(folder, components, configs, index=ModelIndex(), scheduler=BASE_SCHEDULER,
                    tokenizer=ROOT / "assets/helios-tiny/tokenizer")
    return folder


def write_latents(folder: Path, model: Path, size: tuple[int, int]) -> Path:
    """Records of five clips of two sections at ``size`` (height, width) pixels, in two files."""
    with pytest.raises(SystemExit) as end:
        build_latents.main(["--model", str(model), "--output", str(folder), "--clips", "5", "--sections", "2",
                            "--phrasings", "2", "--files", "2", "--height", str(size[0]), "--width", str(size[1])])
    assert end.value.code == 0
    return folder


def train_keeping_frames(run: RunConfig, workdir: Path) -> None:
    """Trains; the frames of the last sample stand in ``frames.npy``, without the loss of the video codec."""
    write = VideoFileWriter.video

    def keep_exact_frames(self, step, name, frames, fps):
        np.save(workdir / "frames.npy", frames)
        write(self, step, name, frames, fps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VideoFileWriter, "video", keep_exact_frames)
        train(run, workdir, print_line=lambda line: None)


def loss_of(stage, config, model):
    """The loss of full training, of a stage's module."""
    return flow.make_loss(config, stage.make_errors(config, HistoryLayout(), model, FullTraining(model)))
