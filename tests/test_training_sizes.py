"""Training on data of several sizes: one compiled step per size, exact resume, and the most frequent size shown."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from helios_jax.data.random_latents import write_random_latents
from helios_jax.errors import UserError
from helios_jax.tools.compile_check import stand_in_data
from helios_jax.training import stage1, stage2, validation
from helios_jax.training.config import run_config
from helios_jax.training.loop import train

SIZES = {"32x32": (2, 4, 4), "32x64": (6, 4, 8)}  # name -> records, latent rows and columns


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("set")
    for name, (clips, height, width) in SIZES.items():
        write_random_latents(root / name, clips=clips, sections=2, height=height, width=width, text_rows=3 + width,
                             text_dim=8)
    (root / "buckets.json").write_text(json.dumps({"buckets": {name: size[0] for name, size in SIZES.items()}}))
    return root


def run_of(data: Path, model: str | Path = "", **objective):
    return run_config({
        "objective": {
            "name": "stage1", "data": str(data), "model": str(model),
            "transformer": {"num_attention_heads": 2, "attention_head_dim": 8, "rope_dim": (4, 2, 2), "text_dim": 8,
                            "freq_dim": 8, "ffn_dim": 16, "num_layers": 1},
            "validation": {"items": 2, "batch_size": 2}, **objective,
        },
        "batch_size": 2, "num_steps": 8, "log_every": 1, "checkpoint_every": 3, "sample_every": 8, "tensorboard": False,
    })


def metrics(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_on_two_sizes_compiles_two_steps_and_resumes_exactly(data, tmp_path):
    lines: list[str] = []
    train(run_of(data), tmp_path / "whole", print_line=lines.append)
    assert len([line for line in lines if line.startswith("compiled the step")]) == 2
    rows = metrics(tmp_path / "whole")
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert sorted(losses) == list(range(1, 9)) and rows[-1]["eval/loss"] > 0
    speeds = {round(row["tokens_per_second"] * row["step_seconds"]) for row in rows if "loss" in row}
    assert speeds == {2 * (36 + 4 + 1 + 8), 2 * (72 + 4 + 2 + 16)}  # batch x (current + long + mid + short) tokens
    assert all(row["model_tflops_per_second"] > 0 and "mfu" not in row for row in rows if "loss" in row)
    assert "tokens/s" in lines[-2] and "TFLOP/s" in lines[-2]

    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/checkpoints/8")
    train(run_of(data), tmp_path / "resumed", print_line=lines.append)
    assert "resumed from step 6" in "".join(lines)
    assert {row["step"]: row["loss"] for row in metrics(tmp_path / "resumed") if "loss" in row} == losses


def test_the_model_is_sampled_and_exported_at_the_most_frequent_size(data, monkeypatch):
    seen = []
    monkeypatch.setattr(validation, "model_folder", lambda model, transformer, index, scheduler: seen.append(index))
    stage1.build(run_of(data, "anywhere"))
    assert [index.native_size for index in seen] == [(32, 64)]


def test_held_out_records_must_have_the_most_frequent_size(data):
    stage1.build(run_of(data, validation={"items": 2, "batch_size": 2, "data": str(data / "32x64")}))
    with pytest.raises(UserError, match=r"validation.data: .*32x32 has latents of \(9, 4, 4, 16\).*\(9, 4, 8, 16\)"):
        stage1.build(run_of(data, validation={"items": 2, "batch_size": 2, "data": str(data / "32x32")}))


def test_every_size_must_fit_the_pyramid(data):
    with pytest.raises(UserError, match="latents of 4x4 cannot have 3 levels"):
        stage2.build(run_config({"objective": {"name": "stage2", "data": str(data)}}))


def test_the_largest_size_is_compiled_ahead_of_time(data):
    with stand_in_data({"objective": {"name": "stage1", "data": str(data)}}, (64, 64)) as (values, note):
        assert values["objective"]["data"] == str(data / "32x64") and "the step is that of 32x64" in note


def test_data_without_any_size_are_one_clear_line(tmp_path):
    (tmp_path / "buckets.json").write_text('{"buckets": {}}')
    with pytest.raises(UserError, match="buckets.json lists no size"):
        stage1.build(run_of(tmp_path))
