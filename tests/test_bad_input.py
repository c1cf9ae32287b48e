"""What a run says of data and checkpoints that are damaged or not its own: one clear line, and nothing overwritten.

Mistakes in configurations and flags stand in test_training_loop.py, meshes that do not fit in test_sharding.py and
test_sampling_mesh.py, missing data in test_training_data.py and test_training_sizes.py.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import training_toy_config

from helios_jax.data.buckets import bucketed_dataset, folder_buckets
from helios_jax.data.random_latents import write_random_latents
from helios_jax.errors import UserError
from helios_jax.training.config import run_config
from helios_jax.training.loop import train

ROOT = Path(__file__).resolve().parents[1]


def toy_run(**changes):
    config = training_toy_config.get_config()
    config.update({"num_steps": 4, "checkpoint_every": 2, **changes})
    return run_config(config)


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def quiet(line: str) -> None:
    del line


def assert_refused(run, workdir: Path, message: str) -> None:
    before = contents(workdir / "checkpoints"), contents(workdir).get("metrics.jsonl")
    with pytest.raises(UserError, match=message) as caught:
        train(run, workdir, print_line=quiet)
    assert "\n" not in str(caught.value)
    assert (contents(workdir / "checkpoints"), contents(workdir).get("metrics.jsonl")) == before


@pytest.fixture
def finished(tmp_path) -> Path:
    train(toy_run(), tmp_path / "run", print_line=quiet)
    return tmp_path / "run"


def test_the_checkpoint_of_another_model_is_refused(finished):
    """Its configuration is gone, so that only the arrays can tell."""
    (finished / "config.json").unlink()
    assert_refused(toy_run(objective={"width": 12}), finished, "checkpoint .*4 cannot be restored: .*another model")


@pytest.mark.parametrize("item", ["params", "optimizer", "data"])
def test_a_truncated_checkpoint_is_refused(finished, item):
    files = [path for path in (finished / "checkpoints/4" / item).rglob("*") if path.is_file()]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert_refused(toy_run(), finished, "checkpoint .*4 cannot be restored: it is damaged")


def test_a_checkpoint_without_a_part_is_refused(finished):
    for path in sorted((finished / "checkpoints/4/ema").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (finished / "checkpoints/4/ema").rmdir()
    assert_refused(toy_run(), finished, "checkpoint .*4 cannot be restored")


def test_a_configuration_changed_in_two_places_is_refused_with_both(finished):
    assert_refused(toy_run(ema_decay=0.5, optimizer={"learning_rate": 0.5}), finished,
                   re.escape("ema_decay (was 0.9, now 0.5); optimizer.learning_rate (was 0.01, now 0.5)"))


def test_a_damaged_configuration_file_is_refused(finished):
    (finished / "config.json").write_text('{"seed": 3')
    assert_refused(toy_run(), finished, "config.json: cannot be read")


def test_a_start_that_fails_does_not_tie_the_folder_to_its_settings(tmp_path):
    with pytest.raises(UserError, match="mesh"):
        train(toy_run(mesh={"data": 64}, ema_decay=0.5), tmp_path / "run", print_line=quiet)
    assert not (tmp_path / "run").exists()
    assert train(toy_run(), tmp_path / "run", print_line=quiet).step == 4


def test_a_file_in_place_of_the_checkpoints_is_refused(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match="checkpoints is a file"):
        train(toy_run(), tmp_path, print_line=quiet)


@pytest.mark.parametrize(("change", "message"), [
    ({"optimizer": {"learning_rate": float("inf")}}, "optimizer.learning_rate: a finite number expected, got inf"),
    ({"ema_decay": float("nan")}, "ema_decay: a finite number expected, got nan"),
    ({"seed": 2**32}, "seed: below 2.32, got 4294967296"),
])
def test_numbers_that_cannot_be_meant_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        toy_run(**change)


FULL_DISK = """
import resource, sys
from pathlib import Path
import numpy as np
from helios_jax.data.writing import record_file
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    with record_file(Path(sys.argv[1])) as writer:
        for _ in range(64):
            writer.write(np.random.default_rng(0).bytes(100_000))
except OSError:
    sys.exit(7)
"""


@pytest.mark.parametrize("full_at", ["0", "100000"])
def test_a_full_disk_is_an_os_error_and_leaves_no_part_of_a_record_file(full_at, tmp_path):
    """A limit on the size of files stands for the disk, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path / "a.array_record"), full_at], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert not list(tmp_path.iterdir())


def test_a_corrupt_record_is_named_when_it_is_read(tmp_path):
    write_random_latents(tmp_path, clips=4, sections=1, height=4, width=4, channels=2, text_rows=2, text_dim=3)
    file = tmp_path / "random.array_record"
    whole = bytearray(file.read_bytes())
    whole[2000:2064] = bytes(64)
    file.write_bytes(whole)
    iterator = iter(bucketed_dataset(folder_buckets(tmp_path), 4, seed=0, threads=2))
    with pytest.raises(UserError, match=r"data: (record \d of .* cannot be read|a latent record is damaged)") as caught:
        for _ in range(4):
            next(iterator)
    assert "\n" not in str(caught.value)
