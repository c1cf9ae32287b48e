"""``sample.py`` as a user meets it: what it writes, and one clear line for every mistake.

Most tests call ``main`` in this process with a checkpoint that is loaded once; the real command line runs where the
process itself matters.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest

import sample
from helios_jax.convert.rules import tensor_rules
from helios_jax.convert.safetensors_io import SafetensorsFile, write_safetensors
from helios_jax.pipeline.pipeline import HeliosPipeline
from helios_jax.video import VideoWriter, read_video
from tests.golden import fill
from tests.tiny_checkpoint import CONFIGS, write_tiny_checkpoint

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["--prompt", "a red circle", "--steps", "1", "--guidance", "1", "--height", "16", "--width", "32", "--quiet"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a Base and a Distilled checkpoint; no test changes them."""
    root = tmp_path_factory.mktemp("models")
    return {variant: write_tiny_checkpoint(root / variant, variant) for variant in ("base", "distilled")}


@pytest.fixture(scope="module")
def loaded(models):
    """``from_pretrained`` that remembers its results, so that one set of compiled programs serves all tests."""
    known = {}
    real = HeliosPipeline.from_pretrained.__func__

    def from_pretrained(cls, model, **options):
        pipe = real(cls, model, **options | {"compile_for": None})
        compiled = known.setdefault(str(model), pipe)
        if options["lora"]:  # other weights, the same programs
            compiled = copy.copy(compiled)
            compiled.variables = pipe.variables
        return compiled

    return classmethod(from_pretrained)


@pytest.fixture
def run(models, loaded, monkeypatch, capfd, tmp_path):
    """Runs ``main`` in an empty working folder; returns (exit code, stdout, stderr)."""
    monkeypatch.setattr(HeliosPipeline, "from_pretrained", loaded)
    monkeypatch.setattr(sample, "BOX", models["base"])
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            sample.main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return exit_.value.code, out, err

    return call


# Ctrl-C reaches it even where the shell that runs the tests has switched it off, as for commands in the background.
WITH_CTRL_C = ("import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
               "del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')")


