"""Batches of several sizes: one size each, in proportion, the same whatever reads them, resumable."""

from __future__ import annotations

import collections
import json

import numpy as np
import pytest

from helios_jax.data import videos
from helios_jax.data.buckets import Bucket, bucketed_dataset, folder_buckets
from helios_jax.data.extract import extract
from helios_jax.data.records import LatentRecord
from helios_jax.diffusion.history import HistoryLayout
from helios_jax.errors import UserError
from tests.corpus import CONFIG, encode_text, encode_video, write_corpus


def bucket(name: str, count: int, height: int, width: int, first: int = 0, text_rows: int = 2) -> Bucket:
    """Records whose latents are their number, with a posterior of no width; one to three sections each."""
    def record(number):
        shape = (1 + number % 3, 9, height, width, 2)
        return LatentRecord(np.full(shape, first + number, np.float16), np.zeros(shape, np.float16),
                            np.zeros((1, 3), np.float16), np.ones(1, np.int32), ("a",), {})

    return Bucket(name, range(count), record, (9, height, width, 2), text_rows, 3)


BUCKETS = (bucket("tall", 5, 4, 2), bucket("wide", 20, 2, 4, 100, 4), bucket("square", 10, 3, 3, 200))


def take(dataset, count: int) -> list[dict]:
    iterator = iter(dataset)
    return [next(iterator) for _ in range(count)]


def numbers(batch: dict) -> list[int]:
    return [int(n) for n in batch["target"][:, 0, 0, 0, 0]]


def assert_equal(a: list[dict], b: list[dict]) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key in x:
            np.testing.assert_array_equal(x[key], y[key])


def test_every_batch_has_one_size_and_every_record_comes_once_in_an_epoch():
    batches = take(bucketed_dataset(BUCKETS, 5, seed=3), 3 * 7)  # three epochs of 35 records
    shapes = {0: (4, 2), 100: (2, 4), 200: (3, 3)}
    for batch in batches:
        (family,) = {number // 100 * 100 for number in numbers(batch)}
        height, width = shapes[family]
        assert {key: value.shape for key, value in batch.items()} == {
            "anchor": (5, 1, height, width, 2), "history": (5, 19, height, width, 2),
            "target": (5, 9, height, width, 2), "section": (5,), "text": (5, 4, 3), "text_length": (5,)}
    orders = []
    for epoch in range(3):
        seen = [number for batch in batches[7 * epoch:7 * epoch + 7] for number in numbers(batch)]
        assert sorted(seen) == [*range(5), *range(100, 120), *range(200, 210)]
        orders.append([number for number in seen if 100 <= number < 200])
    assert orders[0] != orders[1] != orders[2]
    for steps in (7, 14, 21):  # 1 : 4 : 2
        counts = collections.Counter(numbers(batch)[0] // 100 for batch in batches[:steps])
        assert counts == {0: steps // 7, 1: 4 * steps // 7, 2: 2 * steps // 7}


def test_sections_are_drawn_afresh_in_every_epoch():
    sections = collections.defaultdict(set)
    for batch in take(bucketed_dataset((bucket("one", 3, 1, 1),), 3, seed=0), 40):
        for number, section in zip(numbers(batch), batch["section"], strict=True):
            sections[number].add(int(section))
    assert sections == {0: {0}, 1: {0, 1}, 2: {0, 1, 2}}


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_read_disjoint_rows_of_the_batches_of_one(processes):
    whole = take(bucketed_dataset(BUCKETS, 8, seed=1), 12)
    each = 8 // processes
    parts = [take(bucketed_dataset(BUCKETS, 8, seed=1, rows=range(p * each, p * each + each), threads=2), 12)
             for p in range(processes)]
    joined = [{key: np.concatenate([part[key] for part in step]) for key in step[0]}
              for step in zip(*parts, strict=True)]
    assert_equal(joined, whole)


def test_a_saved_position_continues_the_stream_whatever_the_threads():
    whole = take(bucketed_dataset(BUCKETS, 4, seed=2), 12)
    iterator = iter(bucketed_dataset(BUCKETS, 4, seed=2, threads=3))
    assert_equal([next(iterator) for _ in range(5)], whole[:5])
    state = json.loads(json.dumps(iterator.get_state()))
    resumed = iter(bucketed_dataset(BUCKETS, 4, seed=2, threads=2))
    resumed.set_state(state)
    assert_equal([next(resumed) for _ in range(7)], whole[5:])
    with pytest.raises(AssertionError):
        assert_equal(take(bucketed_dataset(BUCKETS, 4, seed=9), 12), whole)


def test_an_extracted_corpus_is_read_with_all_its_sizes(tmp_path):
    metadata, root = write_corpus(tmp_path)
    output = tmp_path / "set"
    with pytest.raises(UserError, match="holds neither buckets.json nor dataset.json"):
        folder_buckets(output)
    extract(videos.read_metadata(metadata), CONFIG, root, output, encode_video, encode_text, identity="fake",
            report=lambda line: None)
    buckets = folder_buckets(output)
    assert [(b.name, len(b.source), b.latents) for b in buckets] == [("32x64", 5, (9, 4, 8, 2)),
                                                                    ("64x32", 3, (9, 8, 4, 2))]
    batches = take(bucketed_dataset(buckets, 2, seed=0), 8)
    assert collections.Counter(b["target"].shape for b in batches) == {(2, 9, 4, 8, 2): 5, (2, 9, 8, 4, 2): 3}
    assert all(b["text"].shape == (2, 4, 3) for b in batches)
    one = folder_buckets(output / "64x32")
    assert [len(b.source) for b in one] == [3] and take(bucketed_dataset(one, 3, seed=0), 1)
    (output / "buckets.json").write_text("{")
    with pytest.raises(UserError, match="buckets.json is damaged"):
        folder_buckets(output)


def test_wrong_arguments_are_one_clear_line():
    for arguments, options, message in [
        (((), 2, 0), {}, "at least one bucket"), ((BUCKETS, 0, 0), {}, "batch_size: positive"),
        ((BUCKETS, 2, -1), {}, "seed: not negative"), ((BUCKETS, 2, 0), {"rows": [2]}, "rows: different numbers"),
        ((BUCKETS, 2, 0), {"rows": []}, "rows"), ((BUCKETS, 2, 0), {"rows": [1, 1]}, "rows"),
        ((BUCKETS, 2, 0, HistoryLayout(chunk=5)), {}, "chunk 5"),
        (((BUCKETS[0], Bucket("x", range(2), lambda n: n, (9, 2, 2, 16), 2, 3)), 2, 0), {}, "channels of x is 16"),
    ]:
        with pytest.raises(UserError, match=message):
            bucketed_dataset(*arguments, **options)
