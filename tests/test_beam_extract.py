"""The Beam pipeline writes what the plain tool writes, with several workers, and says what is missing."""

from __future__ import annotations

import functools
import os
import sys

import pytest

from helios_jax.data import beam_extract, videos
from helios_jax.data.extract import extract
from helios_jax.errors import UserError
from tests.corpus import CONFIG, encode_text, encode_video, fake_encoders, noting_encoders, write_corpus
from tests.test_extract import contents


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def test_without_beam_one_line_says_what_to_install(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(SystemExit) as end:
        beam_extract.main(["--model", "m", "--metadata", str(corpus[0]), "--videos", str(corpus[1]), "--output",
                           str(tmp_path / "set"), "--runner", "DirectRunner"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and "pip install apache-beam" in error


@pytest.mark.parametrize("mode", ["multi_threading", "multi_processing"])
def test_several_workers_write_what_the_plain_tool_writes_and_either_resumes_the_other(corpus, tmp_path, mode):
    pytest.importorskip("apache_beam")
    entries = videos.read_metadata(corpus[0])
    plain = extract(entries, CONFIG, corpus[1], tmp_path / "plain", encode_video, encode_text, identity="fake",
                    report=lambda line: None)
    if mode == "multi_processing":  # this run finds one file of the plain tool's worker 1 of 4 already there
        extract(entries, CONFIG, corpus[1], tmp_path / "beam", encode_video, encode_text, identity="fake", worker=1,
                workers=4, report=lambda line: None)
    flags = ["--runner=DirectRunner", "--direct_num_workers=2", f"--direct_running_mode={mode}"]
    lines, processes = [], tmp_path / "processes"
    processes.mkdir()
    load = functools.partial(noting_encoders, str(processes))
    report = beam_extract.extract_with_beam(entries, CONFIG, corpus[1], tmp_path / "beam", load, flags,
                                            lines.append)
    assert report == plain and "4 broken" in lines[-1]
    assert contents(tmp_path / "beam") == contents(tmp_path / "plain")
    elsewhere = {int(path.name) for path in processes.iterdir()} - {os.getpid()}
    assert bool(elsewhere) == (mode == "multi_processing")
    again = beam_extract.extract_with_beam(entries, CONFIG, corpus[1], tmp_path / "beam", load, flags, lines.append)
    assert again == plain and "of which 0 are to be written" in lines[-2]


def test_a_worker_with_another_model_writes_nothing(corpus, tmp_path):
    from helios_jax.data.extract import make_plan

    plan = make_plan(videos.read_metadata(corpus[0]), CONFIG)
    step = beam_extract.WriteUnit(CONFIG, str(corpus[1]), str(tmp_path), fake_encoders, "another")
    with pytest.raises(UserError, match="a worker has fake, the run began with another"):
        step(plan.units[0])
    assert not list(tmp_path.iterdir())
