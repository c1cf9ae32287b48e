"""What a run promises: frame counts, chunk by chunk, nothing compiled twice, reproducible, prompts that change.

Here is what the original does not promise. Numbers against it are in ``test_pipeline_parity.py`` and, without PyTorch,
in ``test_pipeline_requests.py``.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.convert.folder import read_component_config
from helios_jax.convert.load import load_component
from helios_jax.diffusion.noise import SeededNoise
from helios_jax.models.vae import WanVAE
from helios_jax.pipeline import pipeline as pipeline_module
from helios_jax.pipeline.prompts import PromptTrack, blend_weight, rows_needed, with_rows
from helios_jax.text import PromptEmbedding
from tests.golden import data

pytestmark = pytest.mark.usefixtures("fully_optimized")
ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ("a red circle moving right", "a blue square", "the star")
LONG_PROMPT = "a yellow star moving down, " * 8  # more than 32 tokens
# Of Base, in this process and in the one with several devices.
SMALL = dict(height=64, width=64, num_frames=40, steps=1, guidance_scale=1.0)
COMPILED = []  # names of all programs that XLA compiled since the tests began


def _listen(event: str, _: float, **details) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(details.get("fun_name"))


jax.monitoring.register_event_duration_secs_listener(_listen)


def start(pipe, prompt=PROMPTS[0], **options):
    """A run of the distilled model; the first chunk takes two steps per stage, the others one."""
    return pipe.stream(prompt, **{"steps": 1, "num_frames": 99, **options})


def bits(chunks) -> list[str]:
    """One digest per chunk, of latents and frames."""
    return [hashlib.sha256(np.asarray(c.latents).tobytes() + c.frames.tobytes()).hexdigest() for c in chunks]


@pytest.fixture(scope="module")
def long_run(distilled):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a user should not see any
        return list(start(distilled))


# --- Frames, chunk by chunk ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count, sizes", [(1, [1]), (33, [33]), (34, [33, 1]), (66, [33, 33]), (99, [33, 33, 33])])
def test_exactly_the_asked_frames_come_and_they_begin_the_longer_video(distilled, long_run, count, sizes):
    stream = start(distilled, num_frames=count)
    chunks = list(stream)
    assert [c.frames.shape for c in chunks] == [(1, n, 64, 64, 3) for n in sizes]
    assert [c.index for c in chunks] == list(range(len(sizes))) and stream.num_chunks == len(sizes)
    video = np.concatenate([c.frames for c in chunks], axis=1)
    longer = np.concatenate([c.frames for c in long_run], axis=1)
    np.testing.assert_array_equal(video, longer[:, :count])
    assert video.dtype == np.float32 and video.min() >= 0 and video.max() <= 1 and video.std() > 0.1


def test_calling_the_pipeline_gives_the_whole_video(distilled, long_run):
    video = distilled(PROMPTS[0], steps=1, num_frames=34)
    np.testing.assert_array_equal(video, np.concatenate([c.frames for c in long_run], axis=1)[:, :34])


class WatchedNoise(SeededNoise):
    """Remembers the chunks it was asked for."""

    def normal(self, purpose, index, shape):
        self.chunks = [*getattr(self, "chunks", []), index[0]]
        return super().normal(purpose, index, shape)


def test_a_chunk_is_handed_out_before_the_next_one_is_begun(distilled, long_run):
    source = WatchedNoise((42,))
    stream = start(distilled, noise=source)
    assert not hasattr(source, "chunks")
    for k in range(3):
        assert stream.position == k
        chunk = next(stream)
        assert set(source.chunks) == set(range(k + 1))
        assert bits([chunk]) == bits([long_run[k]])
    with pytest.raises(StopIteration):
        next(stream)


def test_nothing_is_compiled_after_the_first_chunk(distilled, long_run):
    """Neither for later chunks, nor after a change of prompt, nor for another video of the same size."""
    COMPILED.clear()
    programs = distilled.compiled_programs()
    for _ in start(distilled, num_frames=100, seed=3):  # the first chunk is amplified
        pass
    stream = start(distilled, PROMPTS[1], seed=4)
    next(stream)
    stream.set_prompt(PROMPTS[2])
    next(stream)
    assert COMPILED == [] and distilled.compiled_programs() == programs > 0
    stream.set_prompt(PROMPTS[0], blend=3)  # the interpolation itself is a handful of one-line programs
    next(stream)
    assert distilled.compiled_programs() == programs


def test_the_listener_of_the_test_before_sees_compilations():
    COMPILED.clear()
    jax.jit(lambda x: x * 3.25)(jnp.zeros(7)).block_until_ready()
    assert COMPILED


def test_memory_per_chunk_is_constant(distilled, long_run):
    def in_use():
        return sum(array.nbytes for array in jax.live_arrays())

    stream = start(distilled, num_frames=33 * 6)
    sizes = []
    for chunk in stream:
        del chunk
        sizes.append(in_use())
    # From the second chunk on; the history has its full size from the start.
    assert len(set(sizes[1:])) == 1


def test_without_the_first_frame_later_chunks_see_zeros_in_its_place(distilled, long_run):
    stream = start(distilled, keep_first_frame=False)
    chunks = [next(stream)]
    assert not stream._condition.anchor.any()
    chunks += stream
    same = [ours == theirs for ours, theirs in zip(bits(chunks), bits(long_run), strict=False)]
    assert same == [True, False, False]
    image = np.zeros((64, 64, 3), np.float32)
    assert start(distilled, image=image)._condition.anchor.any()
    assert not start(distilled, image=image, keep_first_frame=False)._condition.anchor.any()


def test_an_interrupted_chunk_can_be_asked_for_again(distilled, long_run, monkeypatch):
    stream = start(distilled)
    next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(distilled, "decode", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    assert bits(stream) == bits(long_run[1:])


# --- Determinism: docs/determinism.md --------------------------------------------------------------------------


def test_a_video_has_the_same_bits_alone_and_in_a_batch(distilled):
    seeds = (7, 8, 7)
    batch = list(start(distilled, PROMPTS, seed=seeds, num_frames=40))
    for i, (prompt, seed) in enumerate(zip(PROMPTS, seeds, strict=True)):
        alone = list(start(distilled, prompt, seed=seed, num_frames=40))
        for ours, other in zip(alone, batch, strict=True):
            np.testing.assert_array_equal(ours.latents[0], other.latents[i])
            np.testing.assert_array_equal(ours.frames[0], other.frames[i])
    assert not np.array_equal(batch[0].frames[0], batch[0].frames[2])  # prompts matter
    again = list(start(distilled, PROMPTS[0], seed=8, num_frames=40))
    assert not np.array_equal(batch[0].frames[0], again[0].frames[0])  # seeds matter


def test_an_animated_image_has_the_same_bits_in_a_batch_and_compiles_once(distilled):
    images = np.clip(data("pictures", 2, 64, 64, 3), -1, 1)
    batch = list(start(distilled, PROMPTS[:2], image=images, num_frames=33))
    COMPILED.clear()
    alone = list(start(distilled, PROMPTS[1], image=images[1], num_frames=33))
    assert "_encode_window" not in "".join(map(str, COMPILED))
    np.testing.assert_array_equal(alone[0].frames[0], batch[0].frames[1])
    text_only = list(start(distilled, PROMPTS[1], num_frames=33))
    assert not np.array_equal(alone[0].frames[0], text_only[0].frames[0])


def test_the_room_for_text_does_not_depend_on_the_batch(base):
    stream = base.stream([PROMPTS[0], LONG_PROMPT], **SMALL)
    assert stream._text_rows == [32, 64]
    assert base.stream(PROMPTS[0], **SMALL)._text_rows == [32]
    assert base.stream(PROMPTS[0], **SMALL, text_rows=100)._text_rows == [128]
    # A schedule is known from the start, a live change makes room when it comes.
    scheduled = base.stream(PROMPTS[0], prompt_schedule=[(1, LONG_PROMPT)], **SMALL)
    assert scheduled._text_rows == [64]
    stream = base.stream(PROMPTS[0], **SMALL)
    stream.set_prompt(LONG_PROMPT)
    assert stream._text_rows == [64]


def test_videos_in_one_program_differ_by_rounding_only(base):
    together = list(base.stream(PROMPTS[:2], videos_at_once=2, **SMALL))
    alone = list(base.stream(PROMPTS[:2], **SMALL))
    for a, b in zip(together, alone, strict=True):
        assert np.abs(a.latents - b.latents).max() < 1e-5 * np.ptp(b.latents)  # measured: 5e-7


@pytest.mark.slow
def test_a_chunk_too_large_for_the_vae_at_once_is_coded_in_steps_to_the_same_numbers(monkeypatch):
    # The VAE in the box: the tiny checkpoints' norms over four channels meet vectors near zero, where rounding rules.
    folder = ROOT / "assets/helios-tiny/vae"
    config = read_component_config(folder, "vae")
    params, vae = load_component(folder, "vae", config, dtype=jnp.float32), WanVAE(config)
    keys = jax.random.split(jax.random.key(0), 3)
    latents, normals = (jax.random.normal(key, (1, 9, 8, 8, config.z_dim)) for key in keys[:2])
    video = jax.random.uniform(keys[2], (1, 33, 64, 64, 3), minval=-1.0)

    def both_ways():
        # Anew each time: a compiled program would not see the other limit.
        return (jax.jit(lambda z: pipeline_module.decode_chunk(vae, params, z))(latents),
                jax.jit(lambda video: pipeline_module._encode_window(vae, params, video, normals))(video))

    whole = both_ways()
    monkeypatch.setattr(pipeline_module, "WHOLE_CHUNK_BYTES", 0)
    in_steps = both_ways()
    assert [a.shape for a in in_steps] == [a.shape for a in whole] == [video.shape, latents.shape]
    for got, want in zip(in_steps, whole, strict=True):
        assert np.abs(got - want).max() < 1e-5 * np.ptp(want)


def test_the_number_of_devices_changes_rounding_only(base, folders, tmp_path):
    program = f"""
