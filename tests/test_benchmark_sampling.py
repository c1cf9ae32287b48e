"""The benchmarks of sampling run end to end at small size on any machine."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import long_video, sampling, sampling_rows, startup
from helios_jax.convert.rules import COMPONENTS
from helios_jax.errors import UserError
from helios_jax.pipeline.pipeline import HeliosPipeline
from helios_jax.pipeline.placement import Placement
from helios_jax.tools.roofline import floor_seconds
from tests.tiny_checkpoint import CONFIGS, write_tiny_checkpoint

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--size", "64x64", "--chunks", "3", "--repeats", "1"]
RANDOM = ["--layers", "1", "--heads", "2", *SMALL]
SETTINGS = {"model": None, "layers": 1, "heads": 1, "size": (64, 64), "chunks": 3, "repeats": 1}
ROW = {"side": "helios_jax", "dtype": "float32", "precision": "none", "weights": "on the device", "schedule": "[1,1,1]"}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(report, what was printed) of a tiny checkpoint, with rows that cannot work: there are not so many devices."""
    folder = tmp_path_factory.mktemp("benchmark")
    model = write_tiny_checkpoint(folder / "model", "distilled")
    command = [sys.executable, "benchmarks/sampling.py", "--model", str(model), *SMALL, "--peer", "--mesh",
               "context=64", "--json", str(folder / "report.json"), "--table", str(folder / "table.md")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "report.json").read_text()), done.stdout, (folder / "table.md").read_text()


@pytest.mark.slow
def test_sampling_is_measured_part_by_part_for_both_schedules(measured):
    report, printed, table = measured
    assert report["machine"]["device"] == "cpu" and report["machine"]["memory"] > 2**30
    rows = report["rows"][:2]
    assert [row["schedule"] for row in rows] == ["[1,1,1]", "[2,2,2] amplified"]
    for row in rows:
        assert set(row["parts_s"]) == {"text", "transformer", "vae", "copy of the frames"}
        assert row["shares"]["vae"] == pytest.approx(row["parts_s"]["vae"] / row["chunk_s"])
        assert row["shares"]["text"] == pytest.approx(row["parts_s"]["text"] / row["first_chunk_warm_s"])
        assert row["first_chunk_cold_s"] > row["compile_s"] > row["first_chunk_warm_s"] > 0
        assert row["video_s"] > row["chunk_s"] and row["frames_per_second"] == pytest.approx(33 / row["chunk_s"])
        assert row["floor_s"] is None and row["host_peak_bytes"] > 2**26
        assert {"device_bytes", "device_peak_bytes"} <= set(row) & set(row["weights_memory"])
    once, twice = (row["flops"] for row in rows)
    assert [twice[name]["float32"] / once[name]["float32"] for name in once] == [2, 2, 2, 1]
    assert "TFLOP/s" in printed and "cpu" in table and len(table.splitlines()) == 4 + 4


@pytest.mark.slow
def test_a_row_that_fails_is_one_line_and_the_next_one_follows(measured):
    report, printed, table = measured
    failed = report["rows"][2:]
    assert [(row["weights"], row["schedule"]) for row in failed] == [
        ("context=64", "[1,1,1]"), ("context=64", "[2,2,2] amplified")]
    for row in failed:
        assert "needs 64 devices, there are" in row["error"] and "frames_per_second" not in row
        lines = [line for line in printed.splitlines() if row["error"] in line]
        assert len(lines) == 2 and all("failed" in line for line in lines)
        assert row["error"] in table
    assert "Traceback" not in printed


@pytest.mark.slow
def test_every_row_has_a_process_of_its_own(measured):
    processes = [row["process"] for row in measured[0]["rows"]]
    assert len(set(processes)) == 4 and os.getpid() not in processes


def test_a_process_does_not_count_the_memory_of_the_one_that_starts_it():
    mine = np.ones(2**26)  # half a GiB
    command = [sys.executable, "-c", "from benchmarks.machine import host_peak_bytes; print(host_peak_bytes())"]
    found = int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert 2**20 < found < mine.nbytes // 4


def test_a_process_that_dies_or_is_late_is_one_line(tmp_path, monkeypatch):
    assert sampling.run_process(SETTINGS, ROW, 0.01)["error"] == "no time left"
    dying = tmp_path / "python"
    dying.write_text("#!/bin/sh\necho last words >&2\nkill -9 $$\n")
    dying.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(dying))
    found = sampling.run_process(SETTINGS, ROW, None)
    assert found["error"] == "ended by SIGKILL" and found["log"] == "last words\n"
    assert sampling.describe_row({**ROW, **found}).endswith("[1,1,1]           failed: ended by SIGKILL")


def test_rows_start_without_compiled_programs(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    showing = tmp_path / "python"
    showing.write_text(f"#!/bin/sh\nenv > {tmp_path}/env\nls $TORCHINDUCTOR_CACHE_DIR $TRITON_CACHE_DIR\nexit 3\n")
    showing.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(showing))
    found = sampling.run_process(SETTINGS, ROW, None)
    assert found["error"] == "ended with code 3" and found["log"].count("No such file") == 2
    seen = (tmp_path / "env").read_text().splitlines()
    assert "JAX_ENABLE_COMPILATION_CACHE=false" in seen
    assert not any(line.startswith("JAX_COMPILATION_CACHE_DIR=") for line in seen)


