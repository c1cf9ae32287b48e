"""From a folder of videos to records: what they hold, what a kill costs, and what becomes of broken videos."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from helios_jax.data import extract as extraction
from helios_jax.data import videos
from helios_jax.data.extract import extract, make_plan
from helios_jax.data.pipeline import LatentFolder
from helios_jax.data.records import decode_record
from helios_jax.errors import UserError
from tests.corpus import CONFIG, encode_text, encode_video, entry, numbered_frames, write_corpus, write_video

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def run(corpus, output, video=encode_video, config=CONFIG, **options):
    metadata, root = corpus
    options = {"identity": "fake", "report": lambda line: None, **options}
    return extract(videos.read_metadata(metadata), config, root, output, video, encode_text, **options)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("latents")
    return output, run(corpus, output)


def contents(output: Path) -> dict[str, bytes | list[bytes]]:
    """Every file; of record files the records, since the container's own bytes hold the time of writing."""
    read = {}
    for path in sorted(output.rglob("*")):
        if path.suffix == ".array_record":
            from array_record.python.array_record_data_source import ArrayRecordDataSource

            source = ArrayRecordDataSource(str(path))
            read[str(path.relative_to(output))] = [source[i] for i in range(len(source))]
        elif path.is_file():
            read[str(path.relative_to(output))] = path.read_bytes()
    return read


def test_records_hold_the_sections_and_captions_of_their_clips(corpus, finished):
    output, _ = finished
    entries = videos.read_metadata(corpus[0])
    assert json.loads((output / "buckets.json").read_text()) == {"buckets": {"32x64": 5, "64x32": 3}}
    names = []
    for size, (height, width) in (("32x64", (32, 64)), ("64x32", (64, 32))):
        folder = LatentFolder.open(output / size)
        source = folder.source()
        assert (folder.frames, 8 * folder.height, 8 * folder.width, folder.fps) == (9, height, width, 24)
        assert folder.text_rows == 4 and folder.sections == 2  # three words and the end; the same for all sizes
        empty, length = folder.empty_prompt()
        assert length == 1 and empty[0, 0] == 99
        for record in map(decode_record, (source[i] for i in range(len(source)))):
            (item,) = [e for e in entries if [e["path"], e["cut"]] == [record.info["path"], record.info["cut"]]][:1]
            clip = videos.parse_entry(item)
            frames, assigned = CONFIG.buckets.assign(clip)
            sections = list(videos.read_sections(corpus[1], clip, frames, assigned, CONFIG.seed))
            mean, std = encode_video(np.stack(sections))
            np.testing.assert_array_equal(record.mean, mean.astype(np.float16))
            np.testing.assert_array_equal(record.std, std.astype(np.float16))
            assert record.captions == tuple(item["cap"]) and len(record.mean) == frames // 33
            for k, caption in enumerate(record.captions):
                rows, length = record.caption_rows(k, 9)
                np.testing.assert_array_equal(rows[:length], encode_text([caption])[0])
            names.append(record.info["name"])
    assert len(set(names)) == 8


def test_broken_videos_are_left_out_counted_and_listed(finished):
    output, report = finished
    assert report == json.loads((output / "report.json").read_text())
    assert (report["entries"], report["records"], report["left_out"], report["broken"]) == (14, 8, 2, 4)
    broken = {(item["entry"], item["path"]): item["reason"] for item in report["broken_clips"]}
    assert list(broken) == [(6, "noise.mp4"), (7, "absent.mp4"), (11, "wide.mp4"), (12, "wide.mp4")]
    for reason, expected in zip(broken.values(), ("cannot be decoded", "is missing", "has 150 frames", "crop: 0 <= x0"),
                                strict=True):
        assert expected in reason
    assert [(item["entry"], item["reason"]) for item in report["left_out_clips"]] == [
        (5, "shorter than 33 frames"), (13, "the same clip as an earlier entry")]
    assert sum(report["reasons"].values()) == 6


def test_workers_share_one_folder_and_give_what_one_gives(corpus, finished, tmp_path):
    assert run(corpus, tmp_path, worker=1, workers=2) is None
    with pytest.raises(UserError, match="holds no dataset.json"):
        LatentFolder.open(tmp_path / "32x64")
    assert run(corpus, tmp_path, worker=0, workers=2) == finished[1]
    assert contents(tmp_path) == contents(finished[0])


def test_a_run_interrupted_anywhere_ends_equal_and_keeps_what_was_finished(corpus, finished, tmp_path):
    calls, written = collections.Counter(), {}
    for limit in (0, 3, 5, 2):
        def dies(video, limit=limit):
            if calls[limit] == limit:
                raise KeyboardInterrupt
            calls[limit] += 1
            return encode_video(video)

        with pytest.raises(KeyboardInterrupt):
            run(corpus, tmp_path, dies)
        times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.array_record")}
        assert written.items() <= times.items()
        written = times
    assert written
    run(corpus, tmp_path)
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in written.items())
    assert contents(tmp_path) == contents(finished[0])


