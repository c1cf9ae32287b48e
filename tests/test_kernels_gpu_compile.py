"""The Hopper kernels compile for an H100 at every production length, without a card."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("fully_optimized")
SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "compile_gpu.py"


def load_script():
    spec = importlib.util.spec_from_file_location("compile_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_forward_and_gradients_compile_for_an_h100_without_serialised_products_or_padded_copies(tmp_path):
    if reason := load_script().why_not():
        pytest.skip(reason)
    report = tmp_path / "report.json"
    # A process of its own: the plugin has to be chosen before jax is imported.
    done = subprocess.run([sys.executable, str(SCRIPT), "--json", str(report)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(report.read_text())
    assert {row["length"] for row in rows} == {11040, 4560, 2940}
    assert {row["kernel"] for row in rows} == {
        "attention_forward", "attention_query_gradient", "attention_key_value_gradient"
    }
    for row in rows:
        if row["length"] % 8 == 0:
            # Row statistics alone: 8 bytes per query and head. One padded operand would be 10240 bytes per query.
            assert row["temporary"] <= 40 * (row["length"] + 128) * 12


def test_the_assembler_report_names_spills_and_serialised_kernels():
    text = """
ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient \
register resources for the function 'b_mosaic_gpu_kernel'
ptxas info    : Function properties for a_mosaic_gpu_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for b_mosaic_gpu_kernel
    528 bytes stack frame, 780 bytes spill stores, 832 bytes spill loads
"""
    assert load_script().assembler_report(text) == {
        "a": {"spilled": 0, "serialised": False},
        "b": {"spilled": 780, "serialised": True},
    }
