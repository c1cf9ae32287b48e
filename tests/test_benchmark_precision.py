"""The table of what low precision costs: each mode against both plain ones, and the reader's points."""

from __future__ import annotations

import json
import math

import jax
import numpy as np
import pytest

from benchmarks import precision
from helios_jax.pipeline.pipeline import HeliosPipeline
from helios_jax.tools import evaluate

pytest.importorskip("qwix")


@pytest.fixture
def command(folders, tmp_path):
    return ["--model", str(folders["distilled"]), "--size", "64x64", "--steps", "1,1,1", "--json",
            str(tmp_path / "report.json")]


@pytest.mark.slow
def test_every_mode_is_compared_with_plain_float32_and_plain_bfloat16(folders, command, tmp_path, capsys):
    report = precision.main([*command, "--modes", "int8_weights"])
    assert json.loads((tmp_path / "report.json").read_text())["rows"] == report["rows"]
    assert report["machine"]["cores"] and "against float32 / against bfloat16" in capsys.readouterr().out
    bfloat16, float32, quantised = report["rows"]
    assert [(row["mode"], row["dtype"]) for row in report["rows"]] == [
        ("none", "bfloat16"), ("none", "float32"), ("int8_weights", "bfloat16")]
    for part in ("frames", "latents"):
        assert bfloat16[f"{part}_psnr_bfloat16"] is float32[f"{part}_psnr_float32"] is None
        assert all(10 < quantised[f"{part}_psnr_{dtype}"] < 100 for dtype in ("float32", "bfloat16"))
    # Frames have one peak; the latents' is the range of those that are compared with.
    assert bfloat16["frames_psnr_float32"] == pytest.approx(float32["frames_psnr_bfloat16"])
    pipeline = HeliosPipeline.from_pretrained(folders["distilled"], dtype="bfloat16", precision="int8_weights")
    assert quantised["bytes"] == sum(leaf.nbytes for leaf in jax.tree.leaves(pipeline.params["transformer"]))
    assert quantised["bytes"] < bfloat16["bytes"] < float32["bytes"]


def test_decibels_are_ten_times_the_logarithm_of_the_peaks_square_over_the_mean_square():
    want = np.zeros((2, 5), np.float32)
    assert precision.psnr(want + 0.01, want, 1.0) == pytest.approx(40, abs=1e-4)
    assert precision.psnr(want + 0.01, want, 4.0) == pytest.approx(40 + 20 * math.log10(4), abs=1e-4)
    assert precision.psnr(want, want, 1.0) is None


def test_points_are_counted_from_plain_bfloat16_and_every_mode_is_judged_as_it_was_sampled(
        command, tmp_path, capsys, monkeypatch):
    asked = []
    right = {("none", "bfloat16"): 96, ("none", "float32"): 97, ("fp8", "bfloat16"): 94, ("int8", "bfloat16"): 98}
    attributes = {"colour": "red", "shape": "circle", "direction": "up", "background": "dark"}
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"prompt": "", "seed": 0, "num_frames": 33, "attributes": attributes}] * 100))

    def judge(settings, entries, processes):
        asked.append((settings.precision, settings.dtype, settings.steps, processes))
        wrong = attributes | {"colour": "blue"}
        read = [attributes] * right[settings.precision, settings.dtype]
        read += [wrong] * (len(entries) - len(read))
        readings = [evaluate.reader.Reading(**fields, confidence={}, velocity=(0, 0)) for fields in read]
        return "distilled", [evaluate.Judged(reading, None, {}) for reading in readings]

    sample = precision.Sample(np.zeros((1, 1)), np.arange(2.0), 1)
    monkeypatch.setattr(precision, "first_chunk", lambda *_: sample)
    monkeypatch.setattr(evaluate, "judge_in_processes", judge)
    report = precision.main([*command, "--modes", "fp8", "int8", "--score", str(prompts), "--processes", "2"])
    assert asked == [(mode, dtype, (1, 1, 1), 2) for mode, dtype in (
        ("none", "bfloat16"), ("none", "float32"), ("fp8", "bfloat16"), ("int8", "bfloat16"))]
    assert [row["points_lost"] for row in report["rows"]] == pytest.approx([0, -1, 2, -2])
    assert report["rows"][2]["right_in_all"] == 0.94 and report["rows"][2]["videos"] == 100
    low, high = report["rows"][2]["wilson_95"]
    assert 0.87 < low < 0.94 < high < 0.98
    assert "right 94.0%" in capsys.readouterr().out
