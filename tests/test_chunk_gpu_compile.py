"""A chunk of the 14B Distilled model, compiled for an H100 without a card: memory, kernels, types of the products."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_kernels_gpu_compile import load_script

ROOT = Path(__file__).resolve().parents[1]
LAYERS, DIM, HIDDEN = 4, 5120, 13824  # 4 layers of 40; of two, a loop would have one turn and be none
LINEAR = re.compile(r"/(to_q|to_k|to_v|to_out_0|proj|net_2)/")
NOT_WRITTEN = ("parameter", "get-tuple-element", "bitcast", "tuple", "while")
TYPE = re.compile(r"%([\w.\-]+) = (\w+)\[")


def products(text: str) -> list[tuple[str, str, str]]:
    """(types of both operands, name of the operation in the model) of every matrix product."""
    types = dict(TYPE.findall(text))
    calls = r'(?: dot| custom-call)\(%([\w.\-]+), %([\w.\-]+)[^\n]*?op_name="([^"]*dot_general[^"]*)"'
    found = re.findall(calls, text)
    return [(types[a], types[b], name) for a, b, name in found]


def written(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """(operation, shape without ones) of every array that a program writes, but of none that stays inside a fusion."""
    inside = set(re.findall(r"(?:calls|to_apply)=%([\w.\-]+)", text))
    found, name = [], ""
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%([\w.\-]+) .*\{$", line):
            name = header[1]
            continue
        made = re.match(r"\s+(?:ROOT )?%[\w.\-]+ = (.*?) ([\w\-]+)\(", line)
        if made and name not in inside and made[2] not in NOT_WRITTEN:
            found += [(made[2], tuple(int(n) for n in dims.split(",") if n != "1"))
                      for dims in re.findall(r"\w+\[([\d,]+)\]", made[1])]
    return found


@pytest.mark.parametrize(("precision", "linear"), [("none", "bf16"), ("fp8", "f8e4m3fn")])
def test_a_chunk_fits_an_h100_and_multiplies_in_the_types_asked_for(precision, linear, tmp_path):
    if reason := load_script().why_not():
        pytest.skip(reason)
    if precision != "none":
        pytest.importorskip("qwix")
    done = subprocess.run(
        [sys.executable, "-m", "helios_jax.tools.compile_check", "--config", "configs/stage3_dmd.py:post", "--topology",
         "h100", "--sample", "1", "--set", "mesh.fsdp=1", "--set", f"objective.transformer.num_layers={LAYERS}",
         "--precision", precision, "--json", str(tmp_path / "report.json"), "--hlo", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"})
    assert done.returncode == 0 and done.stdout.endswith("it fits\n"), done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())["programs"]
    assert [program["name"] for program in report] == [*(f"sampling, level {i}" for i in range(3)), "decoding"]
    for level in range(3):
        text = (tmp_path / f"sampling_level_{level}.hlo").read_text()
        assert "mosaic_gpu" in text  # the attention kernel
        found = products(text)
        inner = [(a, b) for a, b, name in found if LINEAR.search(name)]
        assert len(inner) >= 8 and set(inner) == {(linear, linear)}, found
        # In float32 multiply only what the original keeps so: the timestep's embedding, the 4x4 covariance of noise.
        wide = {name for a, b, name in found if "f32" in (a, b)}
        assert all("ConditionEmbedder.time/" in name or "btyxcj,ij->btyxci" in name for name in wide), wide
        # The host need not ask the device whether a loop goes on.
        assert all("known_trip_count" in line for line in text.splitlines() if " while(" in line)
        # No weight is written anew, neither cut out of a stack nor in another order, and no activation of the
        # feed-forward is transposed.
        arrays = written(text)
        assert len(arrays) > 100
        assert not [made for made in arrays if len(made[1]) > 1 and set(made[1]) <= {DIM, HIDDEN}]
        assert not [made for made in arrays if made[0] in ("copy", "transpose") and {DIM, HIDDEN} & set(made[1])]
