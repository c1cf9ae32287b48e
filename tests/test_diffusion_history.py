"""History, anchor, condition noise and guidance are those of the original pipelines."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import data

from helios_jax.diffusion import guidance, history
from helios_jax.diffusion.history import HistoryLayout
from helios_jax.errors import UserError

LAYOUT = HistoryLayout()


def numbered(first: int, last: int, batch: int = 1) -> np.ndarray:
    """Frames whose every value is the frame's number, [batch, last - first + 1, 1, 2, 3]."""
    numbers = np.arange(first, last + 1, dtype=np.float32)[None, :, None, None, None]
    return np.broadcast_to(numbers, (batch, last - first + 1, 1, 2, 3))


def numbers(frames) -> list[int]:
    """The numbers of frames made by :func:`numbered`, whose values must all agree."""
    frames = np.asarray(frames)
    assert (frames == frames[..., :1, :1, :1]).all()
    return frames[..., 0, 0, 0].reshape(-1).astype(int).tolist()


# --- layout ----------------------------------------------------------------------------------------------------------


def test_index_vectors_are_those_of_the_original():
    indices = LAYOUT.indices()
    assert indices.long == tuple(range(1, 17)) and indices.mid == (17, 18)
    assert indices.short == (0, 19) and indices.current == tuple(range(20, 29))


def test_other_sizes_are_sorted_and_counted():
    layout = HistoryLayout(sizes=(2, 8, 4), chunk=3)
    assert layout.sizes == (8, 4, 2) and layout.frames == 14
    indices = layout.indices()
    assert indices.mid == (9, 10, 11, 12) and indices.short == (0, 13, 14) and indices.current == (15, 16, 17)
    tiers = layout.split(numbered(1, 14), numbered(99, 99))
    assert numbers(tiers.long) == list(range(1, 9)) and numbers(tiers.mid) == [9, 10, 11, 12]
    assert numbers(tiers.short) == [99, 13, 14]


@pytest.mark.parametrize("options", [{"sizes": (16, 2)}, {"sizes": (16, 2, 0)}, {"sizes": (16, 2, 1.5)}])
def test_wrong_history_sizes_are_named(options):
    with pytest.raises(UserError, match="history_sizes"):
        HistoryLayout(**options)


def test_a_wrong_chunk_is_named():
    with pytest.raises(UserError, match="num_latent_frames_per_chunk"):
        HistoryLayout(chunk=0)


# --- buffer ----------------------------------------------------------------------------------------------------------


def test_the_buffer_holds_the_newest_frames_of_an_endless_video():
    """Equal to the original's ever-growing tensor, of which the last 19 frames are used."""
    buffer = LAYOUT.empty(2, 1, 2, 3)
    growing = np.zeros((2, 19, 1, 2, 3), np.float32)
    for chunk in range(5):
        frames = numbered(9 * chunk + 1, 9 * chunk + 9, batch=2)
        buffer = LAYOUT.append(buffer, jnp.asarray(frames, jnp.bfloat16))
        growing = np.concatenate([growing, frames], axis=1)
        assert buffer.shape == (2, 19, 1, 2, 3) and buffer.dtype == jnp.float32
        np.testing.assert_array_equal(buffer, growing[:, -19:])
    tiers = LAYOUT.split(buffer, jnp.asarray(numbered(1, 1, batch=2)))
    assert numbers(tiers.long[:1]) == list(range(27, 43)) and numbers(tiers.mid[:1]) == [43, 44]
    assert numbers(tiers.short[:1]) == [1, 45]


def test_an_image_takes_the_newest_slot():
    assert numbers(LAYOUT.append(LAYOUT.empty(1, 1, 2, 3), numbered(5, 5))) == [0] * 18 + [5]


@pytest.mark.parametrize("chunks,expected", [(1, [0] * 10 + list(range(1, 10))), (2, [0] + list(range(1, 19))),
                                             (3, list(range(9, 28)))])
def test_a_video_fills_the_newest_slots(chunks, expected):
    assert numbers(LAYOUT.append(LAYOUT.empty(1, 1, 2, 3), numbered(1, 9 * chunks))) == expected


def test_append_compiles_once_for_every_chunk():
    compilations = []

    @jax.jit
    def append(buffer, frames):
        compilations.append(None)
        return LAYOUT.append(buffer, frames)

    buffer = LAYOUT.empty(1, 1, 2, 3)
    for chunk in range(4):
        buffer = append(buffer, numbered(9 * chunk + 1, 9 * chunk + 9))
    assert len(compilations) == 1 and numbers(buffer) == list(range(18, 37))


# --- anchor ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_anchor,skip_first,expected", [
    (False, False, [1, 1, 1, 1]), (False, True, [1, 10, 10, 10]), (True, False, [99, 99, 99, 99]),
    (True, True, [99, 10, 10, 10])])
