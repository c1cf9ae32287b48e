"""A LoRA run on a mesh, of one process and of two, validates, samples and exports what one device does.

That it trains like one device stands in test_sharding.py.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helios_jax.convert.safetensors_io import SafetensorsFile
from helios_jax.data.random_latents import write_random_latents
from tests.tiny_checkpoint import write_tiny_checkpoint

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]


def start(*arguments: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen([sys.executable, "tests/lora_mesh_worker.py", *arguments], cwd=ROOT, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(*processes: subprocess.Popen) -> None:
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("lora")
    write_tiny_checkpoint(root / "model")
    write_random_latents(root / "latents", clips=4, sections=2, height=4, width=4, text_rows=5, text_dim=24)
    finish(start(str(root), "one", "mesh"))
    return root


def tensors(file: Path) -> dict[str, np.ndarray]:
    with SafetensorsFile(file) as stored:
        return {name: stored.read(name) for name in stored.entries}


def assert_same(folder: Path, case: str) -> None:
    one, other = (json.loads((folder / name / "numbers.json").read_text()) for name in ("one", case))
    assert "eval/loss" in one and other == pytest.approx(one, abs=1e-5)
    one, other = (np.load(folder / name / "frames.npy").astype(int) for name in ("one", case))
    assert np.ptp(one) > 20 and np.abs(one - other).max() <= 1  # rounded to whole numbers
    for name in ("transformer/diffusion_pytorch_model.safetensors", "lora/pytorch_lora_weights.safetensors",
                 "lora/transformer_partial.safetensors"):
        one, other = (tensors(folder / run / "export" / name) for run in ("one", case))
        assert one.keys() == other.keys() and one
        for tensor in one:
            np.testing.assert_allclose(other[tensor], one[tensor], rtol=0, atol=1e-5, err_msg=tensor)


def test_eight_devices_show_and_export_what_one_does(folder):
    assert_same(folder, "mesh")


def test_two_processes_show_and_export_what_one_does(folder):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    finish(*(start(str(folder), "two", f"localhost:{port}", "2", str(number)) for number in (0, 1)))
    assert_same(folder, "two")
