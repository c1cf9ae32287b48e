"""From a Mid model through its trajectories to a distilled model that diffusers and this library sample alike."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import sample
from helios_jax.convert.rules import flatten
from helios_jax.diffusion.noise import TorchGeneratorNoise
from helios_jax.pipeline.pipeline import HeliosPipeline
from helios_jax.text import PromptEmbedding
from helios_jax.tools import ode_pairs
from helios_jax.training.checkpoint import read_params
from helios_jax.training.config import run_config
from helios_jax.training.loop import train
from tests.oracles import channel_first, relative_error, with_block_noise
from tests.tiny_checkpoint import CONFIGS, write_tiny_checkpoint

pytestmark = pytest.mark.slow  # minutes of processor time, most of it compilation

PROMPTS = ("a red circle moving right", "the green triangle drifts left", "a blue square moves up")


@pytest.fixture(scope="module")
def mid(tmp_path_factory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("model") / "mid", "mid")


@pytest.fixture(scope="module")
def pairs(mid, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    with pytest.raises(SystemExit) as end:
        ode_pairs.main(["--model", str(mid), "--prompts", str(folder / "prompts.txt"), "--output", str(folder / "ode"),
                        "--sections", "2", "--steps", "3", "--shift-from", "previous", "--prompts-per-file", "2"])
    assert end.value.code == 0
    return folder / "ode"


def run_of(mid: Path, pairs: Path, num_steps: int, **objective):
    transformer = CONFIGS["transformer"].to_dict()
    return run_config({
        "objective": {
            "name": "stage3_ode", "data": str(pairs), "model": str(mid), "init_from": str(mid), "sections": 2,
            "transformer": {name: tuple(v) if isinstance(v, list) else v for name, v in transformer.items()},
            "export_dtype": "float32", "validation": {"items": 2, "batch_size": 2}, **objective,
        },
        "batch_size": 2, "num_steps": num_steps, "log_every": 1, "checkpoint_every": 2, "sample_every": num_steps,
        "tensorboard": False, "ema_decay": 0.99, "ema_start_step": 1,
        "optimizer": {"learning_rate": 0.003, "schedule": "constant", "clip_norm": 1.0},
    })


LORA = {"lora": {"rank": 2, "targets": ("all-linear", "patch_short", "patch_mid", "patch_long"),
                 "base_dtype": "float32"}}


@pytest.fixture(scope="module")
def distilled(mid, pairs, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("run")
    train(run_of(mid, pairs, 4, **LORA), workdir, print_line=lambda line: None)
    return workdir


def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(distilled, mid, pairs, tmp_path):
    train(run_of(mid, pairs, 2, **LORA), tmp_path, print_line=lambda line: None)
    train(run_of(mid, pairs, 4, **LORA), tmp_path, print_line=lambda line: None)
    for prefer_ema in (False, True):
        whole, resumed = (dict(flatten(read_params(folder, prefer_ema=prefer_ema))) for folder in (distilled, tmp_path))
        assert whole.keys() == resumed.keys()
        for path, leaf in whole.items():
            np.testing.assert_array_equal(leaf, resumed[path], err_msg=str(path))


def test_the_loss_on_fixed_examples_falls(mid, pairs, tmp_path):
    """All parameters are trained; the examples are those of the records."""
    run = dataclasses.replace(run_of(mid, pairs, 12), sample_every=4)
    train(run, tmp_path, print_line=lambda line: None)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["eval/loss"] for row in rows if "eval/loss" in row}
    assert losses.keys() == {4, 8, 12} and losses[4] > losses[8] > losses[12]
    np.testing.assert_allclose(losses[12], np.mean([rows[-1][f"eval/loss_level_{i}"] for i in range(3)]), rtol=1e-5)


def test_diffusers_and_this_library_sample_the_export_to_the_same_latents(distilled):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    ours = HeliosPipeline.from_pretrained(distilled / "export")
    assert ours.index.variant == "distilled" and ours.scheduler.is_dmd
    assert ours.scheduler.use_dynamic_shifting and ours.scheduler.time_shift_type == "linear"
    theirs = with_block_noise(diffusers.DiffusionPipeline.from_pretrained(distilled / "export", dtype=torch.float32))
    assert type(theirs).__name__ == "HeliosPyramidPipeline" and theirs.config.is_distilled
    assert type(theirs.scheduler).__name__ == "HeliosDMDScheduler"
    theirs.set_progress_bar_config(disable=True)
    embedding = np.array(ours.embed((PROMPTS[0],)).padded())
    for steps in (1, 2):
        want = theirs(prompt_embeds=torch.from_numpy(embedding), negative_prompt_embeds=torch.from_numpy(embedding),
                      height=64, width=64, num_frames=66, guidance_scale=1.0, is_amplify_first_chunk=True,
                      pyramid_num_inference_steps_list=[steps] * 3, generator=torch.Generator().manual_seed(7),
                      output_type="latent").frames
        chunks = ours.stream(PromptEmbedding.from_padded(embedding), num_frames=66, steps=steps,
                             noise=TorchGeneratorNoise(7))
        latents = channel_first(np.concatenate([np.asarray(chunk.latents) for chunk in chunks], axis=1))
        assert relative_error(latents, want.numpy()) < 1e-4


def test_the_command_line_samples_the_export(distilled, tmp_path):
    with pytest.raises(SystemExit) as end:
        sample.main(["--model", str(distilled / "export"), "--prompt", PROMPTS[0], "--num_frames", "33",
                     "--output", str(tmp_path / "video.mp4")])
    assert end.value.code == 0 and (tmp_path / "video.mp4").stat().st_size > 0
