"""Programs compiled before the weights are there are those that a run uses, and a cache serves only who made it."""

from __future__ import annotations

import pathlib
import shutil
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import sample
from helios_jax.compilation import default_cache, program_place, use_cache
from helios_jax.errors import UserError
from helios_jax.pipeline import sampler
from helios_jax.pipeline.pipeline import HeliosPipeline
from tests.tiny_checkpoint import write_tiny_checkpoint

RUN = dict(steps=1, height=64, width=64)
PROMPT = "a red circle moving right"
PROGRAMS = ("_stage", "decode_chunk_uint8", "text_context", "_encode_ids")
COMPILED, CACHE_HITS = [], []


def _listen(event: str, _: float, **details) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(str(details.get("fun_name")))


jax.monitoring.register_event_duration_secs_listener(_listen)
jax.monitoring.register_event_listener(
    lambda event, **_: CACHE_HITS.append(event) if event == "/jax/compilation_cache/cache_hits" else None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("model") / "m", "distilled")


def compiled(program: str) -> int:
    return sum(program in name for name in COMPILED)


def frames_of_run(pipe: HeliosPipeline) -> np.ndarray:
    return np.concatenate([c.frames for c in pipe.stream(PROMPT, num_frames=66, frames_dtype="uint8", **RUN)], axis=1)


def test_what_is_compiled_beside_the_reading_of_weights_is_all_that_a_run_needs(folder):
    jax.clear_caches()  # other files of the same process may have used the text encoder's program
    COMPILED.clear()
    ahead = HeliosPipeline.from_pretrained(folder, compile_for={"prompts": PROMPT, "frames_dtype": "uint8", **RUN})
    assert [compiled(program) for program in PROGRAMS] == [3, 1, 1, 1]  # three levels of the pyramid
    COMPILED.clear()
    video = frames_of_run(ahead)
    assert [compiled(program) for program in PROGRAMS] == [0, 0, 0, 0]
    # Without it the run compiles them itself: each once, though the first chunk has another past and other steps. The
    # text encoder's program serves all pipelines of a process.
    plain = HeliosPipeline.from_pretrained(folder)
    COMPILED.clear()
    np.testing.assert_array_equal(frames_of_run(plain), video)
    assert [compiled(program) for program in PROGRAMS] == [3, 1, 1, 0]


@pytest.mark.slow
def test_where_the_host_follows_loops_an_amplified_first_chunk_has_programs_of_its_own(folder, monkeypatch):
    want = frames_of_run(HeliosPipeline.from_pretrained(folder))
    monkeypatch.setattr(sampler, "COUNTED_LOOPS", ("cpu",))
    ahead = HeliosPipeline.from_pretrained(folder, compile_for={"prompts": PROMPT, "frames_dtype": "uint8", **RUN})
    COMPILED.clear()
    video = frames_of_run(ahead)
    assert compiled("_stage") == 0
    assert np.abs(video.astype(int) - want).max() <= 1 and np.ptp(want) > 50
    plain = HeliosPipeline.from_pretrained(folder)
    COMPILED.clear()
    frames_of_run(plain)
    assert compiled("_stage") == 6  # of three levels



def test_a_mistake_in_what_is_to_be_compiled_is_told_as_that_in_a_run(folder):
    with pytest.raises(UserError, match="size 64x60"):
        HeliosPipeline.from_pretrained(folder, compile_for={"width": 60, "height": 64})


def test_a_damaged_checkpoint_is_told_while_programs_are_still_being_compiled(folder, tmp_path, monkeypatch):
    damaged, begun, told, ended = tmp_path / "damaged", threading.Event(), threading.Event(), threading.Event()
    shutil.copytree(folder, damaged)
    weights = damaged / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])

    def compile_for_ever(lower):
        begun.set()
        told.wait(10)
        ended.set()

    monkeypatch.setattr("helios_jax.pipeline.pipeline._compiled", compile_for_ever)
    with pytest.raises(UserError, match="truncated"):
        HeliosPipeline.from_pretrained(damaged, compile_for={"prompts": PROMPT, **RUN})
    assert begun.is_set() and not ended.is_set()
    told.set()


