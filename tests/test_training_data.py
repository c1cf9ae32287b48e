"""Input pipelines: what items show, what is random in them, and that their position can be saved."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from helios_jax.data import shapes
from helios_jax.data.buckets import bucketed_dataset, folder_buckets
from helios_jax.data.build_latents import BuildConfig, build, clip_captions
from helios_jax.data.pipeline import LatentFolder, clip_dataset, training_item
from helios_jax.data.records import LatentRecord, decode_record, encode_record
from helios_jax.diffusion.history import HistoryLayout
from helios_jax.errors import UserError

CHANNELS, TEXT_DIM = 2, 3


def fake_video_encoder(video: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean colour of 8x8 blocks of every fourth frame; posterior of constant width 0.1."""
    b, _, height, width, _ = video.shape
    frames = video[:, ::4].astype(np.float32) / 255  # [b, 33, H, W, 3] -> [b, 9, H, W, 3]
    blocks = frames.reshape(b, 9, height // 8, 8, width // 8, 8, 3).mean((3, 5))  # -> [b, 9, h, w, 3]
    return blocks[..., :CHANNELS], np.full_like(blocks[..., :CHANNELS], 0.1)


def fake_text_encoder(captions):
    """One row per word, holding its length; the end token is a row of 99."""
    return [np.array([[len(word)] * TEXT_DIM for word in text.split()] + [[99.0] * TEXT_DIM]) for text in captions]


def small_build(folder, **changes):
    config = dataclasses.replace(BuildConfig(clips=6, sections=4, phrasings=3, files=2), **changes)
    build(config, folder, fake_video_encoder, fake_text_encoder, identity="fake", report=lambda line: None)
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("latents")
    small_build(path)
    return path


def numbered_record(sections: int) -> LatentRecord:
    """Frames numbered 1, 2, 3, ... with a posterior of no width."""
    mean = np.arange(1, 9 * sections + 1, dtype=np.float16).reshape(sections, 9, 1, 1, 1)
    return LatentRecord(mean, np.zeros_like(mean), np.arange(8, dtype=np.float16).reshape(4, 2),
                        np.array([1, 3], np.int32), ("a", "b"), {})


def take(dataset, count: int) -> list[dict]:
    iterator = iter(dataset)
    return [next(iterator) for _ in range(count)]


def assert_equal(a: list[dict], b: list[dict]) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key in x:
            np.testing.assert_array_equal(x[key], y[key])


def test_sections_are_cut_as_the_specification_says():
    """Five sections of frames numbered 1 to 45; the history is the last 19 frames before the target."""
    record = numbered_record(5)
    expected = {
        0: (0, np.zeros(19), np.arange(1, 10)),
        1: (1, [*np.zeros(10), *range(1, 10)], np.arange(10, 19)),
        2: (1, [0, *range(1, 19)], np.arange(19, 28)),
        3: (1, np.arange(9, 28), np.arange(28, 37)),
        4: (1, np.arange(18, 37), np.arange(37, 46)),
    }
    seen = set()
    for seed in range(60):
        item = training_item(record, np.random.default_rng(seed), HistoryLayout(), text_rows=5)
        anchor, history, target = expected[int(item["section"])]
        assert item["anchor"].shape == (1, 1, 1, 1) and item["anchor"].item() == anchor
        np.testing.assert_array_equal(item["history"].ravel(), history)
        np.testing.assert_array_equal(item["target"].ravel(), target)
        seen.add(int(item["section"]))
    assert seen == set(expected)


def test_sections_and_phrasings_are_drawn_uniformly():
    record, rng = numbered_record(5), np.random.default_rng(0)
    items = [training_item(record, rng, HistoryLayout(), text_rows=5) for _ in range(3000)]
    sections = np.bincount([int(i["section"]) for i in items], minlength=5) / 3000
    lengths = np.mean([int(i["text_length"]) == 3 for i in items])
    assert np.abs(sections - 0.2).max() < 4 * np.sqrt(0.2 * 0.8 / 3000)
    assert abs(lengths - 0.5) < 4 * np.sqrt(0.25 / 3000)
    long = next(i for i in items if int(i["text_length"]) == 3)["text"]
    np.testing.assert_array_equal(long, [[2, 3], [4, 5], [6, 7], [0, 0], [0, 0]])


def test_every_look_at_a_record_is_a_fresh_sample_of_the_posterior():
    rng = np.random.default_rng(0)
    shape = (2, 9, 4, 4, 2)
    record = dataclasses.replace(numbered_record(2), mean=np.full(shape, 2, np.float16),
                                 std=np.full(shape, 0.5, np.float16))
    samples = np.stack([record.sample(rng, (0, 1)) for _ in range(50)])
    assert abs(samples.mean() - 2) < 0.02 and abs(samples.std() - 0.5) < 0.02
    assert samples.dtype == np.float32 and not np.array_equal(samples[0], samples[1])


def test_the_anchor_and_its_copy_in_the_history_are_one_sample():
    record = dataclasses.replace(numbered_record(3), std=np.ones((3, 9, 1, 1, 1), np.float16))
    for seed in range(30):
        item = training_item(record, np.random.default_rng(seed), HistoryLayout(), text_rows=5)
        if item["section"] == 1:
            assert item["anchor"].item() == item["history"].ravel()[10]


def test_only_sections_that_are_used_are_sampled(monkeypatch):
    """At most the section, three before it and the first; what is not used has no numbers at all."""
    record, asked = numbered_record(7), []
    sample = LatentRecord.sample
    monkeypatch.setattr(LatentRecord, "sample", lambda self, rng, sections: asked.append(list(sections)) or sample(
        self, rng, sections))
    for seed in range(60):
        item = training_item(record, np.random.default_rng(seed), HistoryLayout(), text_rows=5)
        section = int(item["section"])
        assert asked[-1] == sorted({0, *range(max(section - 3, 0), section + 1)})
        assert item["target"].ravel()[0] == 9 * section + 1 and item["anchor"].item() == (section > 0)
        assert item["history"].ravel()[-1] == 9 * section
    assert [0, 3, 4, 5, 6] in asked and [0] in asked


def test_records_survive_their_serialised_form(folder):
    record = decode_record(latent_source(folder)[0])
    again = decode_record(encode_record(record))
    np.testing.assert_array_equal(record.mean, again.mean)
    np.testing.assert_array_equal(record.text, again.text)
    assert (record.captions, record.info) == (again.captions, again.info)
    for broken in (b"", b"{}", encode_record(record)[:-7], b"\x80\x04\x95pickle"):
        with pytest.raises(UserError, match="a record is damaged or of another kind"):
            decode_record(broken)


def latent_source(folder):
    return LatentFolder.open(folder).source()


def test_a_build_holds_the_clips_and_captions_of_its_seeds(folder):
    config = BuildConfig(clips=6, sections=4, phrasings=3, files=2)
    for index, serialised in enumerate(latent_source(folder)[i] for i in range(6)):
        record = decode_record(serialised)
        clip = shapes.sample_clip(config.first_seed + index, "train", 4 * 33)
        assert record.info["attributes"] == dataclasses.asdict(clip.attributes)
        assert record.captions == clip_captions(config, index) and record.captions[0] == clip.caption
        assert len(record.captions) == 3 and len(set(record.captions)) > 1
        first = record.captions[0], record.captions[2]  # of the data set's own grammar, which names the colour
        assert all(clip.attributes.colour in caption.lower() for caption in first)
        mean, _ = fake_video_encoder(clip.frames.reshape(4, 33, 64, 128, 3))
        np.testing.assert_allclose(record.mean, mean, atol=1e-3)
        for k, caption in enumerate(record.captions):
            rows, length = record.caption_rows(k, 30)
            np.testing.assert_array_equal(rows[:length], fake_text_encoder([caption])[0])
            assert not rows[length:].any()


def test_an_interrupted_build_ends_equal_and_workers_share_one_folder(folder, tmp_path):
    config = BuildConfig(clips=6, sections=4, phrasings=3, files=2)

    def run(worker, workers, encode=fake_video_encoder):
        build(config, tmp_path, encode, fake_text_encoder, identity="fake", worker=worker, workers=workers,
              report=lambda line: None)

    calls = []

    def dies(video):
        calls.append(1)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return fake_video_encoder(video)

    with pytest.raises(KeyboardInterrupt):
        run(0, 1, dies)
    with pytest.raises(UserError, match="holds no dataset.json"):
        LatentFolder.open(tmp_path)
    run(1, 2)
    first = sorted(path.name for path in tmp_path.glob("*.array_record"))
    run(0, 2)
    assert len(first) >= 1
    ours, theirs = latent_source(tmp_path), latent_source(folder)
    assert [ours[i] for i in range(6)] == [theirs[i] for i in range(6)]
    with pytest.raises(UserError, match=r"sections \(was 4, now 3\)"):
        small_build(tmp_path, sections=3)


def test_every_epoch_has_every_record_once_in_another_order_and_shows_it_differently(folder):
    dataset = bucketed_dataset(folder_buckets(folder), 1, seed=5)
    targets = [batch["target"][0] for batch in take(dataset, 18)]
    means = [decode_record(latent_source(folder)[i]).mean.astype(np.float32) for i in range(6)]

    def record_of(target):
        errors = [np.abs(mean - target).mean((1, 2, 3, 4)).min() for mean in means]
        return int(np.argmin(errors))

    orders = [[record_of(target) for target in targets[e * 6:(e + 1) * 6]] for e in range(3)]
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert orders[0] != orders[1] or orders[1] != orders[2]
    assert len({target.tobytes() for target in targets}) == 18


def test_batches_have_the_promised_shapes_and_types(folder):
    batch = take(bucketed_dataset(folder_buckets(folder), 4, seed=0, threads=2), 1)[0]
    rows = LatentFolder.open(folder).text_rows
    expected = {"anchor": ((4, 1, 8, 16, CHANNELS), np.float32), "history": ((4, 19, 8, 16, CHANNELS), np.float32),
                "target": ((4, 9, 8, 16, CHANNELS), np.float32), "section": ((4,), np.int32),
                "text": ((4, rows, TEXT_DIM), np.float32), "text_length": ((4,), np.int32)}
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == expected
    empty, length = LatentFolder.open(folder).empty_prompt()
    assert length == 1 and empty.shape == (rows, TEXT_DIM) and empty[0, 0] == 99 and not empty[1:].any()
    clips = take(clip_dataset(3, seed=0, frames=5), 1)[0]
    assert clips["video"].shape == (3, 5, 64, 128, 3) and clips["video"].dtype == np.uint8
    assert clips["attributes"].shape == (3, 4) and clips["attributes"].dtype == np.int32


def test_clips_are_those_of_their_seeds_and_no_two_runs_share_one():
    batches = take(clip_dataset(2, seed=3, frames=2), 2)
    for number, (batch, row) in enumerate([(b, r) for b in batches for r in range(2)]):
        clip = shapes.sample_clip(3 * 2**32 + number, "train", 2)
        np.testing.assert_array_equal(batch["video"][row], clip.frames)
        names = [values[i] for values, i in zip(shapes.ATTRIBUTE_VALUES.values(), batch["attributes"][row],
                                                strict=True)]
        assert names == list(dataclasses.asdict(clip.attributes).values())
    other = take(clip_dataset(2, seed=4, frames=2), 1)[0]
    assert not np.array_equal(other["video"], batches[0]["video"])


@pytest.mark.parametrize("make", [
    lambda folder, threads: clip_dataset(2, seed=1, frames=2, threads=threads),
    # 4 does not divide 6: epochs overlap
    lambda folder, threads: bucketed_dataset(folder_buckets(folder), 4, seed=1, threads=threads),
])
def test_a_saved_position_continues_the_stream_whatever_the_threads(make, folder):
    whole = take(make(folder, 1), 8)
    iterator = iter(make(folder, 3))
    assert_equal([next(iterator) for _ in range(3)], whole[:3])
    state = json.loads(json.dumps(iterator.get_state()))
    resumed = iter(make(folder, 2))
    resumed.set_state(state)
    assert_equal([next(resumed) for _ in range(5)], whole[3:])


def test_wrong_data_is_one_clear_line(folder, tmp_path):
    with pytest.raises(UserError, match="holds neither buckets.json nor dataset.json"):
        bucketed_dataset(folder_buckets(tmp_path), 2, seed=0)
    with pytest.raises(UserError, match="chunk 5"):
        bucketed_dataset(folder_buckets(folder), 2, seed=0, layout=HistoryLayout(chunk=5))
    with pytest.raises(UserError, match="split: got 'test'"):
        clip_dataset(2, seed=0, split="test")
    with pytest.raises(UserError, match="seed: 0 to"):
        clip_dataset(2, seed=-1)

    def copy(name):
        target = tmp_path / name
        target.mkdir()
        for path in folder.iterdir():
            (target / path.name).write_bytes(path.read_bytes())
        return target, sorted(target.glob("*.array_record"))[0]

    broken, file = copy("missing")
    file.unlink()
    with pytest.raises(UserError, match="lacks 1 of 2 record files"):
        bucketed_dataset(folder_buckets(broken), 2, seed=0)
    broken, file = copy("truncated")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="data: "):
        bucketed_dataset(folder_buckets(broken), 2, seed=0)
    broken, _ = copy("description")
    (broken / "dataset.json").write_text('{"sections": 3')
    with pytest.raises(UserError, match="dataset.json is damaged"):
        bucketed_dataset(folder_buckets(broken), 2, seed=0)
