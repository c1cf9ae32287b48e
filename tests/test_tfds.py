"""TFDS data sets of latents: the same records as the tools', without TensorFlow, readable by the input pipeline."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helios_jax.data.buckets import bucketed_dataset, folder_buckets
from helios_jax.data.records import decode_record
from helios_jax.errors import UserError
from tests.corpus import CONFIG, fake_encoders, write_corpus

tfds = pytest.importorskip("tensorflow_datasets")

from helios_jax.data import tfds as builders  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def quiet(line: str) -> None:
    """Instead of printing."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    metadata, root = write_corpus(folder)

    def builder(size):
        return builders.VideoLatents(data_dir=folder / "data", metadata=metadata, videos=root, encoders=fake_encoders(),
                                     size=size, settings=CONFIG, report=quiet)

    for size in ("32x64", "64x32"):
        builder(size).download_and_prepare()
    return folder / "data", builder


def test_a_data_source_gives_the_records_of_the_extraction(prepared):
    data, builder = prepared
    for bucket in folder_buckets(data / "extracted"):
        written = {decode_record(bucket.source[i]).info["name"]: decode_record(bucket.source[i])
                   for i in range(len(bucket.source))}
        source = builder(bucket.name).as_data_source(split="train")
        read = [builders.from_example(source[i]) for i in range(len(source))]
        assert sorted(record.info["name"] for record in read) == sorted(written)
        for record in read:
            original = written[record.info["name"]]
            assert (record.captions, record.info) == (original.captions, original.info)
            for field in ("mean", "std", "text", "text_lengths"):
                np.testing.assert_array_equal(getattr(record, field), getattr(original, field))
                assert getattr(record, field).dtype == getattr(original, field).dtype
    assert json.loads((data / "extracted/report.json").read_text())["broken"] == 4


def test_the_input_pipeline_reads_prepared_data_sets_of_several_sizes(prepared):
    data, _ = prepared
    buckets = [builders.tfds_bucket(data / "video_latents" / size / "1.0.0") for size in ("32x64", "64x32")]
    iterator = iter(bucketed_dataset(buckets, 2, seed=0))
    shapes = [next(iterator)["target"].shape for _ in range(8)]
    assert sorted(set(shapes)) == [(2, 9, 4, 8, 2), (2, 9, 8, 4, 2)]
    assert shapes.count((2, 9, 4, 8, 2)) == 5
    assert [bucket.text_rows for bucket in buckets] == [4, 4]
    with pytest.raises(UserError, match="cannot be read as a TFDS data set"):
        builders.tfds_bucket(data / "absent")
    with pytest.raises(UserError, match="split 'test' cannot be read"):
        builders.tfds_bucket(data / "video_latents/32x64/1.0.0", "test")


def test_a_size_that_the_corpus_does_not_have_is_one_clear_line(prepared):
    with pytest.raises(UserError, match="size: the corpus has 32x64, 64x32, got '16x16'"):
        prepared[1]("16x16").download_and_prepare()


def test_procedural_clips_have_a_training_and_a_held_out_split_and_no_tensorflow_is_imported(tmp_path):
    program = f"""
import sys
from helios_jax.data import shapes, tfds
from helios_jax.data.buckets import bucketed_dataset
from helios_jax.data.build_latents import BuildConfig
from tests.corpus import fake_encoders

builder = tfds.ProceduralLatents(data_dir={str(tmp_path)!r}, encoders=fake_encoders(), held_out_clips=2,
                                 settings=BuildConfig(clips=3, sections=1, phrasings=2, height=32, width=64, files=1))
builder.download_and_prepare()
for split, count in (("train", 3), ("held_out", 2)):
    bucket = tfds.tfds_bucket(builder.data_dir, split)
    records = [bucket.decode(bucket.source[i]) for i in range(len(bucket.source))]
    assert len(records) == count and {{record.info["split"] for record in records}} == {{split}}
    assert next(iter(bucketed_dataset([bucket], 2, seed=0)))["target"].shape == (2, 9, 4, 8, 2)
assert "tensorflow" not in sys.modules
print("without TensorFlow")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("without TensorFlow\n"), done.stderr[-2000:]


def test_the_command_line_prepares_every_size_of_a_corpus_and_procedural_clips(tmp_path, monkeypatch, capsys):
    from helios_jax.data.tfds import __main__ as program

    monkeypatch.setattr(program, "encoders", lambda model: fake_encoders())
    metadata, root = write_corpus(tmp_path)
    corpus = ["--model", "m", "--metadata", str(metadata), "--videos", str(root), "--output", str(tmp_path / "set"),
              "--min-frames", "33", "--lengths", "33,66", "--sizes", "32x64,64x32", "--keep", "all"]
    shapes = ["--model", "m", "--clips", "2", "--sections", "1", "--height", "32", "--width", "64", "--files", "1"]
    for arguments in (["videos", *corpus], ["shapes", *shapes]):
        with pytest.raises(SystemExit) as end:
            program.main([*arguments, "--data-dir", str(tmp_path / "data")])
        assert end.value.code == 0
    output = capsys.readouterr().out
    assert "4 broken (listed in" in output and output.count("prepared: ") == 3
    sizes = {str(path.parent.relative_to(tmp_path / "data")) for path in tmp_path.glob("data/**/dataset_info.json")}
    assert sizes == {"video_latents/32x64/1.0.0", "video_latents/64x32/1.0.0", "procedural_latents/32x64/1.0.0"}
    assert len(builders.tfds_bucket(tmp_path / "data/procedural_latents/32x64/1.0.0").source) == 2
