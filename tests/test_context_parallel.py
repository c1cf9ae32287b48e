"""Attention with its tokens divided over a mesh axis equals attention on one device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def report():
    """The worker's results: the number of devices is fixed when JAX starts, so it is a process of its own."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    done = subprocess.run([sys.executable, TESTS / "context_worker.py"], env=environment, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", ["4 devices, odd lengths", "8 devices, fewer heads than devices",
                                  "8 devices, even length", "data, context and tensor", "cross-attention with a bias",
                                  "TPU kernels", "run: small batch", "run: tokens whole",
                                  "run: cross-attention"])
def test_forward_lse_and_gradients_on_a_mesh_equal_one_device(report, case):
    # Sums over one row of keys in another order: a few float32 roundings of the largest entry.
    assert report[case] < 3e-6


def test_only_self_attention_over_divided_tokens_exchanges_them(report):
    assert report["run: small batch, exchanged arrays"] == 4  # q, k, v and the result
    assert report["run: tokens whole, exchanged arrays"] == report["run: cross-attention, exchanged arrays"] == 0


def test_heads_that_do_not_divide_are_named(report):
    assert report["error"] == ("mesh: heads times samples of one device, here 3, do not divide by 8 (mesh.context 8), "
                               "but by 1, 3")
