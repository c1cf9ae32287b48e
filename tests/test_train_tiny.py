"""The chain of commands that makes the models in the box: each is valid, starts from what one before it made, and a
chain that failed goes on where it stopped."""

from __future__ import annotations

import importlib
import subprocess
from pathlib import Path

import pytest

import train
from helios_jax.tools import train_tiny

ROOT = Path(__file__).resolve().parents[1]


def options(command: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(command[2::2], command[3::2], strict=True))


def test_every_command_is_valid_and_starts_from_what_came_before(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    made = {str(train_tiny.PARTS)}
    finished = (Path("runs", name, "export") for name in ("stage1/longer", "stage2_history", "stage3_dmd"))
    for step in train_tiny.steps(train_tiny.PARTS, *finished):
        if step.command[0] == "train.py":
            run, workdir, _ = train.parse_arguments(list(step.command))
            names = ("init_from", "data", "model", "teacher")
            needed = {name: getattr(run.objective, name, "") for name in names}
            assert all(path in made for path in needed.values() if path), (step.name, needed)
            made.add(f"{workdir}/export")
        else:
            given = options(step.command)
            assert all(given[flag] in made for flag in ("--model", "--prompts") if flag in given)
            with pytest.raises(SystemExit):
                importlib.import_module(step.command[1]).main(["--help"])
            listed = capsys.readouterr().out
            assert all(f" {flag} " in listed for flag in given), (step.name, listed)
            made.add(given["--output"])
        assert all(f"runs/{source}/export" in made for source in step.made_from)


class Interpreter:
    """In place of subprocess.run: notes commands and leaves their results; the training ``failing`` ends with code 3,
    ``stopped`` with 0 but without a result."""

    def __init__(self, failing: str, stopped: str):
        self.failing, self.stopped, self.commands = failing, stopped, []

    def __call__(self, command):
        self.commands.append(command[1:])
        if self.failing in command:
            return subprocess.CompletedProcess(command, 3)
        if self.stopped not in command:
            result = train_tiny.Step("", tuple(command[1:])).result
            result.parent.mkdir(parents=True, exist_ok=True)
            result.touch()
        return subprocess.CompletedProcess(command, 0)


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "train.py").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch, *arguments: str, failing: str = "", stopped: str = "") -> tuple[int, list]:
    interpreter = Interpreter(failing, stopped)
    monkeypatch.setattr(train_tiny.subprocess, "run", interpreter)
    with pytest.raises(SystemExit) as ended:
        train_tiny.main(list(arguments))
    return ended.value.code, interpreter.commands


def test_a_chain_that_failed_goes_on_where_it_stopped(project, monkeypatch, capsys):
    code, first = run(monkeypatch, "--first", "stage2", failing="runs/stage3_ode")
    assert code == 2 and "stage3_ode: ended with exit code 3" in capsys.readouterr().err
    code, stopped = run(monkeypatch, "--first", "stage2", stopped="runs/stage3_ode")
    assert code == 2 and "without runs/stage3_ode/export" in capsys.readouterr().err and len(stopped) == 1
    assert [command[0] for command in first] == ["train.py"] * 3 + ["-m", "train.py"]
    assert "--config.objective.init_from=assets/helios-tiny" in first[0]
    code, second = run(monkeypatch, "--first", "stage2")
    assert code == 0 and [command[4] for command in second] == ["runs/stage3_ode", "runs/stage3_dmd"]
    assert run(monkeypatch, "--first", "stage2") == (0, [])


def test_what_was_made_from_another_model_is_made_again(project, monkeypatch):
    assert len(run(monkeypatch, "--first", "stage2")[1]) == 6
    assert len(run(monkeypatch, "--first", "stage1/longer")[1]) == 7  # stage2 starts from its result now
    assert run(monkeypatch, "--first", "stage1/longer") == (0, [])


def test_distillation_starts_from_the_shipped_mid_model_or_from_a_new_one(project, monkeypatch):
    pairs, regression, *_ = run(monkeypatch, "--first", "ode")[1]
    assert options(tuple(pairs))["--model"] == "assets/helios-tiny-mid"
    assert "--config.objective.init_from=assets/helios-tiny-mid" in regression
    pairs, regression, *_ = run(monkeypatch, "--first", "stage2_history")[1][1:]
    assert options(tuple(pairs))["--model"] == "runs/stage2_history/export"
    assert "--config.objective.init_from=runs/stage2_history/export" in regression


def test_shared_components_come_from_the_runs_that_made_them(project, monkeypatch):
    for source, name in (("vae/clips", "vae"), ("text_encoder", "text_encoder"), ("text_encoder", "tokenizer")):
        folder = project / "runs" / source / "export" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(name)
    assert run(monkeypatch, "--last", "latents-square")[0] == 0
    for name in train_tiny.SHARED:
        assert (project / "runs/parts" / name / "config.json").read_text() == name


def test_wrong_ends_are_named(project, monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, "--first", "stage2", "--last", "latents") == (2, [])
    assert "--last: comes before --first stage2, got latents" in capsys.readouterr().err
    (project / "train.py").unlink()
    assert run(monkeypatch) == (2, [])
    assert "the folder of train.py" in capsys.readouterr().err
