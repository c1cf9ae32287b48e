"""The reader names what a clip shows, through blur, noise and colour shift, and names nothing that is not there."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from helios_jax.data import reader, shapes
from helios_jax.data.shapes import Attributes
from helios_jax.errors import UserError

COMBINATIONS = shapes.train_combinations() + shapes.held_out_combinations()
CROSS = Attributes("red", "cross", "up", "stripes")
DISC = Attributes("blue", "circle", "left", "stripes")


def _degrade(frames: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    """Blur of 1 px, a colour shift of up to 4 % and a gain of up to 5 %, then noise of 3 %."""
    video = gaussian_filter(frames.astype(np.float32) / 255, (0, 1, 1, 0), mode="nearest")
    video = video * rng.uniform(0.95, 1.05) + rng.uniform(-0.04, 0.04, 3) + 0.03 * rng.standard_normal(video.shape)
    return np.clip(video, 0, 1)


def _read_subset(degraded: bool, stride: int) -> tuple[list[reader.Reading], list[Attributes]]:
    rng = np.random.RandomState(3)
    chosen = [COMBINATIONS[i] for i in np.random.RandomState(4).permutation(len(COMBINATIONS))[::stride]]
    clips = (shapes.render(a, (rng.random_sample(), rng.random_sample()), 33) for a in chosen)
    return [reader.read(_degrade(clip, rng) if degraded else clip) for clip in clips], chosen


@pytest.fixture(scope="module")
def clean():
    return _read_subset(degraded=False, stride=6)


@pytest.fixture(scope="module")
def degraded():
    return _read_subset(degraded=True, stride=8)


def test_real_clips_are_read_right(clean):
    result = reader.score(*clean)
    assert result.total == 171
    assert result.all_fields >= 0.99, result


def test_blurred_noisy_shifted_clips_are_read_right(degraded):
    result = reader.score(*degraded)
    assert result.all_fields >= 0.99, result


def test_shuffled_captions_are_near_chance(clean):
    shuffled, chance = reader.shuffled_score(*clean)
    for field, names in shapes.ATTRIBUTE_VALUES.items():
        assert chance[field] == pytest.approx(1 / len(names), abs=0.02)
        assert shuffled[field] == pytest.approx(chance[field], abs=0.05)


def test_crossing_an_edge_disturbs_no_measurement():
    for direction in shapes.DIRECTIONS:
        attributes = Attributes("cyan", "triangle", direction, "light")
        found = reader.read(shapes.render(attributes, (0.01, 0.99), 24))
        assert found.confidence == dict.fromkeys(("colour", "shape", "background", "direction"), 1.0)
        np.testing.assert_allclose(found.velocity, shapes.DIRECTIONS[direction], atol=0.02)


def test_float_and_uint8_frames_read_the_same():
    clip = shapes.render(CROSS, (0.9, 0.1), 33)
    assert reader.read(clip) == reader.read(clip / 255)


def test_other_sizes_are_read():
    for height, width in [(32, 64), (128, 192), (96, 96)]:
        found = reader.read(shapes.render(CROSS, (0.9, 0.1), 25, height, width))
        assert all(found.matches(CROSS).values()), (height, width, found)
        np.testing.assert_allclose(found.velocity, (-height / 64, 0), atol=0.08)


def test_centres_are_those_of_the_renderer():
    for shape in shapes.SHAPES:
        attributes = Attributes("yellow", shape, "down right", "gradient")
        table = reader.analyse(shapes.render(attributes, (0.13, 0.92), 40))
        truth = shapes.positions(attributes, (0.13, 0.92), 40, 64, 128)
        world = np.array([64, 128])
        error = (table.centre - truth + world / 2) % world - world / 2
        assert np.abs(error).max() < 0.6, shape


@pytest.mark.parametrize("background", shapes.BACKGROUNDS)
def test_an_empty_background_shows_no_object(background):
    still = np.repeat(shapes.render_background(background)[None] / 255, 33, axis=0)
    found = reader.read(still + 0.02 * np.random.RandomState(0).standard_normal(still.shape))
    assert (found.colour, found.shape, found.direction, found.background) == (None, None, None, background)


def test_what_is_unclear_is_not_guessed():
    clip = shapes.render(CROSS, (0.2, 0.3), 33)
    background = shapes.render_background("stripes")
    is_object = np.abs(clip - background).max(-1, keepdims=True) > 10
    noise = reader.read(np.random.RandomState(0).rand(9, 64, 128, 3))
    assert (noise.colour, noise.shape, noise.direction, noise.background) == (None,) * 4
    still = reader.read(np.repeat(clip[:1], 33, axis=0))
    assert (still.shape, still.direction) == ("cross", None)
    assert reader.read(clip[:1]).direction is None
    assert reader.read(np.where(is_object, clip, np.uint8(112))).background is None  # plain grey is not striped
    assert reader.read(np.where(is_object, np.uint8(250), clip)).colour is None  # white is none of the eight
    second = shapes.render(DISC, (0.7, 0.8), 33)
    both = np.where(np.abs(second - background).max(-1, keepdims=True) > 10, second, clip)
    assert reader.read(both).shape is None  # two objects are not one


def test_each_field_is_judged_by_itself():
    found = reader.read(shapes.render(CROSS, (0.2, 0.3), 33))
    assert found.matches(Attributes("red", "circle", "down", "stripes")) == {
        "colour": True,
        "shape": False,
        "direction": False,
        "background": True,
    }


def test_a_minute_is_kept_only_if_first_last_and_most_windows_agree():
    whole = shapes.render(CROSS, (0.2, 0.3), 33 * 9 + 10)
    every = reader.read_long(whole)
    assert len(every.windows) == 10
    assert every.kept(CROSS) == {"shape": True, "colour": True, "direction": True}

    def spliced(first: int, last: int) -> dict[str, bool]:
        video = whole.copy()
        video[first:last] = shapes.render(DISC, (0.2, 0.3), last - first)
        return reader.read_long(video).kept(CROSS)

    assert all(spliced(66, 165).values())  # lost for a while in the middle, found again
    assert not any(spliced(0, 33).values())
    assert not any(spliced(len(whole) - 33, len(whole)).values())
    assert not any(spliced(33, 33 * 8).values())
    assert reader.read_long(whole[:33]).kept(DISC) == {"shape": False, "colour": False, "direction": False}
    assert every.hit_rates(CROSS) == dict.fromkeys(reader.FIELDS, 1.0)


def test_wilson_interval_matches_published_values():
    np.testing.assert_allclose(reader.wilson_interval(180, 200), (0.8506, 0.9344), atol=1e-4)
    np.testing.assert_allclose(reader.wilson_interval(20, 20), (0.8389, 1.0), atol=1e-4)
    np.testing.assert_allclose(reader.wilson_interval(0, 10), (0.0, 0.2775), atol=1e-4)


def test_plain_numbers_measure_what_they_say():
    clip = shapes.render(Attributes("pink", "square", "down left", "dark"), (0.5, 0.5), 99)
    assert reader.motion_amplitude(clip) == pytest.approx(math.sqrt(2), abs=0.05)
    assert reader.motion_amplitude(np.repeat(clip[:1], 20, axis=0)) == pytest.approx(0, abs=0.01)

    assert reader.temporal_coherence(np.repeat(clip[:1], 9, axis=0)) == pytest.approx(1, abs=1e-5)
    assert abs(reader.temporal_coherence(np.random.RandomState(0).rand(9, 64, 128, 3))) < 0.02

    assert reader.colour_drift(clip) == pytest.approx(0, abs=0.05)
    brighter = np.clip(clip / 255 + np.linspace(0, 0.2, len(clip))[:, None, None, None], 0, 1)
    assert reader.colour_drift(brighter) > 5

    assert reader.seam_jump(clip) == pytest.approx(1, abs=0.1)
    jumpy = clip.copy()
    jumpy[33:66] = np.roll(jumpy[33:66], 30, axis=2)
    assert reader.seam_jump(jumpy) > 5
    assert reader.seam_jump(jumpy, chunk=40) < 1.1


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: reader.read(np.zeros((4, 64, 128), np.uint8)), "frames"),
        (lambda: reader.read(np.zeros((4, 64, 128, 3), np.int32)), "frames"),
        (lambda: reader.read(np.zeros((0, 64, 128, 3), np.uint8)), "frames"),
        (lambda: reader.read(np.zeros((4, 16, 32, 3), np.uint8)), "height"),
        (lambda: reader.read_long(np.zeros((8, 64, 128, 3), np.uint8)), "window"),
        (lambda: reader.wilson_interval(3, 2), "hits"),
        (lambda: reader.score([], []), "readings"),
        (lambda: reader.seam_jump(np.zeros((8, 64, 128, 3), np.uint8)), "chunk"),
    ],
)
def test_mistakes_are_named(call, named):
    with pytest.raises(UserError, match=named):
        call()
