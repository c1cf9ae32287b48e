"""A video sampled on a mesh is the one of a single device; meshes that do not fit are one clear line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sample
from helios_jax.errors import UserError
from helios_jax.sharding import MeshConfig

ROOT = Path(__file__).resolve().parents[1]


def found_by_the_worker(folder: Path, variant: str):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "tests/mesh_sampling_worker.py", str(folder), variant], cwd=ROOT,
                          env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / f"{variant}.json").read_text())


@pytest.mark.parametrize("variant", ["base", pytest.param("mid", marks=pytest.mark.slow)])
def test_a_video_on_eight_devices_is_the_one_of_a_single_device(variant, tmp_path):
    """Two chunks with guidance: the second one sees history and anchor of the first."""
    found = found_by_the_worker(tmp_path, variant)
    assert found["range"] > 0.1 and max(found["differences"]) <= 1e-5 * found["range"], found
    assert found["refused"] == ("mesh: 4 attention heads do not divide by 8 (mesh.tensor 8), but by 1, 2, 4; without a "
                                "mesh (no --mesh) one device makes the videos")


def test_a_vae_divided_in_stripes_gives_the_numbers_of_the_whole_one(tmp_path):
    for mesh in found_by_the_worker(tmp_path, "vae"):
        assert mesh["encode"] <= 1e-5 and mesh["decode"] <= 1e-5, mesh
        assert mesh["exchanges"] > 10, mesh  # neighbours send each other the edges of their stripes


def test_the_mesh_is_given_as_text_or_as_an_object():
    assert sample.parse_mesh(None) is None
    assert sample.parse_mesh("context=2, tensor=-1") == MeshConfig(context=2, tensor=-1)
    assert sample.parse_mesh({"fsdp": 4}) == MeshConfig(fsdp=4)


@pytest.mark.parametrize(("value", "message"), [
    ("tensr=2", "--mesh.tensr: unknown key; did you mean 'tensor'?"),
    ("tensor", "--mesh: AXIS=N[,AXIS=N] expected, got 'tensor'"), ("tensor=two", "--mesh: AXIS=N"),
    ("tensor=0", "mesh.tensor: a positive number or -1"), ("data=-1,fsdp=-1", "mesh: only one axis may be -1"),
    ({"tensor": "2"}, "--mesh.tensor: int expected, got '2'"),
])
def test_a_mesh_that_makes_no_sense_is_one_clear_line(value, message):
    with pytest.raises(UserError) as caught:
        sample.parse_mesh(value)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_mesh_of_more_devices_than_there_are_is_one_clear_line(tmp_path, capsys):
    config = tmp_path / "options.json"
    config.write_text(json.dumps({"prompt": "a red circle", "mesh": {"fsdp": 64}, "quiet": True,
                                  "output": str(tmp_path / "video.mp4")}))
    with pytest.raises(SystemExit) as end:
        sample.main(["--config", str(config)])
    assert end.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("error: mesh: data 1 x fsdp 64 x context 1 x tensor 1 needs 64 devices, there ")
    assert line.endswith("; without a mesh (no --mesh) one device makes the videos\n") and line.count("\n") == 1
    assert not (tmp_path / "video.mp4").exists()
