"""Samples a video: ``python sample.py --prompt "a red circle moving right on a dark background"``.

Without ``--model`` it uses the small model in the box. ``--help`` lists everything.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from helios_jax.errors import UserError, command_line

BOX = Path(__file__).resolve().parent / "assets" / "helios-tiny"
SUFFIXES = ("mp4", "gif", "png")

EXAMPLES = """examples:
  python sample.py --prompt "a red circle moving right on a dark background"
  python sample.py --model BestWishYsh/Helios-Distilled --dtype bfloat16 --prompt "..." --num_frames 240
  python sample.py --model checkpoints/helios-base --prompt "..." --image start.png --output video.mp4
  python sample.py --prompts_file prompts.txt --output outputs/batch --format gif
  python sample.py --config configs/sample.json --seed 7

--config takes a JSON file whose keys are the long options below (without dashes); options on the command line win.
Ctrl-C stops the run and saves the frames that exist."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):  # argparse prints the usage block and exits; one line is enough
        raise UserError(f"{message}; see --help")


def parser() -> argparse.ArgumentParser:
    p = _Parser(prog="sample.py", description="Samples a video with Helios.", epilog=EXAMPLES, allow_abbrev=False,
                formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    what = p.add_argument_group("what to make")
    what.add_argument("--prompt", metavar="TEXT", help="what the video shows")
    what.add_argument("--prompts_file", metavar="FILE", help="one prompt per line, one video each")
    what.add_argument("--prompt_schedule", metavar="JSON",
                      help='prompt changes, a file or text: [{"chunk": 2, "prompt": "...", "blend": 3}]')
    what.add_argument("--negative_prompt", metavar="TEXT", help="what it must not show; with guidance above 1")
    what.add_argument("--image", metavar="FILE", help="start from an image")
    what.add_argument("--video", metavar="FILE", help="continue a video of at least 33 frames")
    what.add_argument("--num_frames", type=int, metavar="N", help="exact number of frames (default 99)")
    what.add_argument("--height", type=int, metavar="PX", help="default: the model's native size")
    what.add_argument("--width", type=int, metavar="PX")
    what.add_argument("--fps", type=float, metavar="N", help="frames per second of the file (default 24)")

    model = p.add_argument_group("model")
    model.add_argument("--model", metavar="ID_OR_FOLDER", help="hub id or folder (default: the model in the box)")
    model.add_argument("--dtype", choices=("float32", "bfloat16"), help="of transformer and text encoder "
                       "(default float32 on a CPU, else bfloat16)")
    model.add_argument("--lora", action="append", metavar="FILE[:WEIGHT]", help="may be given several times")
    model.add_argument("--lora_apart", action="store_true", help="keep LoRA beside the weights instead of merging it")

    how = p.add_argument_group("how to sample (defaults depend on the model's variant)")
    how.add_argument("--steps", metavar="N[,N,N]", help="denoising steps per pyramid stage "
                     "(Base 50, Mid 20,20,20, Distilled 2,2,2)")
    how.add_argument("--guidance", type=float, metavar="G", help="Base and Mid 5, Distilled 1")
    how.add_argument("--seed", type=int, metavar="N", help="default 42; every prompt of a file gets the same")
    how.add_argument("--no_zero_init", action="store_true", help="Mid: no zero velocity in the first steps")
    how.add_argument("--no_amplify_first_chunk", action="store_true",
                     help="Distilled: as many steps for the first chunk as for the others")
    how.add_argument("--skip_first_chunk", action="store_true", help="take the anchor frame from the second chunk")

    out = p.add_argument_group("output")
    out.add_argument("--output", metavar="PATH", help="file.mp4, file.gif or a name without suffix for PNG frames; "
                     "with --prompts_file a folder (default: outputs/)")
    out.add_argument("--format", choices=SUFFIXES, help="of the files of --prompts_file (default mp4)")
    out.add_argument("--quiet", action="store_true", help="no progress line")
    p.add_argument("--config", metavar="FILE", help="a JSON file with these options")
    return p


def options(argv: list[str]) -> dict[str, Any]:
    """Command line over config file.

    Raises:
      UserError: unknown options, wrong types, options that exclude each other.
    """
    p = parser()
    given = vars(p.parse_args(argv))
    if "config" in given:
        from helios_jax.config import read_json

        path = given.pop("config")
        values = read_json(path)
        known = {action.dest: action for action in p._actions}
        for key, value in values.items():
            if key not in known or key in ("config", "help"):
                raise UserError(f"{path}: unknown option {key!r}; see --help")
            convert = known[key].type
            if convert is not None and (isinstance(value, bool) or not isinstance(value, (int, float))
                                        or convert(value) != value):
                raise UserError(f"{path}: {key} must be a {convert.__name__}, got {value!r}")
            if known[key].choices and value not in known[key].choices:
                raise UserError(f"{path}: {key} must be one of {', '.join(known[key].choices)}, got {value!r}")
        given = values | given
    for one, other in (("prompt", "prompts_file"), ("image", "video"), ("prompts_file", "prompt_schedule")):
        if one in given and other in given:
            raise UserError(f"--{one} and --{other}: give one of them, not both")
    if not {"prompt", "prompts_file", "prompt_schedule"} & set(given):
        raise UserError("--prompt: needed (or --prompts_file); see --help")
    return given


def parse_steps(value: Any) -> tuple[int, ...] | None:
    """'20', '2,2,2' or [2, 2, 2]."""
    if value is None:
        return None
    parts = value if isinstance(value, list) else str(value).replace(" ", ",").split(",")
    try:
        return tuple(int(part) for part in parts if part != "")
    except (TypeError, ValueError):
        raise UserError(f"--steps: whole numbers separated by commas expected, got {value!r}") from None


def parse_lora(values: list[str]) -> list[tuple[str, float]]:
    """FILE or FILE:WEIGHT."""
    adapters = []
    for value in values:
        path, _, weight = value.rpartition(":")
        try:
            adapters.append((path, float(weight)) if path else (value, 1.0))
        except ValueError:
            adapters.append((value, 1.0))  # a colon that belongs to the path
    return adapters


def read_prompts(path: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts_file: {path} cannot be read ({error})") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompts_file: {path} holds no prompt")
    return prompts


class Progress:
    """One line on stderr: chunks, frames per second, time left."""

    def __init__(self, label: str, total: int, frames: int, quiet: bool):
        self.label, self.total, self.frames, self.quiet = label, total, frames, quiet
        self.start = self.last = time.monotonic()
        self.done = 0
        self._show(f"{label}: 0/{frames} frames, first chunk under way (it compiles the model)")

    def update(self, chunk: int, frames: int) -> None:
        now = time.monotonic()
        rate, self.last = frames / (now - self.last), now
        self.done += frames
        left = (self.frames - self.done) / rate
        self._show(f"{self.label}: {self.done}/{self.frames} frames, chunk {chunk + 1}/{self.total}, "
                   f"{rate:.1f} frames/s, {int(left) // 60}:{int(left) % 60:02d} left")

    def _show(self, line: str) -> None:
        if not self.quiet:
            print(f"\r{line:<100}" if sys.stderr.isatty() else line, end="" if sys.stderr.isatty() else "\n",
                  file=sys.stderr, flush=True)

    def finish(self) -> None:
        if not self.quiet and sys.stderr.isatty():
            print(file=sys.stderr)


def outputs(given: dict[str, Any], prompts: list[str]) -> list[Path]:
    """The path of every video."""
    if "prompts_file" in given:
        folder = Path(given.get("output", "outputs"))
        suffix = given.get("format", "mp4")
        return [folder / (f"{i:04d}" if suffix == "png" else f"{i:04d}.{suffix}") for i in range(len(prompts))]
    if "output" in given:
        return [Path(given["output"])]
    words = "".join(c if c.isalnum() else " " for c in prompts[0]).split()
    suffix = given.get("format", "mp4")
    stem = "_".join(words)[:60] or "video"
    return [Path("outputs") / (stem if suffix == "png" else f"{stem}.{suffix}")]


@command_line
def main(argv: list[str] | None = None) -> int:
    given = options(sys.argv[1:] if argv is None else argv)
    steps, lora = parse_steps(given.get("steps")), parse_lora(given.get("lora", []))
    from helios_jax.pipeline.prompts import parse_schedule

    schedule = parse_schedule(given["prompt_schedule"]) if "prompt_schedule" in given else ()
    if "prompts_file" in given:
        prompts = read_prompts(given["prompts_file"])
    elif "prompt" in given:
        prompts = [given["prompt"]]
    else:
        if schedule[0].chunk != 0:
            raise UserError(f"--prompt_schedule: without --prompt it must begin at chunk 0, got {schedule[0].chunk}")
        prompts = [schedule[0].prompt]
    paths = outputs(given, prompts)

    import jax
    import numpy as np
    import PIL.Image

    from helios_jax import video as video_io
    from helios_jax.pipeline.pipeline import HeliosPipeline, SamplingOptions
    from helios_jax.pipeline.request import DEFAULT_FPS

    # Inputs are read before the model is loaded, so that their mistakes show at once.
    image = video_io.read_image(given["image"]) if "image" in given else None
    frames = video_io.read_video(given["video"], min_frames=33) if "video" in given else None
    dtype = given.get("dtype", "float32" if jax.default_backend() == "cpu" else "bfloat16")
    pipeline = HeliosPipeline.from_pretrained(given.get("model", BOX), dtype=dtype, lora=lora,
                                              merge_lora=not given.get("lora_apart", False))
    run = SamplingOptions(
        **{key: given[key] for key in ("height", "width", "num_frames", "seed", "skip_first_chunk") if key in given},
        steps=steps, guidance_scale=given.get("guidance"), use_zero_init=not given.get("no_zero_init", False),
        amplify_first_chunk=not given.get("no_amplify_first_chunk", False))
    size = pipeline.checked_size(run)
    if image is not None:
        image = video_io.preprocess_image(PIL.Image.fromarray(image), size.height, size.width)
    if frames is not None:
        frames = video_io.preprocess_video([PIL.Image.fromarray(f) for f in np.asarray(frames)], size.height,
                                           size.width)
    for prompt, path in zip(prompts, paths, strict=True):
        stream = pipeline.stream(prompt, negative_prompt=given.get("negative_prompt", ""), image=image, video=frames,
                                 prompt_schedule=schedule, options=run)
        with video_io.VideoWriter(path, fps=given.get("fps", DEFAULT_FPS)) as writer:
            progress = Progress(path.name, stream.num_chunks, stream.num_frames, given.get("quiet", False))
            try:
                for chunk in stream:
                    writer.append(chunk.frames[0])
                    progress.update(chunk.index, chunk.frames.shape[1])
            finally:
                progress.finish()
        print(path)
    return 0


if __name__ == "__main__":
    main()
