"""A run that is killed at random moments, some inside a checkpoint's writing, ends like one that never was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from helios_jax.training.checkpoint import read_params

ROOT = Path(__file__).resolve().parents[1]
KILLS = 20


def losses(workdir: Path) -> dict[int, tuple]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: (row["loss"], row["grad_norm"], row["first_error"]) for row in rows}


@pytest.mark.slow
def test_after_twenty_kills_every_loss_and_parameter_is_bitwise_that_of_an_uninterrupted_run(tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "tests/kill_worker.py", str(tmp_path), str(KILLS)], cwd=ROOT,
                          env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["kills"] == KILLS and report["inside_a_save"] >= 3, report
    assert len(set(report["steps"])) > 5, report  # they got on between the kills
    whole, killed = losses(tmp_path / "whole"), losses(tmp_path / "killed")
    assert sorted(whole) == list(range(1, 121)) and killed == whole
    for average in (False, True):
        jax.tree.map(np.testing.assert_array_equal, read_params(tmp_path / "killed", prefer_ema=average),
                     read_params(tmp_path / "whole", prefer_ema=average))