def test_the_main_rows_come_first():
    def order(*argv: str, native: tuple[str, ...] = ("fp8", "int8")) -> list[tuple[str, ...]]:
        rows = sampling.plan(sampling.parser().parse_args(argv), {"dtype": "bfloat16", "native": native}, True)
        assert [row["schedule"] for row in rows[:2]] == list(sampling.SCHEDULES)
        return [(row["side"], row["precision"], row["weights"]) for row in rows[::2]]

    here, eager, compiled = "on the device", *(("diffusers, " + way, "none", "on the device")
                                               for way in ("eager", "compiled"))
    plain, fp8 = (("helios_jax", mode, here) for mode in ("none", "fp8"))
    assert order() == [plain, fp8, eager, compiled]
    assert order(native=("int8",)) == [plain, eager, compiled]
    found = order("--precision", "all", "--stream_weights", "--mesh", "fsdp=2")
    assert found[:4] == [plain, fp8, eager, compiled] and len(set(found)) == len(found) == 2 + 3 * 5
    assert [place for _, _, place in found[4:]] == [here] * 3 + ["streamed"] * 5 + ["fsdp=2"] * 5


@pytest.mark.parametrize(("precision", "few_bits"), [("none", None), ("fp8", "float8_e4m3fn"), ("int8", "int8"),
                                                     ("int8_weights", None)])
def test_the_quantised_layers_count_at_the_peak_of_their_type_and_the_rest_at_bfloat16s(folders, precision, few_bits):
    """64x64: 40 tokens of history, and 9, 36 and 144 of the three levels; all as docs/speed.md counts them."""
    pipe = HeliosPipeline.from_pretrained(folders["distilled"], precision=precision)
    stream = pipe.stream("a red circle", height=64, width=64, num_frames=33, steps=(1, 1, 1))
    flops = sampling_rows.operations(pipe, stream, (1, 1, 1))
    model = CONFIGS["transformer"]
    c, f = model.num_attention_heads * model.attention_head_dim, model.ffn_dim
    linear = []
    for current in (9, 36, 144):
        every = 40 + current
        whole = 8 * every * c**2 + 4 * current * c**2 + 4 * every * c * f
        last = 4 * every * c**2 + 4 * current * c**2 + 4 * current * c**2 + 4 * current * c * f
        linear.append((model.num_layers - 1) * whole + last)
    levels = [flops[f"level {i}"] for i in range(3)]
    assert [level.get(few_bits, 0) for level in levels] == (linear if few_bits else [0, 0, 0])
    total = [sum(level.values()) for level in levels]
    assert all(few < whole for few, whole in zip(linear, total, strict=True))
    for level, few, whole in zip(levels, linear, total, strict=True):
        wanted = whole / 989.4e12 if few_bits is None else few / 1978.9e12 + (whole - few) / 989.4e12
        assert floor_seconds(level, "NVIDIA H200") == pytest.approx(wanted)


@pytest.mark.slow
def test_starting_is_measured_cold_and_warm(tmp_path):
    model = write_tiny_checkpoint(tmp_path / "model", "distilled")
    report = startup.main(["--model", str(model), "--size", "64x64", "--json", str(tmp_path / "report.json")])
    for seconds in report["seconds"].values():
        parts = [seconds[part] for part in ("import", "load and compile", "text", "first chunk")]
        assert seconds["command to first chunk"] == pytest.approx(sum(parts)) and min(parts) > 0


@pytest.mark.slow
def test_random_weights_are_measured_streamed_and_on_a_mesh(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    rows = sampling.main([*RANDOM, "--peer", "--precision", "int8", "--stream_weights", "--mesh", "tensor=2"])["rows"]
    assert [row["weights"] for row in rows[::2]] == ["on the device", "streamed", "tensor=2"]
    assert not any("error" in row for row in rows)
    assert len({json.dumps(row["flops"]["level 2"]) for row in rows[::2]}) == 1


@pytest.mark.slow
def test_diffusers_makes_the_same_video_in_the_same_run():
    pytest.importorskip("diffusers")
    for model in (RANDOM, ["--model", str(ROOT / "assets" / "helios-tiny"), *SMALL]):
        rows = sampling.main([*model, "--peer", "eager"])["rows"]
        assert [row["side"] for row in rows] == ["helios_jax"] * 2 + ["diffusers, eager"] * 2
        assert not any("error" in row for row in rows) and rows[-1]["versions"]["torch"]


def test_diffusers_on_a_processor_is_no_comparison_with_an_accelerator():
    pytest.importorskip("diffusers")
    with pytest.raises(UserError, match="PyTorch sees no TPU v5 lite"):
        sampling_rows.measure_theirs({**ROW, "side": "diffusers, eager"}, {**SETTINGS, "device": "TPU v5 lite"})


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["none", "int8"])
def test_random_weights_are_finite_and_of_the_shapes_and_dtypes_that_loading_gives(precision):
    folder = sampling_rows.random_folder(heads=1, layers=2, size=(64, 64))
    placement = Placement(folder, dict.fromkeys(COMPONENTS, jax.numpy.float32), precision)
    params, wanted = sampling_rows.random_params(placement), placement.abstract()
    assert jax.tree.structure(params) == jax.tree.structure(wanted)
    for leaf, like in zip(jax.tree.leaves(params), jax.tree.leaves(wanted), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (like.shape, like.dtype, like.sharding)
        assert jax.numpy.isfinite(leaf.astype(jax.numpy.float32)).all() and leaf.committed
    kernel = params["transformer"]["blocks"]["attn1"]["to_q"]["kernel"]
    values = kernel.qvalue * kernel.scale if precision == "int8" else kernel
    assert float(jax.numpy.std(values)) == pytest.approx(128**-0.5, rel=0.05)
    assert not (values[0] == values[1]).all()


@pytest.mark.slow
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
