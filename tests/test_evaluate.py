"""The tool that judges a model of moving shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helios_jax.errors import UserError
from helios_jax.pipeline.pipeline import DTYPES, HeliosPipeline
from helios_jax.tools import evaluate

ROOT = Path(__file__).resolve().parents[1]
BOX = ROOT / "assets/helios-tiny"
PROMPTS = ROOT / "assets/prompts/held_out_200.json"


@pytest.mark.slow
def test_several_processes_judge_as_one_does(tmp_path, capsys):
    reports = []
    for processes in ("1", "2"):
        path = tmp_path / f"{processes}.json"
        with pytest.raises(SystemExit) as exit_:
            evaluate.main(["--model", str(BOX), "--prompts", str(PROMPTS), "--limit", "2", "--steps", "2",
                           "--batch", "1", "--num_frames", "33", "--processes", processes, "--json", str(path)])
        assert exit_.value.code == 0
        reports.append(json.loads(path.read_text()))
    one, two = ({key: value for key, value in report.items() if key != "seconds"} for report in reports)
    assert one == two and one["videos"] == 2 and one["variant"] == "base"
    assert [item["prompt"] for item in one["each"]] == [e["prompt"] for e in json.loads(PROMPTS.read_text())[:2]]
    assert "of 2, 95 % interval" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "dtype"), [([], "float32"), (["--dtype", "bfloat16"], "bfloat16")])
def test_a_model_is_judged_in_the_dtype_that_is_asked_for(folders, tmp_path, monkeypatch, flags, dtype):
    load, loaded = HeliosPipeline.from_pretrained, []
    monkeypatch.setattr(HeliosPipeline, "from_pretrained", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[-1])
    with pytest.raises(SystemExit) as exit_:
        evaluate.main(["--model", str(folders["distilled"]), "--prompts", str(PROMPTS), "--limit", "1", "--steps", "1",
                       "--batch", "1", "--num_frames", "33", "--json", str(tmp_path / "report.json"), *flags])
    assert exit_.value.code == 0
    assert json.loads((tmp_path / "report.json").read_text())["dtype"] == dtype
    assert [pipeline.transformer.dtype for pipeline in loaded] == [DTYPES[dtype]]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--prompts", "nowhere.json"], "--prompts: nowhere.json cannot be read"),
    (["--processes", "0"], "--processes: must be positive, got 0"),
    (["--limit", "-19"], "--limit: must be positive, got -19"),
    (["--num_frames", "0"], "--num_frames: must be positive, got 0"),
    (["--steps", "a,b"], "--steps: whole numbers with commas between them expected, got 'a,b'"),
    (["--json", "."], "cannot be written"),
])
def test_a_mistake_is_one_clear_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        evaluate.main(["--model", str(BOX), "--prompts", str(PROMPTS), *arguments])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and message in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(("change", "message"), [
    ({"seed": "x"}, "entry 1 needs a whole seed of at least 0, got 'x'"),
    ({"num_frames": 0}, "entry 1 needs a whole num_frames of at least 1, got 0"),
    ({"attributes": {"colour": "red"}}, "entry 1: attributes: "),
    ({"attributes": {"colour": "mud", "shape": "circle", "direction": "up", "background": "dark"}},
     "entry 1: attributes: colour: got 'mud'"),
])
def test_a_wrong_entry_of_the_prompt_file_is_named_before_anything_is_sampled(change, message, tmp_path):
    entries = json.loads(PROMPTS.read_text())[:2]
    entries[1] |= change
    (tmp_path / "prompts.json").write_text(json.dumps(entries))
    with pytest.raises(UserError, match=message):
        evaluate.read_prompts(str(tmp_path / "prompts.json"))


def test_videos_that_are_sampled_together_have_one_length():
    entries = [{"num_frames": frames} for frames in (33, 66, 33, 33, 66)]
    settings = evaluate.Settings("", 2, None, None, None, 0)
    assert list(evaluate._groups(settings, entries)) == [([0, 2], 33), ([3], 33), ([1, 4], 66)]
    assert list(evaluate._groups(settings._replace(num_frames=99), entries)) == [
        ([0, 1], 99), ([2, 3], 99), ([4], 99)]