import jax
import numpy as np
from helios_jax.pipeline.pipeline import HeliosPipeline
from tests.test_pipeline_behaviour import PROMPTS, SMALL
assert jax.device_count() == 4
stream = HeliosPipeline.from_pretrained({str(folders["base"])!r}).stream(PROMPTS[0], **SMALL)
np.save({str(tmp_path / "latents.npy")!r}, np.concatenate([chunk.latents for chunk in stream], axis=1))
"""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    want = np.concatenate([chunk.latents for chunk in base.stream(PROMPTS[0], **SMALL)], axis=1)
    assert np.abs(np.load(tmp_path / "latents.npy") - want).max() < 1e-5 * np.ptp(want)


# --- Prompts that change ---------------------------------------------------------------------------------------


def test_blending_weights_are_those_of_the_original():
    assert [blend_weight(q, 3) for q in range(5)] == [0, 0.5, 1, 1, 1]
    assert [blend_weight(q, 5) for q in range(5)] == list(np.linspace(0, 1, 5))
    assert blend_weight(0, 0) == blend_weight(0, 1) == 1


def test_a_track_blends_padded_embeddings_and_holds_the_last():
    a, b, c = (PromptEmbedding.from_padded(np.pad(data(tag, 1, rows, 8), ((0, 0), (0, 12 - rows), (0, 0))))
               for tag, rows in (("a", 3), ("b", 7), ("c", 5)))
    track = PromptTrack(a)
    track.change(2, b, blend=5)

    def mixed(first, second, weight):
        return (1 - weight) * np.asarray(first.padded()) + weight * np.asarray(second.padded())

    for chunk, weight in enumerate([0, 0, 0, 0.25, 0.5, 0.75, 1, 1]):
        np.testing.assert_allclose(track.at(chunk).padded(), mixed(a, b, weight), atol=1e-6)
    assert track.at(1) is a and track.at(6) is b and track.at(1000) is b
    # A change in the middle of a blend goes on from the mixture, without a jump.
    track.change(4, c, blend=3)
    middle = track.at(3)
    np.testing.assert_allclose(middle.padded(), mixed(a, b, 0.25), atol=1e-6)
    np.testing.assert_array_equal(track.at(4).padded(), middle.padded())
    np.testing.assert_allclose(track.at(5).padded(), mixed(middle, c, 0.5), atol=1e-6)
    assert track.at(6) is c
    # The same chunk again: the later announcement counts.
    track.change(4, a)
    assert track.at(4) is a and track.at(9) is a


def test_text_rows_are_few_different_numbers_and_lose_nothing():
    embedding = PromptEmbedding.from_padded(np.pad(data("a", 2, 37, 8), ((0, 0), (0, 475), (0, 0))))
    assert [rows_needed([embedding], least) for least in (0, 64, 65, 500, 512)] == [64, 64, 128, 512, 512]
    for count in (64, 128, 37):
        np.testing.assert_array_equal(with_rows(with_rows(embedding, 512), count).padded(), embedding.padded())


def test_a_schedule_does_what_live_changes_do(distilled, long_run):
    scheduled = bits(start(distilled, num_frames=165,
                           prompt_schedule=[{"chunk": 1, "prompt": PROMPTS[1], "blend": 3}, (4, PROMPTS[2])]))
    stream = start(distilled, num_frames=165)
    live = []
    for k in range(5):
        if k == 1:
            stream.set_prompt(PROMPTS[1], blend=3)
        if k == 4:
            stream.set_prompt([PROMPTS[2]])
        live += bits([next(stream)])
    assert live == scheduled
    unchanged = bits(long_run)
    assert scheduled[:2] == unchanged[:2] and scheduled[2] != unchanged[2]  # weights 0 in chunk 1, 1/2 in chunk 2


def test_numpy_numbers_are_numbers(distilled, long_run):
    stream = start(distilled, num_frames=np.int64(33), steps=np.int32(1), seed=np.uint64(42), height=np.int16(64))
    assert bits(stream) == bits(long_run[:1])