def test_the_anchor_follows_the_original(has_anchor, skip_first, expected):
    anchor = jnp.asarray(numbered(99, 99)) if has_anchor else jnp.zeros((1, 1, 1, 2, 3))
    seen = []
    for chunk in range(4):
        replace = history.replaces_anchor(chunk, has_anchor, skip_first)
        anchor = jax.jit(history.update_anchor)(anchor, numbered(9 * chunk + 1, 9 * chunk + 9), replace)
        seen += numbers(anchor)
    assert seen == expected


# --- condition noise -------------------------------------------------------------------------------------------------


def test_condition_noise_is_mixed_per_frame():
    latents, eps = data("clean", 2, 9, 2, 2, 4), data("noise", 2, 9, 2, 2, 4)
    uniform = np.linspace(0, 0.9, 9, dtype=np.float32)[None]
    sigma = history.noise_sigma(uniform, 0.111, 0.135)
    mixed = np.asarray(history.add_noise(latents, eps, sigma))
    for frame in (0, 4, 8):
        level = 0.111 + 0.024 * uniform[0, frame]
        np.testing.assert_allclose(mixed[:, frame], level * eps[:, frame] + (1 - level) * latents[:, frame], atol=1e-6)
    per_item = history.add_noise(latents, eps, np.array([[0.0], [1.0]], np.float32))
    np.testing.assert_array_equal(per_item[0], latents[0])
    np.testing.assert_array_equal(per_item[1], eps[1])


# --- training windows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("section,anchor,past,target", [
    (0, 0, [0] * 19, range(1, 10)), (1, 1, [0] * 10 + list(range(1, 10)), range(10, 19)),
    (2, 1, [0] + list(range(1, 19)), range(19, 28)), (3, 1, range(9, 28), range(28, 37)),
    (4, 1, range(18, 37), range(37, 46))])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("library", [np, jnp])
def test_training_windows_of_numbered_frames(library, batched, section, anchor, past, target):
    record = library.asarray(numbered(1, 45) if batched else numbered(1, 45)[0])
    window = LAYOUT.training_window(record, section)
    assert numbers(window.anchor) == [anchor]
    assert numbers(window.history) == list(past) and numbers(window.target) == list(target)
    assert all(isinstance(part, type(record)) and part.dtype == record.dtype for part in window)


def test_training_sees_the_history_that_sampling_builds():
    record = numbered(1, 45)
    buffer = LAYOUT.empty(1, 1, 2, 3)
    for section in range(5):
        window = LAYOUT.training_window(record, section)
        np.testing.assert_array_equal(window.history, buffer)
        buffer = LAYOUT.append(buffer, window.target)


@pytest.mark.parametrize("frames,section", [(45, 5), (45, -1), (44, 0)])
def test_a_wrong_section_is_named(frames, section):
    with pytest.raises(UserError, match="section|frames must be a multiple of 9"):
        LAYOUT.training_window(numbered(1, frames), section)


# --- guidance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_guidance_equals_the_original(dtype):
    torch = pytest.importorskip("torch")
    pipelines = pytest.importorskip("diffusers.pipelines.helios.pipeline_helios_pyramid")
    c32, u32 = data("conditional", 2, 3, 4, 4, 5), data("unconditional", 2, 3, 4, 4, 5)
    c, u = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in (c32, u32))
    factor = pipelines.optimized_scale(c.reshape(2, -1), u.reshape(2, -1)).view(2, 1, 1, 1, 1)
    ours = [jnp.asarray(x, dtype) for x in (c32, u32)]
    np.testing.assert_allclose(guidance.zero_star_factor(*ours), factor.numpy(), rtol=0, atol=1e-6)

    scaled = u * factor.to(u.dtype)
    star = guidance.cfg_zero_star(*ours, 5.0)
    plain = guidance.classifier_free_guidance(*ours, jnp.float32(5.0))
    assert star.dtype == plain.dtype == jnp.dtype(dtype)
    atol = 1e-5 if dtype == "float32" else 0.13  # one unit of bfloat16 in the largest values
    np.testing.assert_allclose(np.asarray(star, np.float32), (scaled + 5.0 * (c - scaled)).float(), rtol=0, atol=atol)
    np.testing.assert_allclose(np.asarray(plain, np.float32), (u + 5.0 * (c - u)).float(), rtol=0, atol=atol)


def test_the_zero_star_factor_is_the_best_fit_of_each_sample():
    u = data("fit", 2, 3, 4, 4, 5)
    factor = guidance.zero_star_factor(u * np.array([2.0, -0.5], np.float32).reshape(2, 1, 1, 1, 1), u)
    np.testing.assert_allclose(np.asarray(factor).reshape(-1), [2.0, -0.5], rtol=1e-6)
    assert np.isfinite(guidance.zero_star_factor(u, 0 * u)).all()


def test_zero_init_takes_one_step_more_than_it_says_and_stage_0_only():
    steps = [(stage, step) for stage in range(3) for step in range(4) if guidance.is_zero_init_step(stage, step, 1)]
    assert steps == [(0, 0), (0, 1)]
