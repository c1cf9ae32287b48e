"""The attention benchmark runs end to end at small size on any machine."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import jax
import pytest

from kernels.attention.dispatch import VARIANTS


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "attention.py"
    spec = importlib.util.spec_from_file_location("attention_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_small_run_measures_every_variant_the_machine_has_and_names_the_others(benchmark, tmp_path, capsys):
    report = benchmark.main(["--small", "--json", str(tmp_path / "report.json")])
    assert json.loads((tmp_path / "report.json").read_text())["rows"] == report["rows"]
    measured = {row["variant"] for row in report["rows"]}
    assert {"ours", "xla"} <= measured
    assert {(row["length"], row["work"]) for row in report["rows"] if row["variant"] == "ours"} == {
        (length, work) for length in (61, 40) for work in ("forward", "forward + backward")
    }
    assert set(report["dispatch"]) == {61, 40} and set(report["dispatch"].values()) <= set(VARIANTS)
    if jax.default_backend() == "cpu":
        assert "Hopper" in report["not_run"]["ours, Pallas kernel"]
        assert "cudnn" in report["not_run"]
    for row in report["rows"]:
        assert row["seconds"] > 0 and row["difference"] < 0.02
    assert "TFLOP/s" in capsys.readouterr().out


def test_plot_is_drawn(benchmark, tmp_path):
    pytest.importorskip("matplotlib")
    row = {"length": 61, "seconds": 1.0, "tflops": 1.0}
    rows = [{**row, "work": work, "variant": name} for work in ("forward", "forward + backward") for name in "ab"]
    benchmark.plot({"rows": rows, "matmul_tflops": 2.0, "machine": {"device": "none"}}, str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").stat().st_size > 0
