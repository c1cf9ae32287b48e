"""Stage 1 through its real doors: latents built, a model trained, sampled, resumed, exported and loaded again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from helios_jax.data.encoders import encoders
from helios_jax.data.pipeline import LatentFolder
from helios_jax.data.records import decode_record
from helios_jax.errors import UserError
from helios_jax.pipeline.pipeline import HeliosPipeline
from helios_jax.training import stage1
from helios_jax.training.checkpoint import read_params
from helios_jax.training.config import run_config
from helios_jax.training.loop import train
from tests.tiny_training import train_keeping_frames, write_latents, write_model_folder

PROMPT = "a red circle moves right over a dark background"
SIZE = (32, 64)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("model") / "random")


@pytest.fixture(scope="module")
def latents(model, tmp_path_factory) -> Path:
    return write_latents(tmp_path_factory.mktemp("latents"), model, SIZE)


def run_of(model: Path, latents: Path):
    return run_config({
        "objective": {
            "name": "stage1", "data": str(latents), "model": str(model), "unroll": 0, "export_dtype": "float32",
            "transformer": {"num_attention_heads": 2, "attention_head_dim": 8, "rope_dim": (4, 2, 2), "text_dim": 8,
                            "freq_dim": 8, "ffn_dim": 16, "num_layers": 2},
            "sample": {"prompts": (PROMPT,), "num_frames": 20, "steps": 2, "guidance": 3.0, "reader_prompts": 1,
                       "reader_frames": 20},
            "validation": {"items": 3, "batch_size": 3},
        },
        "batch_size": 3, "num_steps": 4, "log_every": 1, "checkpoint_every": 2, "sample_every": 4, "tensorboard": False,
        "optimizer": {"learning_rate": 0.01, "name": "muon"},
    })


@pytest.fixture(scope="module")
def finished(model, latents, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("run")
    train_keeping_frames(run_of(model, latents), workdir)
    return workdir


def rows(workdir: Path) -> list[dict]:
    keep = ("step", "loss", "grad_norm", "loss_with_history", "learning_rate")
    return [{key: row[key] for key in keep} for row in map(json.loads, open(workdir / "metrics.jsonl"))  # noqa: SIM115
            if "loss" in row]


def test_latents_are_those_of_the_vae_and_captions_those_of_the_encoder(model, latents):
    from helios_jax.data import shapes

    folder = LatentFolder.open(latents)
    assert (folder.frames, folder.height, folder.width, folder.channels) == (9, 4, 8, 16)
    encode_video, encode_text, _ = encoders(model)
    record = decode_record(folder.source()[3])
    clip = shapes.sample_clip(record.info["seed"], "train", 66, *SIZE)
    second = np.repeat(clip.frames[None, 33:], 4, axis=0)  # a section knows nothing of the one before it
    mean, std = encode_video(second)
    np.testing.assert_allclose(record.mean[1], mean[0], atol=2e-3)
    np.testing.assert_allclose(record.std[1], std[0], rtol=2e-3)
    text, length = record.caption_rows(1, folder.text_rows)
    np.testing.assert_allclose(text[:length], encode_text([record.captions[1]])[0], atol=2e-3)
    empty, length = folder.empty_prompt()
    np.testing.assert_allclose(empty[:length], encode_text([""])[0], atol=2e-3)


def test_a_run_leaves_samples_scores_and_a_model_that_makes_the_same_video(finished, model):
    import av

    (video,) = (finished / "samples").iterdir()
    assert video.name == "00000004_0_a-red-circle-moves-right-over-a-dark-bac.mp4"
    with av.open(str(video)) as container:
        assert [(frame.height, frame.width) for frame in container.decode(video=0)] == [SIZE] * 20
    scores = [row for row in map(json.loads, (finished / "metrics.jsonl").read_text().splitlines())
              if "eval/reader_all" in row]
    assert [row["step"] for row in scores] == [4] and 0 <= scores[0]["eval/reader_colour"] <= 1
    assert 0 < scores[0]["eval/loss"] < 10 and scores[0]["eval/loss_with_history"] > 0

    pipeline = HeliosPipeline.from_pretrained(finished / "export")
    assert pipeline.index.native_size == SIZE and pipeline.index.variant == "base"
    again = pipeline(PROMPT, num_frames=20, steps=2, guidance_scale=3.0, seed=42)[0]
    assert np.abs(again * 255 - np.load(finished / "frames.npy").astype(float)).max() < 0.51
    average = read_params(finished)  # what was exported is the average, not the last parameters
    np.testing.assert_array_equal(pipeline.params["transformer"]["proj_out"]["kernel"], average["proj_out"]["kernel"])


def test_stage1_resumes_bitwise_equal(finished, model, latents, tmp_path):
    shutil.copytree(finished, tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/checkpoints/4")
    lines = []
    train(run_of(model, latents), tmp_path / "resumed", print_line=lines.append)
    assert "resumed from step 2" in lines[0]
    assert rows(tmp_path / "resumed") == rows(finished) and len(rows(finished)) == 4
    for average in (False, True):
        jax.tree.map(np.testing.assert_array_equal, read_params(tmp_path / "resumed", prefer_ema=average),
                     read_params(finished, prefer_ema=average))


def test_a_run_starts_from_an_exported_transformer_and_from_no_other(finished, model, latents):
    run = run_of(model, latents)
    objective = stage1.build(replace(run, objective=replace(run.objective, init_from=str(finished / "export"))))
    started = objective.load_params(jax.eval_shape(objective.init_params, jax.random.key(0)))
    jax.tree.map(np.testing.assert_array_equal, started, read_params(finished))
    wider = replace(run.objective.transformer, ffn_dim=24)
    with pytest.raises(UserError, match="objective.init_from.*other sizes"):
        stage1.build(replace(run, objective=replace(run.objective, init_from=str(finished / "export"),
                                                    transformer=wider)))
