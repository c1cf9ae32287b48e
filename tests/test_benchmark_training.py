"""The benchmarks of the trainer run end to end at small size on any machine."""

from __future__ import annotations

import json

import pytest

from benchmarks import input_pipeline, training_overhead


def test_the_trainer_is_timed_against_its_bare_step(tmp_path, capsys):
    report = training_overhead.main(["--config", "tests/training_toy_config.py", "--rounds", "2", "--steps", "2",
                                     "--json", str(tmp_path / "report.json")])
    assert json.loads((tmp_path / "report.json").read_text())["overhead"] == report["overhead"]
    assert len(report["trainer_s"]) == len(report["bare_s"]) == 2 and min(report["bare_s"]) > 0
    assert report["overhead"] == pytest.approx(report["trainer_median_s"] / report["bare_median_s"] - 1)
    assert report["machine"]["cores"] and "by itself" in capsys.readouterr().out


def test_the_input_pipeline_is_timed_for_every_number_of_threads(tmp_path):
    report = input_pipeline.main(["--threads", "1", "2", "--records", "3", "--batch", "1", "--batches", "3", "--size",
                                  "64x64", "--json", str(tmp_path / "report.json")])
    assert json.loads((tmp_path / "report.json").read_text())["rows"] == report["rows"]
    assert [row["threads"] for row in report["rows"]] == [1, 2]
    assert all(row["items_per_second"] > 0 for row in report["rows"])


def test_the_modelled_consumption_follows_from_the_peak():
    """Four chips of 459 TFLOP/s and some 0.8 PFLOP per sample: 2 N per token forward, 2 N backward, and attention."""
    full = input_pipeline.consumption(1.0)
    assert input_pipeline.consumption(0.5) == pytest.approx(full / 2)
    assert 1.5 < full < 2.5
