"""Few-bit products of the 14B model become few-bit calls of the matrix library on an H100, compiled without a card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_kernels_gpu_compile import load_script

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "compile_precision.py"
TOKENS, DIM, HIDDEN, LAYERS = 11040, 5120, 13824, 4


def test_fp8_and_int8_feed_forwards_compile_to_few_bit_products_without_a_copy_of_the_weights(tmp_path):
    pytest.importorskip("qwix")
    if reason := load_script().why_not():
        pytest.skip(reason)
    report = tmp_path / "report.json"
    # A process of its own: the plugin has to be chosen before jax is imported.
    done = subprocess.run([sys.executable, str(SCRIPT), "--modes", "fp8", "int8", "--json", str(report)],
                          capture_output=True, text=True, env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"})
    assert done.returncode == 0, done.stdout + done.stderr
    fp8, int8 = json.loads(report.read_text())
    assert fp8["calls"] == ["__cublas$lt$matmul$f8: f8e4m3fn x f8e4m3fn -> bf16"] * 2
    assert int8["calls"] == ["__cublas$lt$matmul: s8 x s8 -> s32"] * 2
    stack = LAYERS * 2 * DIM * HIDDEN
    for row, result_bytes in ((fp8, 2), (int8, 4)):
        assert row["arguments"] < stack + 2 * TOKENS * DIM + 1e6  # one byte a weight
        # Of the wide activation the product and its GELU (in float32, before its numbers are made of it), and what the
        # compiler may cut out of the stacks ahead of its products: one layer's two matrices. A transposed stack of one
        # matrix, which the library would ask for if inputs did not lie last, would not fit beside them.
        expected = TOKENS * HIDDEN * (result_bytes + 4) + 2 * DIM * HIDDEN
        assert row["temporary"] < expected + 64e6 < expected + (LAYERS - 2) * DIM * HIDDEN
