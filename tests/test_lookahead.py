"""Lookahead and frames as bytes change when and where work is done, never its result."""

from __future__ import annotations

import threading

import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.diffusion.noise import SeededNoise
from helios_jax.errors import UserError
from helios_jax.pipeline.pipeline import HeliosPipeline
from helios_jax.video import to_uint8
from tests.tiny_checkpoint import write_tiny_checkpoint

PROMPTS = ("a red circle moving right", "a blue square")


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return HeliosPipeline.from_pretrained(write_tiny_checkpoint(tmp_path_factory.mktemp("model") / "m", "distilled"))


def start(pipe, **options):
    return pipe.stream(PROMPTS[0], **{"steps": 1, "num_frames": 99, **options})


@pytest.fixture(scope="module")
def plain(pipe):
    return list(start(pipe))


def assert_same(chunks, wanted):
    chunks = list(chunks)
    assert [c.index for c in chunks] == [c.index for c in wanted]
    for ours, theirs in zip(chunks, wanted, strict=True):
        np.testing.assert_array_equal(ours.latents, theirs.latents)
        np.testing.assert_array_equal(ours.frames, theirs.frames)


class WatchedNoise(SeededNoise):
    """Remembers the chunks it was asked for."""

    def normal(self, purpose, index, shape):
        self.chunks = [*getattr(self, "chunks", []), index[0]]
        return super().normal(purpose, index, shape)


def test_the_next_chunk_is_begun_before_this_one_is_handed_out_and_none_beyond_it(pipe, plain):
    source = WatchedNoise((42,))
    stream = start(pipe, lookahead=True, noise=source)
    for k, wanted in enumerate(plain):
        chunk = next(stream)
        if k < 2:
            stream._begun[k + 1]()
        assert set(source.chunks) == set(range(min(k + 2, 3))) and stream.position == k + 1
        assert_same([chunk], [wanted])
    with pytest.raises(StopIteration):
        next(stream)


def test_a_chunk_does_not_wait_until_the_next_one_is_begun(pipe, plain, monkeypatch):
    stream, may_begin = start(pipe, lookahead=True), threading.Event()
    begin = stream._begin
    monkeypatch.setattr(stream, "_begin", lambda k, condition: (k == 0 or may_begin.wait(60)) and begin(k, condition))
    first = next(stream)
    may_begin.set()
    assert_same([first, *stream], plain)


def test_a_chunk_that_could_not_be_begun_can_be_asked_for_again(pipe, plain, monkeypatch):
    stream = start(pipe, lookahead=True)
    first = next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(stream, "_begin", lambda *_: (_ for _ in ()).throw(MemoryError))
        stream._begun.clear()
        with pytest.raises(MemoryError):
            next(stream)
    assert_same([first, *stream], plain)


def test_a_change_of_prompt_applies_to_the_chunk_that_was_begun_already(pipe, plain):
    def live(lookahead):
        stream = start(pipe, lookahead=lookahead)
        yield next(stream)
        stream.set_prompt(PROMPTS[1])
        yield from stream

    changed = list(live(False))
    assert_same(live(True), changed)
    assert not np.array_equal(changed[1].frames, plain[1].frames)


def test_a_chunk_interrupted_during_the_copy_can_be_asked_for_again(pipe, plain, monkeypatch):
    stream = start(pipe, lookahead=True)
    first = next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(np, "concatenate", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    assert_same([first, *stream], plain)


def test_bytes_made_on_the_device_equal_those_made_on_the_host(pipe, plain):
    chunks = list(start(pipe, frames_dtype="uint8", lookahead=True))
    assert all(c.frames.dtype == np.uint8 for c in chunks)
    for ours, theirs in zip(chunks, plain, strict=True):
        np.testing.assert_array_equal(ours.frames, to_uint8(theirs.frames))
    assert len(np.unique(chunks[0].frames)) > 50


def test_numbers_that_are_not_finite_are_an_error_in_bytes_too(pipe, monkeypatch):
    decode = pipe.decode_uint8
    monkeypatch.setattr(pipe, "decode_uint8", lambda latents: decode(latents.at[0, 0, 0, 0, 0].set(jnp.nan)))
    with pytest.raises(UserError, match="frames: got NaN or infinity"):
        next(start(pipe, frames_dtype="uint8"))


def test_an_unknown_dtype_of_frames_is_refused(pipe):
    with pytest.raises(UserError, match="frames_dtype: one of float32, uint8, got 'uint16'"):
        start(pipe, frames_dtype="uint16")
