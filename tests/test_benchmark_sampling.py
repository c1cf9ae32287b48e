"""The benchmarks of sampling run end to end at small size on any machine."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import jax
import pytest

from benchmarks import long_video, sampling, startup
from helios_jax.pipeline.placement import Placement
from tests.tiny_checkpoint import write_tiny_checkpoint

SMALL = ["--layers", "1", "--heads", "1", "--size", "64x64", "--chunks", "3", "--repeats", "1"]


def test_sampling_is_measured_part_by_part_for_both_schedules(tmp_path, capsys):
    file = tmp_path / "report.json"
    report = sampling.main([*SMALL, "--peer", "--json", str(file)])
    rows = report["rows"]
    assert json.loads(file.read_text())["rows"] == rows
    assert [row["schedule"] for row in rows] == ["[1,1,1]", "[2,2,2] amplified"]
    for row in rows:
        assert set(row["parts_s"]) == {"text, once per prompt", "transformer", "vae", "copy of the frames"}
        assert row["frames_per_second"] == pytest.approx(33 / row["chunk_s"]) and row["first_chunk_warm_s"] > 0
    once, twice = (row["flops"] for row in rows)
    assert [twice[name] / once[name] for name in once] == [2, 2, 2, 1]
    assert "TFLOP a chunk" in capsys.readouterr().out


def test_starting_is_measured_cold_and_warm(tmp_path):
    model = write_tiny_checkpoint(tmp_path / "model", "distilled")
    report = startup.main(["--model", str(model), "--size", "64x64", "--json", str(tmp_path / "report.json")])
    for seconds in report["seconds"].values():
        parts = [seconds[part] for part in ("import", "load and compile", "text", "first chunk")]
        assert seconds["command to first chunk"] == pytest.approx(sum(parts)) and min(parts) > 0


@pytest.mark.slow
def test_diffusers_makes_the_same_video_in_the_same_run():
    pytest.importorskip("diffusers")
    box = Path(__file__).resolve().parents[1] / "assets" / "helios-tiny"
    for model in (SMALL, ["--model", str(box), *SMALL[4:]]):
        rows = sampling.main([*model, "--peer", "eager"])["rows"]
        assert [row["side"] for row in rows] == ["helios_jax"] * 2 + ["diffusers, eager"] * 2


@pytest.mark.parametrize("precision", ["none", "int8"])
def test_random_weights_are_finite_and_of_the_shapes_and_dtypes_that_loading_gives(precision):
    folder = sampling.random_folder(heads=1, layers=1, size=(64, 64))
    params = sampling.random_params(folder, jax.numpy.float32, precision)
    dtypes = dict.fromkeys(params, jax.numpy.float32)
    wanted = Placement(folder, dtypes, precision).abstract()
    assert jax.tree.structure(params) == jax.tree.structure(wanted)
    for leaf, like in zip(jax.tree.leaves(params), jax.tree.leaves(wanted), strict=True):
        assert (leaf.shape, leaf.dtype) == (like.shape, like.dtype)
        assert jax.numpy.isfinite(leaf.astype(jax.numpy.float32)).all() and leaf.committed


def test_a_long_video_is_measured_chunk_by_chunk(tmp_path):
    model = write_tiny_checkpoint(tmp_path / "model", "distilled")
    report = long_video.main(["--model", str(model), "--size", "64x64", "--chunks", "14", "--json",
                              str(tmp_path / "report.json")])
    rows = json.loads((tmp_path / "report.json").read_text())["chunks"]
    assert len(rows) == 14 and min(row["seconds"] for row in rows) > 0
    early, late = report["compared"]["seconds"]
    assert early == statistics.median(row["seconds"] for row in rows[2:12])
    assert late == statistics.median(row["seconds"] for row in rows[4:])
    assert report["compared"]["host_peak"] == [rows[11]["host_peak"], rows[13]["host_peak"]]
