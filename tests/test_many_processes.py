"""Several processes compute what one does, stop together, and end when one of them is lost."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import training_toy_config

from helios_jax import distributed
from helios_jax.distributed import detect_cluster
from helios_jax.errors import UserError
from helios_jax.training.config import run_config
from helios_jax.training.loop import train

ROOT = Path(__file__).resolve().parents[1]
STEPS = 24
# Losses are compared with rel=1e-6, a few units in the last place of float32: two devices add in another order.


def losses(workdir: Path) -> dict[int, float]:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["step"]: row["loss"] for row in map(json.loads, lines)}


def flags(workdir: Path, *changes: str) -> list[str]:
    return ["train.py", "--config", "tests/training_toy_config.py", "--workdir", str(workdir),
            f"--config.num_steps={STEPS}", "--config.checkpoint_every=8", *changes]


def start_several(count: int, workdir: Path, *changes: str) -> list[subprocess.Popen]:
    """Processes of one CPU device each, which divide every batch of four."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu",
                   "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    return [subprocess.Popen(
        [sys.executable, *flags(workdir, "--config.mesh.data=-1", *changes), "--coordinator", f"localhost:{port}",
         "--num_processes", str(count), "--process_id", str(number)],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for number in range(count)]


def wait_for_step(process: subprocess.Popen, workdir: Path, step: int) -> None:
    deadline = time.time() + 300
    while len(losses(workdir)) < step:
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.05)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> dict[int, float]:
    """The losses of a run in one process."""
    config = training_toy_config.get_config()
    config.update({"num_steps": STEPS, "checkpoint_every": 8})
    folder = tmp_path_factory.mktemp("one")
    train(run_config(config), folder, print_line=lambda line: None)
    return losses(folder)


def test_two_processes_stop_at_a_signal_to_one_and_one_process_goes_on(one, tmp_path):
    first, second = start_several(2, tmp_path, "--config.objective.step_sleep=0.2")
    wait_for_step(first, tmp_path, 10)
    second.send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=300) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    done = max(losses(tmp_path))
    assert 10 <= done < STEPS and f"stopped by SIGTERM at step {done}: saved" in outputs[0][0]
    assert "step" not in outputs[1][0]  # only the first process speaks
    assert losses(tmp_path) == pytest.approx({step: one[step] for step in range(1, done + 1)}, rel=1e-6)

    config = training_toy_config.get_config()
    config.update({"num_steps": STEPS, "checkpoint_every": 8})
    train(run_config(config), tmp_path, print_line=lambda line: None)
    assert losses(tmp_path) == pytest.approx(one, rel=1e-6)


def test_four_processes_give_the_losses_of_one(one, tmp_path):
    processes = start_several(4, tmp_path)
    outputs = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, outputs
    assert losses(tmp_path) == pytest.approx(one, rel=1e-6)


def test_a_lost_process_ends_the_other_with_one_line_and_two_resume(one, tmp_path):
    first, second = start_several(2, tmp_path, "--config.objective.step_sleep=0.2")
    wait_for_step(first, tmp_path, 10)
    second.kill()
    killed = time.time()
    output, error = first.communicate(timeout=120)
    second.communicate()
    assert time.time() - killed < 120
    assert first.returncode == 3, (output, error)
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "of the run was lost; the same command resumes" in lines[0]

    processes = start_several(2, tmp_path)
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert f"complete at step {STEPS}" in outputs[0][0]
    assert losses(tmp_path) == pytest.approx(one, rel=1e-6)


@pytest.mark.parametrize(("environment", "cluster"), [
    ({}, None),
    ({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "1"}, None),
    ({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "16"}, "slurm"),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ({"TPU_WORKER_HOSTNAMES": "WARNING: could not determine hostnames, please set env var"}, None),
    ({"TPU_WORKER_HOSTNAMES": "t-0.svc,t-1.svc", "TPU_WORKER_ID": "1"}, "tpu"),
    ({"MEGASCALE_NUM_SLICES": "2"}, "tpu"),
])
def test_the_cluster_is_recognised_by_its_environment(environment, cluster):
    assert detect_cluster(environment) == cluster


@pytest.mark.parametrize(("given", "message"), [
    ({"coordinator": "host:1"}, "--num_processes: needed besides --coordinator"),
    ({"coordinator": "host:1", "num_processes": 2}, "--process_id: needed besides --coordinator and --num_processes"),
    ({"coordinator": "host", "num_processes": 2, "process_id": 0}, "--coordinator: host:port expected, got 'host'"),
    ({"coordinator": "host:1", "num_processes": 2, "process_id": 2}, "--process_id: 0 to --num_processes - 1 allowed"),
])
def test_incomplete_flags_are_one_clear_line(given, message, monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError) as caught:
        distributed.initialise(**given)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "many")
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES: a number expected, got 'many'"):
        distributed.initialise()