def test_a_killed_process_is_resumed_and_nothing_of_it_remains(corpus, finished, tmp_path):
    program = ("import sys; from tests import corpus; from helios_jax.data import extract; "
               "extract.encoders = lambda model: corpus.slow_encoders(); "
               "extract.main(sys.argv[1:])")
    arguments = ["--model", "none", "--metadata", corpus[0], "--videos", corpus[1], "--output", tmp_path,
                 "--min-frames", "33", "--lengths", "33,66", "--sizes", "32x64,64x32", "--keep", "all",
                 "--captions", "2", "--clips-per-file", "2"]

    def start(seconds):
        return subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], cwd=ROOT,
                                stdout=subprocess.PIPE, text=True,
                                env={**os.environ, "JAX_PLATFORMS": "cpu", "SECONDS_PER_CALL": str(seconds)})

    process = start(0.5)
    while not list(tmp_path.rglob("*.array_record")):
        assert process.poll() is None
        time.sleep(0.05)
    while not [path for path in tmp_path.rglob(".*array_record.*") if path.exists()]:  # it is inside the next file
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("latents*.array_record")}
    assert before and not (tmp_path / "report.json").exists()
    process = start(0)
    output, _ = process.communicate()
    assert process.returncode == 0 and "complete: 8 of 14 clips written" in output and "4 broken" in output
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in before.items())
    assert contents(tmp_path) == contents(finished[0])


def test_a_folder_never_mixes_models_settings_or_corpora(corpus, finished, tmp_path):
    output, _ = finished
    with pytest.raises(UserError, match=r"identity \(was 'fake', now 'other'\)"):
        run(corpus, output, identity="other")
    with pytest.raises(UserError, match=r"captions \(was 2, now 1\)"):
        run(corpus, output, config=dataclasses.replace(CONFIG, captions=1))
    metadata = tmp_path / "more.json"
    metadata.write_text(json.dumps([*videos.read_metadata(corpus[0]), entry("wide.mp4", (1, 80))]))
    with pytest.raises(UserError, match="metadata"):
        run((metadata, corpus[1]), output)


def test_wrong_input_is_one_clear_line(corpus, tmp_path, capsys):
    with pytest.raises(UserError, match="videos: .* is no folder"):
        run((corpus[0], tmp_path / "absent"), tmp_path / "a")
    with pytest.raises(UserError, match="none of 1 clips can be used: 1 x shorter than 33 frames"):
        make_plan([entry("a.mp4", (0, 5))], CONFIG)
    metadata = tmp_path / "clips.json"
    metadata.write_text(json.dumps([entry("noise.mp4", (0, 50))]))
    with pytest.raises(UserError, match="none of 1 clips could be read, .*report.json; the first: noise.mp4: "):
        run((metadata, corpus[1]), tmp_path / "b")
    with pytest.raises(UserError, match="not finite in float16"):
        run(corpus, tmp_path / "c", lambda video: tuple(np.inf * a for a in encode_video(video)))
    for field in ("captions", "clips_per_file", "sections_per_call"):
        with pytest.raises(UserError, match=f"{field}: must be positive"):
            dataclasses.replace(CONFIG, **{field: 0})
    base = ["--model", "m", "--metadata", str(corpus[0]), "--videos", str(corpus[1]), "--output", str(tmp_path / "d")]
    for extra, message in [(["--worker", "2/2"], "worker: i/n"), (["--sizes", "32"], "sizes: sizes as"),
                           (["--lengths", "x"], "lengths: numbers"), (["--keep", "1x2"], "keep: 1x2 is not among"),
                           ([], "none of 14 clips can be used")]:
        with pytest.raises(SystemExit) as end:
            extraction.main([*base, *extra])
        assert end.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


def test_latents_and_embeddings_are_those_of_the_model(tmp_path):
    """The model in the box through the command line, against its networks applied by hand."""
    import jax
    import jax.numpy as jnp

    from helios_jax.convert.folder import read_component_config
    from helios_jax.convert.load import load_component
    from helios_jax.data.encoders import text_encoder
    from helios_jax.models.vae import WanVAE

    model = ROOT / "assets/helios-tiny"
    write_video(tmp_path / "a.mp4", numbered_frames(70, 48, 80))
    item = {**entry("a.mp4", (2, 69)), "crop": [3, 75, 2, 47]}
    (tmp_path / "clips.json").write_text(json.dumps([item]))
    with pytest.raises(SystemExit) as end:
        extraction.main(["--model", str(model), "--metadata", str(tmp_path / "clips.json"), "--videos", str(tmp_path),
                         "--output", str(tmp_path / "set"), "--min-frames", "66", "--lengths", "66", "--sizes",
                         "16x32", "--keep", "all"])
    assert end.value.code == 0
    record = decode_record(LatentFolder.open(tmp_path / "set/16x32").source()[0])
    sections = np.stack(list(videos.read_sections(tmp_path, videos.parse_entry(item), 66, (16, 32))))
    config = read_component_config(model / "vae", "vae")
    params = load_component(model / "vae", "vae", config, dtype=jnp.float32)
    encode = jax.jit(lambda video: WanVAE(config).apply({"params": params}, video, method=WanVAE.encode))
    for section, mean, std in zip(sections, record.mean, record.std, strict=True):
        raw, logvar = encode(section[None])
        scale = np.asarray(config.latents_std)
        np.testing.assert_allclose(mean, (raw[0] - np.asarray(config.latents_mean)) / scale, atol=4e-3)
        np.testing.assert_allclose(std, np.exp(0.5 * np.asarray(logvar[0])) / scale, rtol=4e-3)
    assert record.captions == ("a caption",)
    np.testing.assert_allclose(record.text, text_encoder(model)[0](["a caption"])[0], atol=4e-3)
