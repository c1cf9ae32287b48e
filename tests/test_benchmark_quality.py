"""The table of the models in the box: what is judged and timed, what is not made twice, what it says."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import quality
from helios_jax.tools import evaluate
from tests.tiny_checkpoint import write_tiny_checkpoint


class StandIn:
    """Takes the place of evaluate: notes the command, writes what a run writes."""

    def __init__(self):
        self.commands: list[list[str]] = []
        self.code = 0

    def __call__(self, command, **_):
        flags = command[command.index("-m") + 2 :]
        self.commands.append(flags)
        if self.code == 0:
            given = dict(zip(flags[::2], flags[1::2], strict=True))
            is_long, seed = "long" in given["--prompts"], int(given["--seed_offset"]) // 1000
            steps = [int(n) for n in given["--steps"].split(",")] if "--steps" in given else None
            report = {"model": given["--model"], "steps": steps, "right_in_all": 0.9, "videos": 20 if is_long else 200,
                      "kept_to_the_end": {"all": 19, "of": 20},
                      "plain_numbers": {"motion_px_per_frame": 1.5 + seed, "coherence": 0.98, "colour_drift": 1.0,
                                        "seam_jump": 2}}
            Path(given["--json"]).write_text(json.dumps(report))
        return subprocess.CompletedProcess(command, self.code)


def main(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        quality.main(list(map(str, arguments)))
    return ended.value.code


@pytest.fixture
def run(monkeypatch):
    run = StandIn()
    monkeypatch.setattr(quality.subprocess, "run", run)
    monkeypatch.setattr(quality, "measure_time", lambda row, repeats: {
        "denoising_s": 4.0 if row.steps is None else 0.2, "call_s": 5.0, "machine": {}})
    return run


def test_every_row_is_judged_by_every_seed_and_once_on_the_long_prompts_and_never_twice(run, tmp_path, capsys):
    command = ["--row", "Base=somewhere", "--row", "Distilled [1,1,1]=elsewhere:1,1,1", "--out", tmp_path / "out"]
    assert main(*command) == 0
    given = [dict(zip(flags[::2], flags[1::2], strict=True)) for flags in run.commands]
    assert [(g["--model"], g.get("--steps"), "long" in g["--prompts"], g["--seed_offset"]) for g in given] == [
        (model, steps, is_long, seed) for model, steps in (("somewhere", None), ("elsewhere", "1,1,1"))
        for is_long, seed in ((False, "0"), (False, "1000"), (False, "2000"), (True, "0"))]
    assert all(Path(g["--prompts"]).is_file() for g in given)
    base, distilled = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert (base["right"], base["videos"], base["long"]["kept_to_the_end"]["all"]) == (540, 600, 19)
    assert base["wilson_95"][0] < 0.9 < base["wilson_95"][1]
    assert [part["plain_numbers"]["motion_px_per_frame"] for part in (base, base["long"])] == [2.5, 1.5]  # of all seeds
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].startswith("| Distilled [1,1,1] | 90.0%, 90.0%, 90.0% | 540 of 600") and "| 1/20.0 |" in lines[3]
    assert {line.count("|") for line in lines} == {16}

    (tmp_path / "out" / "base.seed1.json").unlink()
    assert main(*command) == 0
    assert len(run.commands) == 9 and run.commands[-1][-3:-1] == ["1000", "--json"]


def test_a_report_makes_nothing_and_says_what_is_missing(run, tmp_path, capsys):
    command = ["--row", "Base=somewhere", "--row", "Distilled [1,1,1]=elsewhere:1,1,1", "--out", tmp_path / "out"]
    assert main(*command) == 0
    whole = capsys.readouterr().out.splitlines()
    for missing in ("base.long.json", "base.seed2.json", "base.time.json", "quality.json"):
        (tmp_path / "out" / missing).unlink()
    left, run.commands = sorted((tmp_path / "out").iterdir()), []
    assert main(*command, "--report") == 0
    lines = capsys.readouterr().out.splitlines()
    assert not run.commands and sorted((tmp_path / "out").iterdir()) == left
    assert lines[3] == whole[3].replace("| 1/20.0 ", "")  # a column that is empty now
    assert lines[2].startswith("| Base | 90.0%, 90.0%, - | 360 of 400") and lines[2].endswith("| 2.0 |" + 7 * " - |")
    (tmp_path / "empty").mkdir()
    assert main("--row", "Base=somewhere", "--out", tmp_path / "empty", "--report") == 0
    assert "| Base | -, -, - |" in capsys.readouterr().out and not list((tmp_path / "empty").iterdir())


@pytest.mark.parametrize("row", ["Base=somewhere:2", "Base=elsewhere"])
def test_a_part_of_another_model_or_schedule_is_refused(row, run, tmp_path, capsys):
    assert main("--row", "Base=somewhere", "--out", tmp_path / "out") == 0
    assert main("--row", row, "--out", tmp_path / "out", "--report") == 2
    assert "base.seed0.json was made of somewhere with steps of the model" in capsys.readouterr().err


def test_a_report_of_a_folder_that_is_not_there_is_one_line(run, tmp_path, capsys):
    assert main("--row", "Base=somewhere", "--out", tmp_path / "absent", "--report") != 0
    assert f"--out: no such folder: {tmp_path / 'absent'}" in capsys.readouterr().err
    assert not (tmp_path / "absent").exists()


def test_a_run_that_failed_leaves_no_part_behind(run, tmp_path, capsys):
    run.code = 3
    assert main("--row", "Base=somewhere", "--out", tmp_path / "out") != 0
    assert "Base ended with exit code 3" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.seed*"))


@pytest.mark.parametrize("row", ["no folder", "a=b:1,x", "=b"])
def test_a_row_that_cannot_be_read_is_one_line(row, tmp_path, capsys):
    assert main("--row", row, "--out", tmp_path / "out") != 0
    assert f"--row: NAME=FOLDER or NAME=FOLDER:STEPS expected, got {row!r}" in capsys.readouterr().err


def test_the_flags_handed_on_exist(run, tmp_path, capsys):
    assert main("--row", "Base=somewhere:50", "--limit", 3, "--seeds", 1, "--out", tmp_path / "out") == 0
    capsys.readouterr()
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    listed = capsys.readouterr().out
    assert all(f" {flag} " in listed for flag in run.commands[0][::2])


def test_denoising_is_a_part_of_the_whole_call(tmp_path):
    model = write_tiny_checkpoint(tmp_path / "model", "distilled")
    timed = quality.measure_time(quality.Row("any", str(model), "1,1,1"), 1)
    assert 0 < timed["denoising_s"] < timed["call_s"]