@pytest.fixture
def restored():
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_a_cache_serves_a_program_that_was_compiled_before(restored, tmp_path):
    assert use_cache(tmp_path / "cache") is None
    for _ in range(2):
        CACHE_HITS.clear()
        jax.clear_caches()
        jax.jit(lambda x: jnp.tanh(x @ x) * 1.0625)(jnp.ones((3, 3))).block_until_ready()
    assert CACHE_HITS and list((tmp_path / "cache" / program_place()).iterdir())


def test_compile_only_fills_the_cache_for_a_later_run_and_reads_no_weights(folder, restored, tmp_path, monkeypatch):
    def entries() -> set[str]:
        found = (path.name for path in (tmp_path / "cache" / program_place()).iterdir())
        return {name for name in found if any(program in name for program in PROGRAMS)}

    arguments = ["--prompt", PROMPT, "--model", str(folder), "--steps", "1", "--height", "64", "--width", "64",
                 "--quiet", "--num_frames", "1", "--output", str(tmp_path / "v.mp4"), "--compile_cache",
                 str(tmp_path / "cache")]
    jax.clear_caches()
    with monkeypatch.context() as patch:
        patch.setattr("helios_jax.pipeline.pipeline.load_pipeline_params", lambda *_, **__: pytest.fail("read"))
        with pytest.raises(SystemExit) as end:
            sample.main([*arguments, "--compile_only"])
        assert end.value.code == 0 and not (tmp_path / "v.mp4").exists()
    filled = entries()
    assert len([name for name in filled if name.endswith("-cache")]) >= 6  # three levels, decoder, text twice
    jax.clear_caches()
    with pytest.raises(SystemExit) as end:
        sample.main(arguments)
    assert end.value.code == 0 and (tmp_path / "v.mp4").exists()
    assert {name for name in entries() if name.endswith("-cache")} <= filled


def test_programs_of_another_device_are_left_alone_and_one_line_says_so(restored, tmp_path):
    other = tmp_path / "NVIDIA_H100-jax-0.1"
    other.mkdir()
    # The same programs under the same names, but damaged: JAX would say so if it read them.
    assert use_cache(tmp_path / "own") is None
    jax.clear_caches()
    jax.jit(lambda x: jnp.cosh(x @ x) * 1.0625)(jnp.ones((3, 3))).block_until_ready()
    for program in (tmp_path / "own" / program_place()).iterdir():
        (other / program.name).write_bytes(b"made elsewhere")
    shutil.rmtree(tmp_path / "own")
    note = use_cache(tmp_path)
    assert "\n" not in note and "programs of NVIDIA_H100-jax-0.1, none of " + program_place() in note
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / program_place())
    CACHE_HITS.clear()
    jax.clear_caches()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.jit(lambda x: jnp.cosh(x @ x) * 1.0625)(jnp.ones((3, 3))).block_until_ready()
    assert not CACHE_HITS and {path.read_bytes() for path in other.iterdir()} == {b"made elsewhere"}
    assert use_cache(tmp_path) is None  # from now on there are


def test_a_folder_that_cannot_be_written_is_an_error_only_where_it_was_asked_for(restored, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="compile_cache: .* cannot be read and written"):
        use_cache(tmp_path / "file")
    def no_permission(self):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "closed").mkdir()
    with monkeypatch.context() as patch:  # root may read everything
        patch.setattr(pathlib.Path, "iterdir", no_permission)
        with pytest.raises(UserError, match=r"compile_cache: .*closed cannot be read and written \(Permission"):
            use_cache(tmp_path / "closed")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "closed"))
        jax.config.update("jax_compilation_cache_dir", None)
        (tmp_path / "closed" / "helios_jax" / "programs").mkdir(parents=True)
        assert use_cache() is None and jax.config.jax_compilation_cache_dir is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    jax.config.update("jax_compilation_cache_dir", None)
    assert use_cache() is None and jax.config.jax_compilation_cache_dir is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert use_cache() is None and jax.config.jax_compilation_cache_dir == str(default_cache() / program_place())
