"""Every fast path of sampling gives the latents of the plain path, on the models in the box and at odd sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from helios_jax.models import streaming
from helios_jax.pipeline.pipeline import HeliosPipeline
from helios_jax.video import to_uint8
from tests.fast_paths import (
    LENGTH_AND_SEED,
    PROMPT,
    RUNS,
    SHARDED,
    PlainPipeline,
    Run,
    Stage,
    latents_of,
    load,
    stages_of,
)
from tests.test_sampling_mesh import found_by_the_worker

pytestmark = pytest.mark.slow  # three minutes of processor time
# float32: largest error, of the latents' range. bfloat16: root mean square error against plain float32, in units of
# what the plain path errs in bfloat16.
FLOAT32_ERROR, BFLOAT16_ERRORS = 1e-5, 1.1
DTYPES = ("float32", "bfloat16")


class Path(NamedTuple):
    """How to sample: the plain pipeline with one thing changed or its weights elsewhere, or the pipeline of users."""

    change: Callable[[Any, Run], Any] = lambda pipeline, run: None
    kind: type[HeliosPipeline] = PlainPipeline
    loading: dict[str, Any] = {}
    stream: dict[str, Any] = {}


def keep_layers_apart(pipeline: PlainPipeline, _: Run) -> None:
    pipeline.change(unroll=0)
    pipeline._layers_apart = True
    pipeline._bind(pipeline.params)


def compile_ahead(pipeline: HeliosPipeline, run: Run) -> None:
    pipeline.compile(PROMPT, **run.options)


PATHS = {
    "last block without history": Path(lambda pipeline, _: pipeline.change(for_sampling=True)),
    "layers unrolled": Path(lambda pipeline, _: pipeline.change(unroll=0)),
    "layers apart": Path(keep_layers_apart),
    "attention by heads": Path(lambda pipeline, _: pipeline.change(attention="per_head")),
    "attention kernel, interpreted": Path(lambda pipeline, _: pipeline.change(attention="mosaic_tpu_interpret")),
    "text once a prompt": Path(lambda pipeline, _: setattr(pipeline, "text_once", True)),
    "history once a chunk": Path(lambda pipeline, _: setattr(pipeline, "history_once", True)),
    "streamed": Path(loading={"stream_weights": True}),
    "compiled ahead": Path(compile_ahead, HeliosPipeline),
    "all together, lookahead": Path(kind=HeliosPipeline, loading={"unroll": None}, stream={"lookahead": True}),
}


# What is tried of the other runs: parts of the box that behave as in "base" are left out.
TRIED = {
    "base": PATHS,
    "distilled": PATHS.keys() - {"layers unrolled", "attention kernel, interpreted"},
    "restricted": ("history once a chunk", "all together, lookahead"),
}
CASES = [(run, path) for run, paths in TRIED.items() for path in PATHS if path in paths]


@functools.cache
def plain(run: str, dtype: str) -> np.ndarray:
    return latents_of(load(RUNS[run], dtype, PlainPipeline, unroll=1), RUNS[run])


@functools.cache
def plain_stages(dtype: str) -> list[Stage]:
    """Of the Distilled model; in bfloat16 each begins as in float32."""
    begun = () if dtype == "float32" else plain_stages("float32")
    return stages_of(load(RUNS["distilled"], dtype, PlainPipeline, unroll=1), RUNS["distilled"], begun)


def made(path: str, run: str, dtype: str) -> HeliosPipeline:
    how = PATHS[path]
    pipeline = load(RUNS[run], dtype, how.kind, **{"unroll": 1, **how.loading})
    how.change(pipeline, RUNS[run])
    return pipeline


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.square(x.astype(np.float64)).mean()))


def assert_equals_plain(latents: np.ndarray, run: str, dtype: str) -> None:
    exact = plain(run, "float32")
    assert np.ptp(exact[0]) > 1 < np.ptp(exact[1])
    if dtype == "float32":
        error = np.abs(latents - exact).max() / np.ptp(exact)
        print(f"\n{error:.1e} of the range")
        assert error <= FLOAT32_ERROR
    else:
        errors = rms(latents - exact) / rms(plain(run, dtype) - exact)
        print(f"\n{errors:.3f} times the plain path's error")
        assert errors <= BFLOAT16_ERRORS


@pytest.fixture
def stream_all(monkeypatch):
    """Lets the small weights of a tiny model stream, too."""
    monkeypatch.setattr(streaming, "SMALL_WEIGHT", 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("run", "path"), [(run, path) for run, path in CASES if run != "distilled"])
def test_a_fast_path_gives_the_latents_of_the_plain_path(run, path, dtype, stream_all):
    assert_equals_plain(latents_of(made(path, run, dtype), RUNS[run], **PATHS[path].stream), run, dtype)


@pytest.mark.parametrize("path", [path for run, path in CASES if run == "distilled"])
def test_a_fast_path_gives_the_latents_of_the_plain_path_at_every_level_of_the_pyramid(path, stream_all):
    assert_equals_plain(latents_of(made(path, "distilled", "float32"), RUNS["distilled"], **PATHS[path].stream),
                        "distilled", "float32")


@pytest.mark.parametrize("path", ["last block without history", "attention by heads", "all together, lookahead"])
def test_stages_of_a_few_step_model_err_in_bfloat16_as_on_the_plain_path(path):
    """A third of a stage's squared error lies in a hundredth of its numbers: two roundings of one stage differ about
    twofold, either way, and a whole run magnifies that. So the stages begin with the plain float32 path's inputs, and
    what is bounded is the ratio's geometric mean over the stages of several videos."""
    exact = plain_stages("float32")
    got = stages_of(made(path, "distilled", "bfloat16"), RUNS["distilled"], exact, **PATHS[path].stream)
    errors = [rms(ours.made - want.made) / rms(theirs.made - want.made)
              for ours, theirs, want in zip(got, plain_stages("bfloat16"), exact, strict=True)]
    typical = float(np.exp(np.log(errors).mean()))
    print(f"\n{typical:.3f} times the plain path's error, {min(errors):.2f} to {max(errors):.2f} by stage")
    assert len(errors) == 24 and typical <= BFLOAT16_ERRORS


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return found_by_the_worker(tmp_path_factory.mktemp("sharded"), "paths")


@pytest.mark.parametrize(("run", "mesh", "dtype"), SHARDED)
def test_a_mesh_gives_the_latents_of_the_plain_path(run, mesh, dtype, sharded):
    assert_equals_plain(np.array(sharded[f"{run} {mesh} {dtype}"], np.float32), run, dtype)


def test_bytes_that_are_made_ahead_are_those_of_the_plain_paths_frames():
    pipeline = load(RUNS["base"], "float32", with_frames=True)
    chunks = pipeline.stream(PROMPT, lookahead=True, frames_dtype="uint8", **RUNS["base"].options, **LENGTH_AND_SEED)
    for chunk, latents in zip(chunks, plain("base", "float32"), strict=True):
        wanted = to_uint8(np.asarray(pipeline.decode(latents)))
        assert np.ptp(wanted) > 50  # a picture
        # What stands at a half may be rounded to either side.
        assert np.abs(chunk.frames.astype(int) - wanted).max() <= 1
