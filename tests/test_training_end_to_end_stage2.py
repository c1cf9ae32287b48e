"""Stage 2 through its real doors: from a model of stage 1 to a Mid model, with adapters and with all parameters."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from helios_jax.config import TransformerConfig
from helios_jax.convert.load import load_component
from helios_jax.convert.rules import abstract_params, flatten
from helios_jax.errors import UserError
from helios_jax.lora import merge, read_lora
from helios_jax.pipeline.pipeline import HeliosPipeline
from helios_jax.training import stage2
from helios_jax.training.checkpoint import read_params
from helios_jax.training.config import run_config
from helios_jax.training.loop import train
from tests.tiny_training import train_keeping_frames, write_latents, write_model_folder

pytestmark = pytest.mark.slow  # five minutes of processor time, most of it compilation

PROMPT = "a red circle moves right over a dark background"
SIZE = (64, 64)  # latents 8x8: the levels are 2x2, 4x4 and 8x8, so the smallest is one token per frame
SHAPE = {"num_attention_heads": 2, "attention_head_dim": 8, "rope_dim": (4, 2, 2), "text_dim": 8, "freq_dim": 8,
         "ffn_dim": 16, "num_layers": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A Base model of random components."""
    config, rng = TransformerConfig(**SHAPE), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: (0.1 * rng.standard_normal(leaf.shape)).astype(np.float32),
                          abstract_params("transformer", config))
    return write_model_folder(tmp_path_factory.mktemp("model") / "base", config, params)


@pytest.fixture(scope="module")
def latents(base, tmp_path_factory) -> Path:
    return write_latents(tmp_path_factory.mktemp("latents"), base, SIZE)


def run_of(base: Path, latents: Path, objective: dict, **more):
    return run_config({
        "objective": {
            "name": "stage2", "data": str(latents), "model": str(base), "init_from": str(base), "transformer": SHAPE,
            "export_dtype": "float32", "validation": {"items": 4, "batch_size": 2}, **objective,
        },
        "batch_size": 2, "num_steps": 2, "log_every": 1, "checkpoint_every": 1, "sample_every": 1, "tensorboard": False,
        "optimizer": {"learning_rate": 0.01}, **more,
    })


def lora_run(base: Path, latents: Path):
    return run_of(base, latents, {
        "lora": {"rank": 2, "alpha": 4.0, "targets": ("all-linear", "patch_embedding"), "full": ("patch_short",),
                 "base_dtype": "float32"},
        "sample": {"prompts": (PROMPT,), "num_frames": 33, "steps": 3, "guidance": 3.0},
    }, sample_every=2)


@pytest.fixture(scope="module")
def adapted(base, latents, tmp_path_factory) -> Path:
    """A finished LoRA run; the frames of its sample stand beside it without the loss of the video codec."""
    workdir = tmp_path_factory.mktemp("lora")
    train_keeping_frames(lora_run(base, latents), workdir)
    return workdir


@pytest.fixture(scope="module")
def trained(base, latents, tmp_path_factory) -> Path:
    """A finished run of all parameters."""
    workdir = tmp_path_factory.mktemp("full")
    train(run_of(base, latents, {}), workdir, print_line=lambda line: None)
    return workdir


def logged(workdir: Path, key: str) -> list[dict]:
    return [row for row in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()) if key in row]


def test_curves_have_one_line_per_level_in_training_and_validation(trained):
    for row, prefix in [(logged(trained, "loss")[0], ""), (logged(trained, "eval/loss")[0], "eval/")]:
        levels = [row[f"{prefix}loss_level_{level}"] for level in range(3)]
        np.testing.assert_allclose(row[f"{prefix}loss"], np.average(levels, weights=[1, 2, 1]), rtol=1e-5)
    assert [row["step"] for row in logged(trained, "eval/loss")] == [1, 2]


def test_an_adapted_run_keeps_only_what_it_trains_and_exports_the_merged_mid_model(adapted, base):
    params = read_params(adapted, prefer_ema=False)
    assert params.keys() == {"lora", "full"} and params["full"].keys() == {"patch_short"}
    assert all(np.any(leaf) for _, leaf in flatten(params["lora"]))  # every adapter has moved from its zeros
    pipeline = HeliosPipeline.from_pretrained(adapted / "export")
    assert pipeline.index.variant == "mid" and pipeline.index.is_cfg_zero_star and pipeline.scheduler.stages == 3
    assert pipeline.index.native_size == SIZE and pipeline.scheduler.use_dynamic_shifting
    video = pipeline(PROMPT, num_frames=33, steps=3, guidance_scale=3.0, seed=42)[0]
    # The run sampled with adapters beside the base: the sums differ in their last bits.
    assert np.abs(video * 255 - np.load(adapted / "frames.npy").astype(float)).max() < 1.0

    config = TransformerConfig(**SHAPE)
    start = load_component(base / "transformer", "transformer", config)
    merged = merge(start, [read_lora(adapted / "export/lora", config)])
    exported = load_component(adapted / "export/transformer", "transformer", config)
    for name in ("blocks", "condition_embedder", "proj_out", "patch_embedding", "norm_out"):
        jax.tree.map(np.testing.assert_array_equal, merged[name], exported[name])
    assert (exported["patch_short"]["kernel"] != start["patch_short"]["kernel"]).any()


def test_validation_repeats_itself_and_does_not_depend_on_its_batches(trained, base, latents):
    run = run_of(base, latents, {})
    params = read_params(trained)
    results = []
    for validation in (run.objective.validation, replace(run.objective.validation, batch_size=4)):
        objective = stage2.build(replace(run, objective=replace(run.objective, validation=validation)))
        results.append(objective.evaluate(params, 7))
    assert results[0] == logged_values(trained)
    for name, value in results[1].items():
        np.testing.assert_allclose(value, results[0][name], rtol=1e-5)


def logged_values(workdir: Path) -> dict[str, float]:
    row = logged(workdir, "eval/loss")[-1]
    return {key.removeprefix("eval/"): value for key, value in row.items() if key.startswith("eval/")}


def test_diffusers_loads_the_export_as_mid(trained):
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(trained / "export")
    assert type(pipeline).__name__ == "HeliosPyramidPipeline" and pipeline.config.is_cfg_zero_star
    assert type(pipeline.scheduler).__name__ == "HeliosScheduler" and pipeline.scheduler.config.stages == 3
    weight = pipeline.transformer.state_dict()["proj_out.weight"].numpy()
    np.testing.assert_array_equal(weight.T, read_params(trained)["proj_out"]["kernel"])


def test_data_that_do_not_fit_the_pyramid_are_refused(base, latents):
    run = run_of(base, latents, {"sample_ratios": (1, 1, 1, 1), "stage_range": (0.0, 0.25, 0.5, 0.75, 1.0)})
    with pytest.raises(UserError, match="latents of 8x8 cannot have 4 levels"):
        stage2.build(run)
    with pytest.raises(UserError, match="nowhere holds neither buckets.json nor dataset.json"):
        stage2.build(run_of(base, latents, {"validation": {"items": 2, "batch_size": 2, "data": "nowhere"}}))
