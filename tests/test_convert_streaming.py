"""Conversion streams: its memory is bounded by a layer's size, not by the checkpoint's."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from helios_jax.config import TransformerConfig
from helios_jax.convert.export import config_json, write_safetensors_component
from helios_jax.convert.folder import write_json
from helios_jax.convert.rules import leaves
from helios_jax.convert.sources import block_indices
from tests.convert_folders import write_model

# Runs the converter and prints the peak resident size of that process image alone (ru_maxrss would inherit ours).
MEASURE = """
import re, sys
from helios_jax.convert.__main__ import main
try:
    main(sys.argv[1:])
except SystemExit as exit:
    assert not exit.code, exit.code
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024)
"""


def convert_and_measure(*arguments) -> int:
    """Peak resident bytes of ``python -m helios_jax.convert`` with these arguments."""
    done = subprocess.run([sys.executable, "-c", MEASURE, *map(str, arguments)], capture_output=True, text=True,
                          cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


class SyntheticSource:
    """Leaves of any size whose blocks are made when they are asked for."""

    component = "transformer"
    precision = "none"

    def __init__(self, config, dtype):
        self.config, self._dtype = config, np.dtype(dtype)

    def dtype(self, leaf):
        return self._dtype

    def blocks(self, leaf):
        pattern = np.random.default_rng(len(leaf.key)).standard_normal(1 << 20, np.float32).astype(self._dtype)
        for i, index in enumerate(block_indices(leaf, self._dtype)):
            shape = [s.stop - s.start for s in index]
            yield index, np.resize(np.roll(pattern, 7 * i), math.prod(shape)).reshape(shape)


def write_synthetic(folder, config, dtype, max_shard_bytes):
    """A model folder with a large transformer beside tiny other parts; returns the transformer's bytes."""
    write_model(folder, dtype)
    shutil.rmtree(folder / "transformer")
    source = SyntheticSource(config, dtype)
    write_safetensors_component(folder / "transformer", source, max_shard_bytes)
    write_json(folder / "transformer" / "config.json", config_json("transformer", config))
    return sum(p.stat().st_size for p in (folder / "transformer").glob("*.safetensors"))


def assert_same_files(a, b):
    names = sorted(str(p.relative_to(a)) for p in a.rglob("*") if p.is_file())
    assert names == sorted(str(p.relative_to(b)) for p in b.rglob("*") if p.is_file())
    for name in names:
        assert subprocess.run(["cmp", "-s", a / name, b / name]).returncode == 0, name


@pytest.mark.slow
def test_a_six_gigabyte_checkpoint_converts_both_ways_within_the_memory_bound(tmp_path):
    config = TransformerConfig(num_attention_heads=24, num_layers=22, ffn_dim=12288)
    try:
        size = write_synthetic(tmp_path / "model", config, ml_dtypes.bfloat16, 2_000_000_000)
        assert size >= 6e9
        largest = max(math.prod(leaf.shape) * 2 for leaf in leaves("transformer", config))
        bound = 1e9 + 1.5 * largest
        there = convert_and_measure("--from", tmp_path / "model", "--to", tmp_path / "orbax")
        back = convert_and_measure("--from", tmp_path / "orbax", "--to", tmp_path / "back", "--format", "diffusers",
                                   "--max-shard-gb", 2)
        print(f"\n{size / 1e9:.2f} GB; largest stacked parameter {largest / 1e9:.2f} GB, bound {bound / 1e9:.2f} GB; "
              f"peak to Orbax {there / 1e9:.2f} GB, to diffusers {back / 1e9:.2f} GB")
        assert there <= bound and back <= bound
        for shard in (tmp_path / "model" / "transformer").glob("*"):
            assert subprocess.run(["cmp", "-s", shard, tmp_path / "back" / "transformer" / shard.name]).returncode == 0
    finally:
        for name in ("model", "orbax", "back"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    def peak(layers):
        config = TransformerConfig(num_attention_heads=4, num_layers=layers, ffn_dim=4096, text_dim=64)
        folder = tmp_path / f"{layers}"
        size = write_synthetic(folder, config, np.float32, 10**10)
        return size, convert_and_measure("--from", folder, "--to", tmp_path / f"{layers}-orbax")

    (small, peak_small), (large, peak_large) = peak(1), peak(9)
    assert large - small > 200e6
    assert peak_large - peak_small < 0.3 * (large - small)


def test_a_round_trip_through_orbax_gives_the_same_files(tmp_path):
    write_model(tmp_path / "a", ml_dtypes.bfloat16, max_shard_bytes=50_000)
    for source, target, options in (("a", "b", ["--format", "orbax"]),
                                    ("b", "c", ["--format", "diffusers", "--max-shard-gb", "0.00005"])):
        convert_and_measure("--from", tmp_path / source, "--to", tmp_path / target, *options)
    assert_same_files(tmp_path / "a", tmp_path / "c")
