"""The training loop: exact resume, signals, what is saved, and what a user's mistake says."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import training_toy
import training_toy_config

from helios_jax.errors import UserError
from helios_jax.training.checkpoint import Checkpointer, guard_config, read_params
from helios_jax.training.config import run_config
from helios_jax.training.loop import train

ROOT = Path(__file__).resolve().parents[1]


def toy_run(**changes):
    config = training_toy_config.get_config()
    config.update(changes)
    return run_config(config)


def losses(workdir: Path) -> dict[int, tuple]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: (row["loss"], row["grad_norm"], row["first_error"]) for row in rows if "loss" in row}


def quiet(line: str) -> None:
    del line


def start_program(workdir: Path, *flags: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen([sys.executable, "train.py", "--config", "tests/training_toy_config.py", "--workdir",
                             str(workdir), *flags], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def wait_for_step(process: subprocess.Popen, workdir: Path, step: int) -> None:
    """Returns when the program has logged ``step``."""
    deadline = time.time() + 120
    path = workdir / "metrics.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < step:
        assert process.poll() is None and time.time() < deadline, process.stdout.read()
        time.sleep(0.01)


def test_a_killed_run_resumes_bitwise_equal(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(toy_run(), whole, print_line=quiet)

    process = start_program(killed, "--config.objective.step_sleep=0.05")
    wait_for_step(process, killed, 24)  # checkpoints at 10 and 20: steps 21 to 24 are lost and must come out the same
    process.kill()
    process.wait()
    before = losses(killed)
    assert max(before) < 40
    train(toy_run(), killed, print_line=quiet)

    assert losses(killed) == losses(whole)  # every value of all 40 steps, exactly
    assert {step: before[step] for step in before} == {step: losses(whole)[step] for step in before}
    for part in ("params", "ema"):
        ours, theirs = (read_params(folder, prefer_ema=part == "ema") for folder in (killed, whole))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_sigterm_saves_exits_cleanly_and_the_rest_is_equal(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(toy_run(), whole, print_line=quiet)
    process = start_program(stopped, "--config.objective.step_sleep=0.05")
    wait_for_step(process, stopped, 13)
    process.send_signal(signal.SIGTERM)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    done = max(losses(stopped))
    assert 13 <= done < 40 and f"stopped by SIGTERM at step {done}: saved" in output
    assert Checkpointer(stopped / "checkpoints", 2).latest_step() == done
    lines = []
    train(toy_run(), stopped, print_line=lines.append)
    assert any(f"resumed from step {done}" in line for line in lines)
    assert losses(stopped) == losses(whole)


def test_saved_arrays_are_those_of_their_step_although_buffers_are_donated(tmp_path):
    """The save runs in the background while later steps reuse the same memory."""
    import grain

    double = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    tree = {"a": jax.numpy.zeros((1024, 1024)), "b": jax.numpy.zeros((2048, 512))}
    data = iter(grain.MapDataset.range(5).repeat().to_iter_dataset())
    checkpointer = Checkpointer(tmp_path / "checkpoints", keep_last=2)
    for step in range(1, 40):
        tree = double(tree)
        if step == 3:
            checkpointer.save(step, {"params": tree}, data)
    checkpointer.close()
    for leaf in jax.tree.leaves(read_params(tmp_path)):
        np.testing.assert_array_equal(leaf, 3.0)


def test_checkpoints_are_kept_by_the_two_rules(tmp_path):
    train(toy_run(num_steps=60, checkpoint_every=10, keep_last=2, keep_every=20), tmp_path, print_line=quiet)
    steps = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert steps == [20, 40, 50, 60]


def test_a_fixed_parameter_never_changes_and_has_no_state(tmp_path):
    train(toy_run(), tmp_path, print_line=quiet)
    params, average = read_params(tmp_path, prefer_ema=False), read_params(tmp_path)
    np.testing.assert_array_equal(params["fixed"]["kernel"], 1.0)
    np.testing.assert_array_equal(average["fixed"]["kernel"], 1.0)
    assert not np.allclose(params["layer"]["kernel"], average["layer"]["kernel"])
    array_names = " ".join(path.name for path in (tmp_path / "checkpoints/40/optimizer").rglob("*"))
    assert "fixed.kernel" not in array_names


def test_samples_evaluations_and_tensorboard_files_appear(tmp_path):
    import av

    train(toy_run(sample_every=20, tensorboard=True), tmp_path, print_line=quiet)
    videos = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert videos == ["00000020_kernel.mp4", "00000040_kernel.mp4"]
    with av.open(str(tmp_path / "samples" / videos[0])) as container:
        assert [(frame.height, frame.width) for frame in container.decode(video=0)] == [(16, 8)] * 3
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval/kernel_norm" in row] == [20, 40]
    assert list((tmp_path / "tensorboard").iterdir())


def test_steps_without_a_finite_gradient_change_nothing(tmp_path):
    run = toy_run(objective={"poison_from": 30}, num_steps=20, checkpoint_every=20)
    train(run, tmp_path, print_line=quiet)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert any(row["skipped"] == 1 for row in rows) and any(row["skipped"] == 0 for row in rows)
    assert all((row["loss"] is None) == (row["skipped"] == 1) for row in rows)
    for leaf in jax.tree.leaves(read_params(tmp_path)) + jax.tree.leaves(read_params(tmp_path, prefer_ema=False)):
        assert np.isfinite(leaf).all()


def test_a_diverged_run_stops_and_keeps_its_last_good_checkpoint(tmp_path):
    with pytest.raises(UserError, match="training diverged.*learning_rate"):
        train(toy_run(objective={"poison_from": 0}, num_steps=200, log_every=10), tmp_path, print_line=quiet)


def test_a_changed_configuration_is_refused_on_resume(tmp_path):
    train(toy_run(num_steps=10), tmp_path, print_line=quiet)
    with pytest.raises(UserError, match=r"batch_size \(was 4, now 8\)"):
        train(toy_run(num_steps=10, batch_size=8), tmp_path, print_line=quiet)
    with pytest.raises(UserError, match=r"objective.noise \(was 0.1, now 0.2\)"):
        train(toy_run(num_steps=10, objective={"noise": 0.2}), tmp_path, print_line=quiet)
    with pytest.raises(UserError, match="num_steps"):  # a cosine of another length has other earlier steps
        train(toy_run(num_steps=20), tmp_path, print_line=quiet)
    train(toy_run(num_steps=10, log_every=5, checkpoint_every=3, objective={"step_sleep": 0.01}), tmp_path,
          print_line=quiet)


def test_a_constant_rate_may_be_trained_longer(tmp_path):
    constant = {"schedule": "constant"}
    train(toy_run(num_steps=10, optimizer=constant), tmp_path / "parts", print_line=quiet)
    assert train(toy_run(num_steps=20, optimizer=constant), tmp_path / "parts", print_line=quiet).step == 20
    train(toy_run(num_steps=20, optimizer=constant), tmp_path / "whole", print_line=quiet)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.parametrize("num_steps", [10, 4])
def test_a_run_that_is_given_no_more_steps_than_it_has_made_is_only_exported(num_steps, tmp_path, monkeypatch):
    constant, exported, build = {"schedule": "constant"}, [], training_toy.build
    train(toy_run(num_steps=10, optimizer=constant), tmp_path, print_line=quiet)
    before = read_params(tmp_path)
    monkeypatch.setattr(training_toy, "build", lambda run: dataclasses.replace(
        build(run), export=lambda params, folder: exported.append((params, folder))))
    assert train(toy_run(num_steps=num_steps, optimizer=constant), tmp_path, print_line=quiet).step == 10
    ((params, folder),) = exported
    assert folder == str(tmp_path / "export")
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_a_run_may_be_longer_only_where_the_rates_of_all_players_are_constant(tmp_path):
    def run(num_steps: int, critic: str):
        return run_config({"objective": {"name": "stage3_dmd", "data": "", "init_from": "a", "teacher": "b",
                                         "critic": {"optimizer": {"schedule": critic}}},
                           "batch_size": 1, "num_steps": num_steps, "optimizer": {"schedule": "constant"}})

    for critic in ("constant", "cosine"):
        folder = tmp_path / critic
        folder.mkdir()
        guard_config(folder, run(10, critic))
        with pytest.raises(UserError, match="num_steps") if critic == "cosine" else contextlib.nullcontext():
            guard_config(folder, run(20, critic))


def test_a_damaged_checkpoint_is_one_line_and_nothing_is_overwritten(tmp_path):
    train(toy_run(num_steps=10), tmp_path, print_line=quiet)
    damaged = [path for path in (tmp_path / "checkpoints/10/params").rglob("*") if path.is_file()]
    for path in damaged:
        path.write_bytes(b"")
    with pytest.raises(UserError, match="checkpoint .*10 cannot be restored") as caught:
        train(toy_run(num_steps=10), tmp_path, print_line=quiet)
    assert "\n" not in str(caught.value)
    assert all(path.stat().st_size == 0 for path in damaged)


@pytest.mark.parametrize(("flags", "message"), [
    (["--config.optimzer.name=adamw"], "unknown key 'optimzer'; did you mean 'optimizer'"),
    (["--config.optimizer.nmae=adamw"], "unknown key 'nmae'; did you mean 'name'"),
    (["--config.quite_other=3"], "unknown key 'quite_other'; tests/training_toy_config.py does not list it"),
    (["--config.batch_size=many"], "batch_size=many"),
    (["--config.batch_size=-1"], "batch_size: must be positive, got -1"),
    (["--wrkdir=x"], "Unknown command line flag 'wrkdir'"),
    (["--config.objective.width=0"], "objective.width: must be positive, got 0"),
    (["--config.objective.name=nothing_here"], "config.objective.name: one of"),
    (["--config", "configs/absent.py"], "no such file: configs/absent.py"),
    (["--config", "train.py"], "train.py: cannot be read as a configuration"),
    (["--config", "configs/stage1_init.py:2b"], "error: --config: the size behind the colon is one of 14b, 3b, 1.3b"),
    (["--config", "configs/stage3_dmd.py:1.3b"], "error: --config: the part behind the colon is 'post' or 'gan'"),
    (["--config", "configs/tiny_stage3_ode.py:x"], "error: configs/tiny_stage3_ode.py: cannot be read as"),
    (["stray"], "unexpected argument: 'stray'"),
])
def test_a_command_line_mistake_is_one_line(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    from train import main

    config = [] if "--config" in flags else ["--config", "tests/training_toy_config.py"]
    arguments = ["train.py", *config, "--workdir", str(tmp_path / "run"), *flags]
    monkeypatch.setattr(sys, "argv", arguments)  # ml_collections looks there for the keys to define
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # its name for whatever file was read before
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "run").exists()


def test_an_unusable_workdir_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="workdir: .* cannot be written"):
        train(toy_run(), tmp_path / "file", print_line=quiet)
