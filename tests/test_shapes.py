"""The procedural data set: exact at any length, a split that hides 20 %, and evaluation prompts fixed beforehand."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest

from helios_jax.data import shapes
from helios_jax.data.shapes import Attributes
from helios_jax.errors import UserError

EXAMPLE = Attributes("red", "triangle", "down left", "stripes")


def test_there_are_1024_combinations_and_a_fifth_is_held_out():
    train, held_out = shapes.train_combinations(), shapes.held_out_combinations()
    assert len(train) + len(held_out) == 8 * 4 * 8 * 4
    assert len(held_out) == 205
    assert not set(train) & set(held_out)


def test_every_pair_of_attribute_values_is_seen_in_training():
    fields = list(shapes.ATTRIBUTE_VALUES)
    train = [dataclasses.asdict(a) for a in shapes.train_combinations()]
    for first, second in itertools.combinations(fields, 2):
        seen = {(a[first], a[second]) for a in train}
        assert seen == set(itertools.product(shapes.ATTRIBUTE_VALUES[first], shapes.ATTRIBUTE_VALUES[second]))


def test_training_clips_never_show_a_held_out_combination():
    held_out = set(shapes.held_out_combinations())
    for seed in range(300):
        assert shapes.sample_clip(seed, "train", 1).attributes not in held_out
        assert shapes.sample_clip(seed, "held_out", 1).attributes in held_out


def test_windows_of_a_minute_equal_the_whole_clip():
    whole = shapes.render(EXAMPLE, (0.3, 0.7), 1440)
    windows = [shapes.render(EXAMPLE, (0.3, 0.7), 33, first_frame=first) for first in range(0, 1440 - 32, 33)]
    np.testing.assert_array_equal(whole[: 33 * len(windows)], np.concatenate(windows))


@pytest.mark.parametrize("direction", shapes.DIRECTIONS)
def test_the_shape_moves_in_its_direction_by_the_stated_speed(direction):
    """At height 64 the speed is a whole pixel, so each frame is the torus shift of the one before (dark: plain)."""
    video = shapes.render(Attributes("pink", "cross", direction, "dark"), (0.93, 0.97), 200)
    down, right = shapes.DIRECTIONS[direction]
    for previous, frame in zip(video, video[1:], strict=False):
        np.testing.assert_array_equal(frame, np.roll(previous, (down, right), (0, 1)))


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_wrapping_neither_loses_nor_adds_area(shape):
    areas = []
    for start in [(0.5, 0.5), (0.0, 0.5), (0.5, 0.0), (0.0, 0.0)]:
        frame = shapes.render(Attributes("yellow", shape, "up", "dark"), start, 1)[0].astype(float)
        areas.append(((frame - frame.min(axis=(0, 1))) / 230).sum())
    assert max(areas) - min(areas) < 1e-9


def test_edges_are_anti_aliased_and_frames_scale_with_height():
    small = shapes.render(EXAMPLE, (0.5, 0.5), 1, 64, 128)[0].astype(float)
    large = shapes.render(EXAMPLE, (0.5, 0.5), 1, 192, 384)[0].astype(float)
    averaged = large.reshape(64, 3, 128, 3, 3).mean(axis=(1, 3))
    assert np.abs(averaged - small).mean() < 0.6  # of 255
    assert len(np.unique(small[:, :, 0])) > 6


def test_samples_are_functions_of_seed_and_split():
    one, again, other = (shapes.sample_clip(s, "train", 5) for s in (7, 7, 8))
    np.testing.assert_array_equal(one.frames, again.frames)
    assert (one.caption, one.start) == (again.caption, again.start)
    assert one.start != other.start
    assert shapes.sample_clip(7, "held_out", 5).start != one.start
    assert one.frames.shape == (5, 64, 128, 3) and one.frames.dtype == np.uint8


def test_captions_name_the_attributes_in_many_phrasings():
    rng = np.random.RandomState(0)
    texts = {shapes.caption(EXAMPLE, rng) for _ in range(2000)}
    assert len(texts) > 300
    for text in texts:
        lowered = text.lower()
        assert "a red triangle" in lowered and "left" in lowered
        assert "down" in lowered or "lower" in lowered or "bottom" in lowered
        assert "strip" in lowered
    assert any("an orange" in shapes.caption(Attributes("orange", "circle", "up", "dark"), rng) for _ in range(3))


def test_no_caption_fits_two_combinations():
    """Otherwise the shuffled-caption check and the training would be ambiguous."""
    owner: dict[str, Attributes] = {}
    rng = np.random.RandomState(1)
    for attributes in shapes.train_combinations() + shapes.held_out_combinations():
        for _ in range(20):
            assert owner.setdefault(shapes.caption(attributes, rng).lower(), attributes) == attributes


@pytest.mark.parametrize("name", shapes.PROMPT_FILES)
def test_the_committed_prompt_files_are_what_the_code_generates(name):
    text = (shapes.PROMPT_FOLDER / name).read_text(encoding="utf-8")
    assert text == shapes.prompt_file_text(name)
    entries = json.loads(text)
    held_out = set(shapes.held_out_combinations())
    combinations = {Attributes(**entry["attributes"]) for entry in entries}
    assert len(combinations) == len(entries) == shapes.PROMPT_FILES[name][0]
    assert combinations <= held_out
    assert len({entry["seed"] for entry in entries}) == len(entries)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: Attributes("mauve", "circle", "up", "dark"), "colour"),
        (lambda: Attributes("red", "hexagon", "up", "dark"), "shape"),
        (lambda: shapes.sample_clip(0, "test", 1), "split"),
        (lambda: shapes.sample_clip(-1, "train", 1), "seed"),
        (lambda: shapes.render(EXAMPLE, (0, 0), 0), "frames"),
        (lambda: shapes.render(EXAMPLE, (0, 0), 1, 64, 16), "size"),
        (lambda: shapes.evaluation_prompts(300, 99, 0), "count"),
    ],
)
def test_mistakes_are_named(call, named):
    with pytest.raises(UserError, match=named):
        call()