def command(*arguments, **options):
    """The real command line."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([sys.executable, "-c", WITH_CTRL_C, str(ROOT / "sample.py"), *map(str, arguments)],
                            text=True, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def details(path: Path) -> tuple[int, float, str, int, int]:
    """Frames that can be decoded, fps, codec, width, height."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return (sum(1 for _ in container.decode(stream)), float(stream.average_rate), stream.codec_context.name,
                stream.width, stream.height)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, hidden files included."""
    return {str(p.relative_to(folder)): None if p.is_dir() else p.read_bytes() for p in sorted(folder.rglob("*"))}


# --- What is written -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames, fps", [(1, 24), (33, 8), (34, 29.97), (66, 24), (99, 12)])
def test_the_file_has_exactly_the_asked_frames_and_fps(run, tmp_path, frames, fps):
    code, out, err = run(*QUICK, "--num_frames", frames, "--fps", fps, "--output", "deep/er/v.mp4")
    assert (code, out, err) == (0, "deep/er/v.mp4\n", "")
    assert details(tmp_path / "deep/er/v.mp4") == (frames, pytest.approx(fps, rel=1e-3), "h264", 32, 16)
    assert os.listdir(tmp_path / "deep/er") == ["v.mp4"]


def test_defaults_are_99_frames_at_24_fps_in_outputs(run, tmp_path):
    code, out, _ = run(*QUICK)
    assert (code, out) == (0, "outputs/a_red_circle.mp4\n")
    assert details(tmp_path / "outputs/a_red_circle.mp4")[:2] == (99, 24)


def test_gif_and_png(run, tmp_path):
    assert run(*QUICK, "--num_frames", 3, "--output", "v.gif")[0] == 0
    assert read_video("v.gif").shape == (3, 16, 32, 3)
    assert run(*QUICK, "--num_frames", 3, "--output", "frames")[0] == 0
    assert sorted(os.listdir("frames")) == ["000000.png", "000001.png", "000002.png"]
    assert run(*QUICK, "--num_frames", 3, "--format", "png")[:2] == (0, "outputs/a_red_circle\n")
    np.testing.assert_array_equal(read_video("frames"), read_video("outputs/a_red_circle"))


def test_the_same_seed_gives_the_same_file_and_options_matter(run):
    files = {}
    for name, more in {"one": [], "two": [], "seed": ["--seed", 1], "text": ["--prompt", "other"]}.items():
        assert run(*QUICK, "--num_frames", 2, "--output", f"{name}.mp4", *more)[0] == 0
        files[name] = Path(f"{name}.mp4").read_bytes()
    assert files["one"] == files["two"] and len(set(files.values())) == 3


def test_prompts_file_makes_one_video_per_line(run, tmp_path):
    Path("prompts.txt").write_text("\ufeffa red circle\n\n  a blue square \n", encoding="utf-8")
    options = QUICK[2:]
    code, out, _ = run("--prompts_file", "prompts.txt", *options, "--num_frames", 2, "--output", "all", "--format",
                       "png")
    assert (code, out) == (0, "all/0000\nall/0001\n")
    assert run("--prompt", "a blue square", *options, "--num_frames", 2, "--output", "one")[0] == 0
    np.testing.assert_array_equal(read_video("all/0001"), read_video("one"))
    assert not np.array_equal(read_video("all/0000"), read_video("one"))


def test_an_image_or_a_video_is_continued(run, tmp_path):
    rng = np.random.default_rng(0)
    PIL.Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save("start.png")
    with VideoWriter("clip.mp4") as writer:
        writer.append(rng.integers(0, 255, (35, 20, 30, 3), np.uint8))
    assert run(*QUICK, "--num_frames", 2, "--output", "plain")[0] == 0
    assert run(*QUICK, "--num_frames", 2, "--output", "image", "--image", "start.png")[0] == 0
    assert run(*QUICK, "--num_frames", 2, "--output", "video", "--video", "clip.mp4")[0] == 0
    videos = [read_video(name) for name in ("plain", "image", "video")]
    assert all(v.shape == (2, 16, 32, 3) for v in videos)
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(videos, 2))


def test_prompt_schedule_as_text_file_and_config(run):
    changes = [{"chunk": 0, "prompt": "a red circle"}, {"chunk": 1, "prompt": "a blue square", "blend": 0}]
    Path("schedule.json").write_text(json.dumps({"changes": changes}))
    Path("config.json").write_text(json.dumps({"prompt_schedule": changes}))
    options = [*QUICK[2:], "--num_frames", 40]
    for name, more in {
        "text": ["--prompt_schedule", json.dumps(changes)], "file": ["--prompt_schedule", "schedule.json"],
        "config": ["--config", "config.json"], "first": ["--prompt", "a red circle"],
        "half": ["--prompt", "a red circle", "--prompt_schedule", json.dumps(changes[1:])],
    }.items():
        assert run(*options, *more, "--output", name)[0] == 0
    text, file, config, half, first = (read_video(n) for n in ("text", "file", "config", "half", "first"))
    for other in (file, config, half):
        np.testing.assert_array_equal(text, other)
    np.testing.assert_array_equal(text[:33], first[:33])
    assert not np.array_equal(text[33:], first[33:])


def test_one_program_serves_all_prompts_of_a_file(run, monkeypatch):
    """Also where later ones are longer."""
    Path("prompts.txt").write_text("a red circle\n" + "a blue square moves up " * 4 + "\n" + "a star " * 60 + "\n")
    programs, sample_one = [], sample.sample_one

    def counted(stream, *others):
        sample_one(stream, *others)
        programs.append(stream._pipeline.compiled_programs())

    monkeypatch.setattr(sample, "sample_one", counted)
    assert run("--prompts_file", "prompts.txt", *QUICK[2:], "--num_frames", 2, "--output", "all")[0] == 0
    assert len(programs) == 3 and len(set(programs)) == 1


def test_all_prompts_of_a_file_are_compiled_for(run, models, monkeypatch):
    """With the room that the longest needs; the negative prompt counts where there is guidance."""
    asked = {}

    class Enough(Exception):
        pass

    def from_pretrained(model, **options):
        asked.update(options)
        raise Enough

    monkeypatch.setattr(HeliosPipeline, "from_pretrained", from_pretrained)
    Path("prompts.txt").write_text("a red circle\n" + "a star " * 40 + "\n")
    found = {}
    for guidance in (1, 3):
        with pytest.raises(Enough):
            sample.main(["--prompts_file", "prompts.txt", *QUICK[2:], "--guidance", str(guidance), "--negative_prompt",
                         "a star " * 100])
        assert asked["compile_for"]["prompts"] == ["a red circle", ("a star " * 40).strip()]
        assert asked["dtype"] is None and asked["vae_dtype"] is None  # they follow the device
        found[guidance] = asked["compile_for"]["options"].text_rows
    assert 32 < found[1] < found[3] <= 512
    with pytest.raises(Enough):
        sample.main(QUICK)
    assert asked["compile_for"]["options"].text_rows == 0


def test_config_file_gives_options_and_the_command_line_wins(run):
    Path("config.json").write_text(json.dumps({
        "prompt": "a red circle", "steps": [1], "guidance": 1, "height": 16.0, "width": 32, "num_frames": 5, "fps": 8,
        "quiet": True, "lora_apart": False, "output": "config.mp4"}))
    assert run("--config", "config.json")[:2] == (0, "config.mp4\n")
    assert details(Path("config.mp4"))[:2] == (5, 8)
    assert run("--config", "config.json", "--num_frames", 2, "--output", "line.mp4")[0] == 0
    assert details(Path("line.mp4"))[:2] == (2, 8)
    Path("prompts.txt").write_text("a red circle\n")
    assert run("--config", "config.json", "--prompts_file", "prompts.txt", "--output", "all")[0] == 0
    assert details(Path("all/0000.mp4"))[:2] == (5, 8)


def test_the_example_config_is_valid(run):
    given = sample.options(["--config", str(ROOT / "configs/sample.json")])
    assert run(*[f"--config={ROOT / 'configs/sample.json'}", *QUICK[2:]])[0] == 0
    assert details(Path(given["output"]))[0] == given["num_frames"]


def test_lora_is_applied_with_its_weight(run, tmp_path):
    name = "blocks.0.attn1.to_q"
    write_safetensors("a.safetensors", {f"transformer.{name}.lora_A.weight": fill("A", (2, 32)),
                                        f"transformer.{name}.lora_B.weight": fill("B", (32, 2))})
    assert sample.parse_lora(["a", "a:0.5", "a:-1", "c:/a", "c:/a:2e-1"]) == [
        ("a", 1), ("a", 0.5), ("a", -1), ("c:/a", 1), ("c:/a", 0.2)]
    for output, more in {"none": [], "zero": ["--lora", "a.safetensors:0"], "one": ["--lora", "a.safetensors"]}.items():
        assert run(*QUICK, "--num_frames", 2, "--output", output, *more)[0] == 0
    none, zero, one = (read_video(n) for n in ("none", "zero", "one"))
    np.testing.assert_array_equal(none, zero)
    assert not np.array_equal(none, one)


def test_progress_tells_frames_speed_and_time_left(run):
    code, _, err = run(*QUICK[:-1], "--num_frames", 66, "--output", "v.mp4")
    lines = err.splitlines()
    assert code == 0 and lines[0] == "v.mp4: 0/66 frames, first chunk under way" and len(lines) == 3
    assert re.fullmatch(r"v\.mp4: 33/66 frames, chunk 1/2, [\d.]+ frames/s, \d+:\d\d left", lines[1])
    assert re.fullmatch(r"v\.mp4: 66/66 frames, chunk 2/2, [\d.]+ frames/s, 0:00 left", lines[2])


def test_help_names_every_option_and_fits_the_screen(run):
    code, out, err = run("--help")
    assert (code, err) == (0, "") and max(map(len, out.splitlines())) <= 120
    for name in ("prompt", "prompts_file", "prompt_schedule", "negative_prompt", "image", "video", "num_frames",
                 "height", "width", "fps", "model", "lora", "steps", "guidance", "seed", "output", "config"):
        assert f"\n  --{name} " in out, name


# --- Mistakes --------------------------------------------------------------------------------------------------


def refused(run, named, *arguments, keep: dict[str, bytes] | None = None):
    """One line, exit code 2, and the working folder as it was."""
    before = tree(Path.cwd())
    code, out, err = run(*arguments)
    assert code == 2 and out == "", err
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert "Traceback" not in err and re.search(named, err), err
    after = tree(Path.cwd())
    assert {k: v for k, v in after.items() if v is not None} == {k: v for k, v in before.items() if v is not None}


@pytest.mark.parametrize("arguments, named", [
    ([], "--prompt: needed"), (["--promt", "x"], "unrecognized arguments: --promt"), (["x"], "unrecognized"),
    (["--prompt"], "expected one argument"), (["--prompt", "x", "--height", "tall"], "--height: invalid int"),
    (["--prompt", "x", "--height", "65"], r"size 65x64 .*multiples of 16.*nearest allowed: 64x64, 80x64"),
    (["--prompt", "x", "--width", "0"], "width: must be a positive"),
    (["--prompt", "x", "--num_frames", "0"], "num_frames: must be"),
    (["--prompt", "x", "--num_frames", "-7"], "num_frames: must be"),
    (["--prompt", "x", "--num_frames", "1.5"], "invalid int"), (["--prompt", "x", "--fps", "0"], "fps: got 0"),
    (["--prompt", "x", "--fps", "0.0001"], "fps: got 0.0001, allowed are 0.01 to 1000"),
    (["--prompt", "x", "--fps", "1001"], "fps: got 1001.0, allowed are 0.01 to 1000"),
    (["--prompt", "x", "--fps", "nan"], "fps: got nan"), (["--prompt", "x", "--fps", "inf"], "fps: got inf"),
    (["--prompt", "x", "--seed", "-1"], "seed: must be"), (["--prompt", "x", "--seed", str(2**64)], "seed: must be"),
    (["--prompt", "x", "--steps", "0"], "steps: positive"),
    (["--prompt", "x", "--steps", "two"], "steps: whole numbers"),
    (["--prompt", "x", "--steps", ""], "steps: whole"),
    (["--prompt", "x", "--steps", "2,2"], "steps: 1 number expected"),
    (["--prompt", "x", "--guidance", "nan"], "guidance_scale: must be"),
    (["--prompt", "x", "--guidance", "-1"], "guidance_scale: must be"),
    (["--prompt", "x", "--dtype", "int8"], "--dtype: invalid choice"),
    (["--prompt", "x", "--format", "avi"], "--format"),
    (["--prompt", "x", "--compile_only", "--compile_cache", "off"], "--compile_only: needs the cache"),
    (["--prompt", "x", "--compile_only", "--stream_weights"], "stream_weights: programs are compiled when the weights"),
    (["--prompt", "x", "--prompts_file", "y"], "--prompt and --prompts_file"),
    (["--prompt", "x", "--image", "y", "--video", "z"], "--image and --video"),
    (["--prompt", "x", "--output", "a.gif", "--format", "mp4"], "--format: the name in --output says it"),
    (["--prompt", "x", "--output", "a.avi"], "output: got 'a.avi', allowed"),
    (["--prompt", "x", "--output", "file/a.mp4"], "output: cannot write to"),
    (["--prompt", "x", "--output", "full"], "output: full exists and is not an empty folder"),
    (["--prompt", "x", "--output", "full.mp4"], "output: full.mp4 is a folder"),
    (["--prompts_file", "none.txt"], "none.txt cannot be read"), (["--prompts_file", "blank"], "blank holds no prompt"),
    (["--prompts_file", "noise"], "noise cannot be read"), (["--prompts_file", "full"], "full cannot be read"),
    (["--prompt", "x", "--image", "none.png"], "image: none.png is missing"),
    (["--prompt", "x", "--image", "empty"], "image: empty is empty"),
    (["--prompt", "x", "--image", "noise"], "image: noise is not an image"),
    (["--prompt", "x", "--image", "cut.png"], "image: cut.png is damaged or truncated"),
    (["--prompt", "x", "--video", "none.mp4"], "video: none.mp4 is missing"),
    (["--prompt", "x", "--video", "empty"], "video: empty is empty"),
    (["--prompt", "x", "--video", "one.mp4"], r"video: one.mp4 has 1 frame\(s\), need 33 or more"),
    (["--prompt", "x", "--video", "cut.png"], "video: cut.png is an image"),
    (["--prompt", "x", "--lora", "none.safetensors"], "lora 'none.safetensors': no such file"),
    (["--prompt", "x", "--lora", "noise"], "noise: not a safetensors file"),
    (["--prompt", "x", "--lora", "a.bin"], "pickle"), (["--prompt", "x", "--lora", "foreign.safetensors"], "no LoRA"),
    (["--prompt", "x", "--lora", "foreign.safetensors:nan"], "lora weight: must be a finite"),
    (["--prompt", "x", "--model", "nowhere"], "model 'nowhere': no such folder, and not a hub id"),
    (["--prompt", "x", "--model", "noise"], "model 'noise': is a file"),
    (["--prompt", "x", "--model", "full"], "full: holds no model_index.json"),
    (["--prompt", "x", "--config", "none.json"], "none.json: no such file"),
    (["--prompt", "x", "--config", "noise"], "noise: cannot be read"),
    (["--prompt", "x", "--config", "blank"], "blank: not valid JSON"),
    (["--prompt", "x", "--model", "full", "--revision", "main"], "revision: goes with a hub id, got 'main' for the"),
    (["--prompt_schedule", ""], "prompt_schedule: a JSON file or JSON text is expected, got ''"),
    (["--prompt_schedule", " \n"], "prompt_schedule: a JSON file or JSON text is expected"),
    (["--prompt_schedule", "none.json"], "prompt_schedule: none.json: cannot be read"),
    (["--prompt_schedule", "noise"], "prompt_schedule: noise: cannot be read"),
    (["--prompt_schedule", "blank"], "prompt_schedule: blank: not valid JSON"),
    (["--prompt_schedule", "[1, 2"], "prompt_schedule: not valid JSON"), (["--prompt_schedule", "[]"], "a list like"),
    (["--prompt_schedule", "{}"], "a list like"), (["--prompt_schedule", "[[0]]"], "an entry is"),
    (["--prompt_schedule", '[{"chunk": 0}]'], "entries need 'chunk' and 'prompt'"),
    (["--prompt_schedule", '[{"chunk": 0, "prompt": "a", "colour": 1}]'], "entries need"),
    (["--prompt_schedule", '[{"chunk": "1", "prompt": "a"}]'], "chunk: must be a whole number"),
    (["--prompt_schedule", '[{"chunk": 0, "prompt": 1}]'], "prompt must be text"),
    (["--prompt_schedule", '[{"chunk": 0, "prompt": "a", "blend": -1}]'], "blend: must be"),
    (["--prompt_schedule", '[[1, "a"], [1, "b"]]'], "chunks must ascend"),
    (["--prompt_schedule", '[[1, "a"]]'], "without --prompt it must begin at chunk 0"),
    (["--prompt", "x", "--prompt_schedule", '[[3, "a"]]'], "at chunk 3, but the video has 3 chunks"),
    (["--prompt_schedule", "[" * 100000], "prompt_schedule: not valid JSON"),
    (["--prompt_schedule", "a" * 5000], "prompt_schedule: .*cannot be read"),
])
def test_mistakes_cost_one_line(run, arguments, named):
    Path("empty").touch()
    Path("file").touch()
    Path("blank").write_text(" \n\n")
    Path("noise").write_bytes(bytes(range(128, 256)) * 8)
    for folder in ("full", "full.mp4"):
        Path(folder).mkdir()
        Path(folder, "precious").write_text("x")
    if "cut.png" in arguments:
        PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save("whole.png")
        Path("cut.png").write_bytes(Path("whole.png").read_bytes()[:3000])
    if "one.mp4" in arguments:
        with VideoWriter("one.mp4") as writer:
            writer.append(np.zeros((1, 16, 16, 3), np.uint8))
    if "a.bin" in arguments:
        Path("a.bin").write_bytes(b"\x80\x04K\x01.")
    write_safetensors("foreign.safetensors", {"model.layers.0.weight": np.zeros((2, 2), np.float32)})
    refused(run, named, *arguments)


@pytest.mark.parametrize("values, named", [
    ([1], "expected a JSON object"), ({"promt": "x"}, "unknown option 'promt'"), ({"help": True}, "unknown option"),
    ({"config": "x"}, "unknown option 'config'"), ({"prompt": 5}, "prompt must be a text, got 5"),
    ({"prompt": None}, "prompt must be a text"), ({"height": "64"}, "height must be a whole number"),
    ({"height": 64.5}, "height must be a whole number"), ({"height": True}, "height must be a whole number"),
    ({"height": float("nan")}, "height must be a whole number"), ({"height": 1e300}, "height must be a whole number"),
    ({"fps": "24"}, "fps must be a number"), ({"quiet": "no"}, "quiet must be true or false"),
    ({"quiet": 1}, "quiet must be true or false"), ({"lora": [1]}, "lora must be a list of texts"),
    ({"lora": {"a": 1}}, "lora must be a list of texts"), ({"dtype": "float16"}, "dtype must be one of float32"),
    ({"steps": {"a": 1}}, "steps must be"), ({"steps": [1.5]}, "--steps: whole numbers"),
    ({"steps": [float("inf")]}, "--steps: whole numbers"), ({"steps": float("inf")}, "--steps: whole numbers"),
    ({"fps": float("inf")}, "fps: got inf"), ({"guidance": float("inf")}, "guidance_scale: must be a finite"),
    ({"prompt_schedule": ""}, "prompt_schedule: a JSON file or JSON text is expected"),
    ({"steps": [None]}, "--steps: whole numbers"), ({"steps": []}, "--steps: whole numbers"),
    ({"prompt_schedule": 3}, "prompt_schedule must be a list"), ({"prompt_schedule": []}, "prompt_schedule: a list"),
])
def test_mistakes_in_a_config_file_cost_one_line(run, values, named):
    Path("config.json").write_text(json.dumps(values))
    refused(run, named, "--config", "config.json", "--prompt", "x") if "prompt" not in values else refused(
        run, named, "--config", "config.json")


def test_the_distilled_model_refuses_guidance_and_other_sizes(run, models):
    model = ["--prompt", "x", "--model", models["distilled"]]
    refused(run, "guidance_scale: the distilled model needs 1", *model, "--guidance", 5)
    refused(run, "size 64x96 .*multiples of 64.*nearest allowed: 64x128, 64x64", *model, "--width", 96)
    refused(run, "steps: 3 numbers expected", *model, "--steps", "2,2")


# --- Damaged and foreign checkpoints ---------------------------------------------------------------------------


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    with SafetensorsFile(path) as file:
        return {name: file.read(name) for name in file.entries}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def rename_tensors(path: Path) -> None:
    write_safetensors(path, {f"model.{name}": tensor for name, tensor in tensors_of(path).items()})


def drop_tensor(path: Path) -> None:
    tensors = tensors_of(path)
    tensors.pop("proj_out.weight")
    write_safetensors(path, tensors)


def misshape(path: Path) -> None:
    write_safetensors(path, tensors_of(path) | {"proj_out.weight": np.zeros((3, 5), np.float32)})


def pickle_only(path: Path) -> None:
    path.rename(path.with_suffix(".bin"))


def wrong_index(path: Path) -> None:
    names = [rule.name for rule in tensor_rules("transformer", CONFIGS["transformer"])]
    path.rename(path.with_name("part.safetensors"))
    path.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names[1:], "part.safetensors")}))


def missing_shard(path: Path) -> None:
    wrong_index(path)
    path.with_name("part.safetensors").unlink()


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("part, damage, named", [
    (WEIGHTS, Path.unlink, r"holds no \*.safetensors weights"), (WEIGHTS, truncate, "truncated"),
    (WEIGHTS, lambda p: p.write_bytes(b""), "not a safetensors file, or truncated"),
    (WEIGHTS, lambda p: p.write_bytes(b"\xff" * 500), "not a safetensors file"),
    (WEIGHTS, lambda p: p.write_bytes(b"\x08" + bytes(7) + b"{broken}"), "corrupt safetensors header"),
    (WEIGHTS, rename_tensors, "missing.*unexpected"), (WEIGHTS, drop_tensor, "missing.*proj_out.weight"),
    (WEIGHTS, misshape, r"proj_out.weight .*3, 5"), (WEIGHTS, pickle_only, "pickle.*safe_serialization=True"),
    (WEIGHTS, wrong_index, "does not agree with its shards"), (WEIGHTS, missing_shard, "part.safetensors"),
    ("vae/diffusion_pytorch_model.safetensors", truncate, "truncated"),
    ("text_encoder/model.safetensors", Path.unlink, "holds no"),
    ("transformer/config.json", lambda p: edit_json(p, ffn_dim=52), "ffn"),
    ("transformer/config.json", lambda p: edit_json(p, ffn_dim="many"), "config.json: "),
    ("transformer/config.json", lambda p: p.write_text("{"), "config.json: not valid JSON"),
    ("vae/config.json", Path.unlink, "vae/config.json: no such file"),
    ("vae/config.json", lambda p: edit_json(p, is_residual=True), "Wan 2.2 VAE"),
    ("scheduler/scheduler_config.json", Path.unlink, "scheduler_config.json: no such file"),
    ("scheduler/scheduler_config.json", lambda p: edit_json(p, stages=3), "scheduler: HeliosPipeline needs stages=1"),
    ("model_index.json", lambda p: edit_json(p, _class_name="WanPipeline"), "is a Wan model"),
    ("model_index.json", lambda p: edit_json(p, is_distilled=True), "is_distilled"),
    ("model_index.json", lambda p: edit_json(p, scheduler=["diffusers", "DDIMScheduler"]), "scheduler"),
    ("transformer/config.json", lambda p: edit_json(p, has_multi_term_memory_patch=False),
     "has_multi_term_memory_patch: sampling needs true .*, got False"),
    *[("model_index.json", lambda p, size=size: edit_json(p, _native_size=size),
       r"_native_size: \[height, width\], two positive whole numbers, expected, got ")
      for size in ([64], [64, 64, 64], [0, 64], [64.5, 64], ["64", "64"], [True, 64], "64x64", 64, None, {})],
    ("model_index.json", lambda p: p.write_text("[]"), "expected a JSON object"),
    ("tokenizer/tokenizer.json", Path.unlink, "no tokenizer.json and no spiece.model"),
    ("tokenizer/tokenizer.json", lambda p: p.write_text("{}"), "not a tokenizer"),
    ("tokenizer/tokenizer.json", truncate, "not valid JSON"),
])
def test_damaged_and_foreign_checkpoints_cost_one_line(run, models, tmp_path_factory, part, damage, named):
    model = tmp_path_factory.mktemp("damaged") / "model"
    shutil.copytree(models["base"], model)
    damage(model / part)
    Path("outputs").mkdir()
    Path("outputs/v.mp4").write_text("an older video")
    refused(run, named, "--prompt", "x", "--model", model, "--output", "outputs/v.mp4")


def test_a_hub_id_that_cannot_be_fetched_costs_one_line():
    process = command("--prompt", "x", "--model", "nobody/nothing-of-this-name", "--output", "unused.mp4")
    out, err = process.communicate()
    assert process.returncode == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("error: model 'nobody/nothing-of-this-name': no such folder, and the hub download failed")
    assert not (ROOT / "unused.mp4").exists()


@pytest.mark.parametrize("damage", [shutil.rmtree, lambda p: (p / "tokenizer.json").write_text("{}")])
def test_a_tokenizer_that_cannot_be_read_is_told_before_the_weights_are(models, tmp_path, damage, monkeypatch, capfd):
    model = tmp_path / "model"
    shutil.copytree(models["base"], model)
    damage(model / "tokenizer")
    monkeypatch.setattr("helios_jax.pipeline.pipeline.load_pipeline_params", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(SystemExit) as end:
        sample.main([*QUICK, "--model", str(model), "--output", str(tmp_path / "v.mp4"), "--compile_cache", "off"])
    assert end.value.code == 2 and re.search("tokenizer", capfd.readouterr().err)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("script", ["sample.py", "train.py"])
def test_a_reader_of_the_help_that_has_gone_costs_no_traceback(script, unbuffered):
    process = subprocess.Popen([sys.executable, str(ROOT / script), "--help"], stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": unbuffered})
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() in (0, 1)  # argparse swallows what print does not


# --- Full disk and Ctrl-C --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["v.mp4", "v.gif", "v"])
def test_a_full_disk_costs_one_line_and_the_older_video_stays(run, name):
    if name != "v":
        Path(name).write_text("an older video")
    before = tree(Path.cwd())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, limits[1]))
        code, out, err = run(*QUICK, "--num_frames", 66, "--output", name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (code, out) == (2, "") and tree(Path.cwd()) == before
    assert re.fullmatch(r"error: output: writing v\S* failed after \d+ frames: the disk is full\n", err), err


def test_ctrl_c_saves_what_exists(models, tmp_path):
    process = command("--model", models["base"], *QUICK[:-1], "--num_frames", 330000, "--output", tmp_path / "v.mp4")
    try:
        lines = []
        while not (lines and "chunk 2/" in lines[-1]):
            lines.append(process.stderr.readline())
            assert lines[-1], lines
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130 and out == "" and "Traceback" not in err, err
    frames, fps, codec, *_ = details(tmp_path / "v.mp4")
    assert frames >= 66 and (fps, codec) == (24, "h264")
    assert f"saved {frames} of 330000 frames: {tmp_path / 'v.mp4'}\ninterrupted\n" in err
    assert os.listdir(tmp_path) == ["v.mp4"] and time.monotonic() - start < 60
