"""Distillation through the trainer: many devices compute what one does; a killed run resumes bitwise equal."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helios_jax.training.checkpoint import Checkpointer, read_params

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow  # a step with both players takes a minute to compile, on eight devices longer


def work(folder: Path, *cases: str) -> subprocess.CompletedProcess:
    """Trains cases of dmd_worker.py in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "tests/dmd_worker.py", str(folder), *cases], cwd=ROOT, env=environment,
                          capture_output=True, text=True)


def metrics(workdir: Path) -> dict[int, dict[str, float]]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: {name: value for name, value in row.items() if "/" in name} for row in rows}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("distilled")
    done = work(folder, "one", "mixed", "context", "whole")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_each_player_reports_the_steps_in_which_it_played(trained):
    rows = metrics(trained / "whole")
    assert sorted(rows) == list(range(1, 10))
    for step, values in rows.items():
        assert ("student/loss" in values) == (step % 2 == 1) and "critic/loss" in values
        assert (values["critic/heads"] > 0) == (step > 2)  # the adversarial part begins at step 2, counted from 0
    assert all(values["critic/skipped"] == 0 for values in rows.values())


@pytest.mark.parametrize("case", ["mixed", "context"])
def test_losses_and_gradients_of_all_parts_on_a_mesh_are_those_of_one_device(trained, case):
    """The norms tell a gradient that is summed where it should be averaged, which Adam would hide."""
    expected, found = metrics(trained / "one"), metrics(trained / case)
    losses = ("student/loss", "student/matching", "student/adversarial", "critic/loss", "critic/flow", "critic/heads",
              "critic/r1")
    assert sorted(expected) == [1, 2, 3, 4, 5]
    for step in expected:
        for name in losses:
            np.testing.assert_allclose(found[step][name], expected[step][name], rtol=0, atol=1e-5,
                                       err_msg=f"step {step}, {name}")
        # In step 1 of equal parameters; later ones differ by what Adam, dividing by gradients, makes of rounding.
        for name in ("student/grad_norm", "critic/grad_norm"):
            np.testing.assert_allclose(found[step][name], expected[step][name], rtol=1e-5 if step == 1 else 1e-3,
                                       err_msg=f"step {step}, {name}")
    assert expected[1]["critic/loss"] != expected[5]["critic/loss"]


def test_a_killed_run_resumes_bitwise_equal(trained):
    killed = work(trained, "killed")
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    done = work(trained, "resumed")
    resumed = re.search(r"resumed from step (\d+)", done.stdout)
    # The student's turn in step 4 averages, so a resumed average that were only a copy would show.
    assert done.returncode == 0 and resumed and int(resumed[1]) > 4, done.stdout + done.stderr
    assert metrics(trained / "killed") == metrics(trained / "whole")
    for prefer_ema, parts in ((False, {"student", "critic", "heads"}), (True, {"student"})):
        ours, theirs = (read_params(trained / name, prefer_ema=prefer_ema) for name in ("killed", "whole"))
        assert set(ours) == parts
        for a, b in zip(_leaves(ours), _leaves(theirs), strict=True):
            np.testing.assert_array_equal(a, b)
    average, last = (read_params(trained / "killed", prefer_ema=prefer)["student"] for prefer in (True, False))
    assert any((a != b).any() for a, b in zip(_leaves(average), _leaves(last), strict=True))
    assert Checkpointer(trained / "killed" / "checkpoints", 2).latest_step() == 9


def _leaves(tree) -> list:
    return [leaf for value in tree.values() for leaf in _leaves(value)] if isinstance(tree, dict) else [tree]
