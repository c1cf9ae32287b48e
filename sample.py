"""Samples a video: ``python sample.py --prompt "a red circle moving right on a dark background"``.

Without ``--model`` it uses the small model in the box. ``--help`` lists everything.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helios_jax.config import read_json
from helios_jax.errors import UserError, command_line

if TYPE_CHECKING:
    from helios_jax.pipeline.pipeline import VideoStream
    from helios_jax.sharding import MeshConfig
    from helios_jax.video import VideoWriter

BOX = Path(__file__).resolve().parent / "assets" / "helios-tiny-distilled"
SUFFIXES = ("mp4", "gif", "png")

EXAMPLES = """examples:
  python sample.py --prompt "a red circle moving right on a dark background"
  python sample.py --model BestWishYsh/Helios-Distilled --dtype bfloat16 --prompt "..." --num_frames 240
  python sample.py --model checkpoints/helios-base --prompt "..." --image start.png --output video.mp4
  python sample.py --prompts_file prompts.txt --output outputs/batch --format gif
  python sample.py --config configs/sample.json --seed 7

A video is made in chunks of 33 frames, each written as soon as it exists. Ctrl-C stops the run and saves the frames
that exist. The same seed gives the same video, see docs/determinism.md."""

# Of each pair one goes without the other.
EXCLUSIVE = (("prompt", "prompts_file"), ("image", "video"), ("prompts_file", "prompt_schedule"))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):  # argparse prints the usage block and exits; one line is enough
        raise UserError(f"{message}; see --help")


def parser() -> argparse.ArgumentParser:
    p = _Parser(prog="sample.py", description="Samples a video with Helios.", epilog=EXAMPLES, allow_abbrev=False,
                usage="sample.py --prompt TEXT [options]",
                formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30,
                                                                                  width=118),
                argument_default=argparse.SUPPRESS)
    what = p.add_argument_group("what to make")
    what.add_argument("--prompt", metavar="TEXT", help="what the video shows")
    what.add_argument("--prompts_file", metavar="FILE", help="a text file with one prompt per line: one video each")
    what.add_argument("--prompt_schedule", metavar="JSON", help="prompt changes, a JSON file or JSON text: "
                      '[{"chunk": 2, "prompt": "...", "blend": 3}] changes from the third chunk on, blended over three')
    what.add_argument("--negative_prompt", metavar="TEXT", help="what it must not show; needs guidance above 1")
    what.add_argument("--image", metavar="FILE", help="start from this image")
    what.add_argument("--video", metavar="FILE", help="continue this video (at least 33 frames; a file, or a folder of "
                      "PNG frames); the output holds the new frames only")
    what.add_argument("--num_frames", type=int, metavar="N", help="exact number of frames (default 99)")
    what.add_argument("--height", type=int, metavar="PX", help="multiple of 64, for Base of 16 (default: the model's "
                      "native size)")
    what.add_argument("--width", type=int, metavar="PX", help="as --height")
    what.add_argument("--fps", type=float, metavar="N", help="frames per second of the file (default 24)")

    model = p.add_argument_group("model")
    model.add_argument("--model", metavar="ID_OR_FOLDER", help="hub id or folder, published layout or as written by "
                       "python -m helios_jax.convert (default: the small Distilled model in the box)")
    model.add_argument("--revision", metavar="NAME", help="branch, tag or commit of the hub id in --model")
    model.add_argument("--dtype", choices=("float32", "bfloat16"), help="of transformer and text encoder "
                       "(default float32 on a CPU, else bfloat16)")
    model.add_argument("--vae_dtype", choices=("float32", "bfloat16"), help="of the video decoder and encoder (default "
                       "as --dtype)")
    model.add_argument("--precision", metavar="MODE", help="of the linear layers: fp8, int8 (weights and activations), "
                       "int8_weights, int4_weights, or none (default: as the checkpoint is; see docs/low_precision.md)")
    model.add_argument("--lora", action="append", metavar="FILE[:WEIGHT]", help="may be given several times; weight 1 "
                       "if none is given")
    model.add_argument("--lora_apart", action="store_true", help="keep LoRA beside the weights instead of merging it")

    model.add_argument("--stream_weights", action="store_true", help="keep the weights in the host's memory and copy "
                       "them to the device layer by layer, for cards that the model does not fit")
    model.add_argument("--mesh", metavar="AXIS=N[,...]", help="divide the model over several devices: sizes of axes "
                       "data, fsdp, context, tensor; one may be -1 for all that remain: fsdp=2,context=-1 "
                       "(default: one device)")

    how = p.add_argument_group("how to sample (defaults depend on the model's variant)")
    how.add_argument("--steps", metavar="N[,N,N]", help="denoising steps, one number or one per pyramid stage (Base "
                     "50, Mid 20,20,20, Distilled 2,2,2)")
    how.add_argument("--guidance", type=float, metavar="G", help="guidance scale; 1 is none (Base and Mid 5, "
                     "Distilled 1)")
    how.add_argument("--allow_distilled_guidance", action="store_true", help="accept --guidance above 1 for Distilled, "
                     "which was trained without")
    how.add_argument("--seed", type=int, metavar="N", help="default 42; every prompt of a file gets the same")
    how.add_argument("--no_zero_init", action="store_true", help="Mid: no zero velocity in the first steps")
    how.add_argument("--no_amplify_first_chunk", action="store_true", help="Distilled: as many steps for the first "
                     "chunk as for the others, instead of twice as many")
    how.add_argument("--skip_first_chunk", action="store_true", help="take the anchor frame, which every later chunk "
                     "sees, from the second chunk instead of the first")

    out = p.add_argument_group("output and options")
    out.add_argument("--output", metavar="PATH", help="NAME.mp4, NAME.gif, or a NAME without suffix for a folder of "
                     "PNG frames; with --prompts_file a folder (default: outputs/, named by the prompt)")
    out.add_argument("--format", choices=SUFFIXES, help="where --output does not say it (default mp4)")
    out.add_argument("--compile_cache", metavar="DIR", help="folder that keeps compiled programs for later runs, or "
                     "'off' (default: helios_jax/programs in the user's cache folder)")
    out.add_argument("--compile_only", action="store_true", help="compile the programs of this run into the cache, "
                     "read no weights, write no video")
    out.add_argument("--quiet", action="store_true", help="no progress on stderr")
    out.add_argument("--config", metavar="FILE", help="a JSON file whose keys are the long options without dashes; the "
                     "command line wins")
    return p


def options(argv: list[str]) -> dict[str, Any]:
    """Command line over config file.

    Raises:
      UserError: unknown options, wrong types, options that exclude each other.
    """
    p = parser()
    given = vars(p.parse_args(argv))
    if "config" in given:
        values = read_config(given.pop("config"), {action.dest: action for action in p._actions})
        for one, other in (*EXCLUSIVE, *(pair[::-1] for pair in EXCLUSIVE)):
            if one in given:
                values.pop(other, None)
        given = values | given
    for one, other in EXCLUSIVE:
        if one in given and other in given:
            raise UserError(f"--{one} and --{other}: give one of them, not both")
    if "compile_only" in given and given.get("compile_cache") == "off":
        raise UserError("--compile_only: needs the cache, got --compile_cache off")
    if "format" in given and "output" in given and "prompts_file" not in given:
        raise UserError("--format: the name in --output says it already; it goes with --prompts_file or without "
                        "--output")
    if not {"prompt", "prompts_file", "prompt_schedule"} & set(given):
        raise UserError("--prompt: needed (or --prompts_file); see --help")
    return given


def read_config(path: str, actions: dict[str, argparse.Action]) -> dict[str, Any]:
    """The options of a JSON file, with the types that the command line would give them.

    Raises:
      UserError: not a JSON object, an unknown key, or a value of the wrong type.
    """
    values = read_json(path)
    for key, value in values.items():
        action = actions.get(key)
        if action is None or key in ("config", "help"):
            raise UserError(f"{path}: unknown option {key!r}; see --help")
        if key == "lora" and isinstance(value, str):
            value = [value]
        number = not isinstance(value, bool) and isinstance(value, (int, float))
        if key == "lora":
            fits, wanted = isinstance(value, list) and all(isinstance(v, str) for v in value), "a list of texts"
        elif key == "steps":
            fits, wanted = isinstance(value, (str, list)) or number, "a number or a list of them"
        elif key == "mesh":
            fits, wanted = isinstance(value, (str, dict)), "a text or an object of axes and their sizes"
        elif key == "prompt_schedule":
            fits, wanted = isinstance(value, (str, list)), "a list of changes or the name of a file"
        elif action.nargs == 0:
            fits, wanted = isinstance(value, bool), "true or false"
        elif action.type is int:
            fits, wanted = number and abs(value) < 2**64 and value == int(value), "a whole number"
        elif action.type is float:
            fits, wanted = number, "a number"
        else:
            fits, wanted = isinstance(value, str), "a text"
        if not fits:
            raise UserError(f"{path}: {key} must be {wanted}, got {value!r}")
        if action.choices and value not in action.choices:
            raise UserError(f"{path}: {key} must be one of {', '.join(action.choices)}, got {value!r}")
        values[key] = action.type(value) if action.type else value
    return {key: value for key, value in values.items() if value is not False}  # an absent flag is false


def parse_steps(value: Any) -> tuple[int, ...] | None:
    """'20', '2,2,2', 20 or [2, 2, 2]."""
    if value is None:
        return None
    parts = value if isinstance(value, list) else str(value).replace(" ", ",").split(",")
    try:
        steps = tuple(int(part) for part in parts if part != "")
    except (TypeError, ValueError, OverflowError):  # the last one: infinity
        steps = ()
    if not steps or any(isinstance(part, float) and part != int(part) for part in parts):
        raise UserError(f"--steps: whole numbers separated by commas expected, got {value!r}")
    return steps


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


def parse_mesh(value: Any) -> MeshConfig | None:
    """'context=2,tensor=2', or the same as an object of a configuration file."""
    if value is None:
        return None
    from helios_jax.sharding import MeshConfig
    from helios_jax.training.config import from_mapping

    if isinstance(value, str):
        try:
            sizes = {axis: int(size) for axis, size in (part.split("=") for part in value.replace(" ", "").split(","))}
        except ValueError:
            raise UserError(f"--mesh: AXIS=N[,AXIS=N] expected, got {value!r}") from None
        value = sizes
    return from_mapping(MeshConfig, value, "--mesh")


def read_prompts(path: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"--prompts_file: {path} cannot be read ({error})") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompts_file: {path} holds no prompt")
    return prompts


def outputs(given: dict[str, Any], prompts: list[str]) -> list[Path]:
    """The path of every video."""
    suffix = "" if given.get("format") == "png" else f".{given.get('format', 'mp4')}"
    if "prompts_file" in given:
        return [Path(given.get("output", "outputs")) / f"{i:04d}{suffix}" for i in range(len(prompts))]
    if "output" in given:
        return [Path(given["output"])]
    words = "".join(c if c.isalnum() else " " for c in prompts[0]).split()
    return [Path("outputs") / (("_".join(words)[:60] or "video") + suffix)]


class Progress:
    """One line on stderr: frames, chunks, frames per second, time left."""

    def __init__(self, label: str, stream: VideoStream, quiet: bool):
        self.label, self.total, self.frames, self.quiet = label, stream.num_chunks, stream.num_frames, quiet
        self.last = time.monotonic()
        self.done = 0
        self._show("first chunk under way")

    def update(self, chunk: int, frames: int) -> None:
        now = time.monotonic()
        rate, self.last = frames / (now - self.last), now
        self.done += frames
        left = int((self.frames - self.done) / rate)
        self._show(f"chunk {chunk + 1}/{self.total}, {rate:.1f} frames/s, {left // 60}:{left % 60:02d} left")

    def _show(self, line: str) -> None:
        if not self.quiet:
            line = f"{self.label}: {self.done}/{self.frames} frames, {line}"
            print(f"\r{line:<100}" if sys.stderr.isatty() else line, end="" if sys.stderr.isatty() else "\n",
                  file=sys.stderr, flush=True)

    def finish(self) -> None:
        if not self.quiet and sys.stderr.isatty():
            print(file=sys.stderr)


def sample_one(stream: VideoStream, writer: VideoWriter, progress: Progress) -> None:
    """Writes every chunk as it comes; on Ctrl-C says what was saved."""
    try:
        with writer:
            try:
                for chunk in stream:
                    writer.append(chunk.frames[0])
                    progress.update(chunk.index, chunk.frames.shape[1])
            finally:
                progress.finish()
    except KeyboardInterrupt:
        if writer.frames_written:
            print(f"saved {writer.frames_written} of {stream.num_frames} frames: {writer.path}", file=sys.stderr)
        raise
    print(writer.path, flush=True)


@command_line
def main(argv: list[str] | None = None) -> int:
    given = options(sys.argv[1:] if argv is None else argv)
    steps, lora = parse_steps(given.get("steps")), parse_lora(given.get("lora", []))

    mesh = parse_mesh(given.get("mesh"))

    import jax

    from helios_jax import compilation, distributed
    from helios_jax import video as video_io
    from helios_jax.convert.folder import read_model_folder, resolve_model
    from helios_jax.models.quantize import check_precision
    from helios_jax.pipeline.pipeline import HeliosPipeline
    from helios_jax.pipeline.prompts import checked_schedule, parse_schedule
    from helios_jax.pipeline.request import CHUNK_FRAMES, DEFAULT_FPS, SamplingOptions
    from helios_jax.text import Tokenizer, token_ids

    if mesh is not None:
        distributed.initialise()
    # Everything that can be wrong is looked at before the weights are read, which may take minutes.
    schedule = given.get("prompt_schedule", ())
    if "prompt_schedule" in given:
        schedule = parse_schedule(schedule) if isinstance(schedule, str) else checked_schedule(schedule)
    if "prompts_file" in given:
        prompts = read_prompts(given["prompts_file"])
    elif "prompt" in given:
        prompts = [given["prompt"]]
    elif schedule[0].chunk == 0:
        prompts = [schedule[0].prompt]
    else:
        raise UserError(f"--prompt_schedule: without --prompt it must begin at chunk 0, got {schedule[0].chunk}")
    paths, fps = outputs(given, prompts), given.get("fps", DEFAULT_FPS)
    image = video_io.read_image(given["image"]) if "image" in given else None
    frames = video_io.read_video(given["video"], min_frames=CHUNK_FRAMES) if "video" in given else None
    folder = read_model_folder(resolve_model(given.get("model", BOX), given.get("revision")))
    run = SamplingOptions(
        **{key: given[key] for key in ("height", "width", "num_frames", "seed", "skip_first_chunk",
                                       "allow_distilled_guidance") if key in given},
        steps=steps, guidance_scale=given.get("guidance"), use_zero_init=not given.get("no_zero_init", False),
        amplify_first_chunk=not given.get("no_amplify_first_chunk", False)).checked(folder.index, folder.scheduler)
    if schedule:
        checked_schedule(schedule, -(-run.num_frames // CHUNK_FRAMES))
    if image is not None:
        image = video_io.preprocess_image(image, run.height, run.width)
    if frames is not None:
        frames = video_io.preprocess_video(frames, run.height, run.width)
    is_first = jax.process_index() == 0
    for path in paths if is_first else ():
        video_io.VideoWriter(path, fps).discard()  # finds every output that cannot be written

    if given.get("compile_cache") != "off" and (note := compilation.use_cache(given.get("compile_cache"))):
        print(note, file=sys.stderr)
    precision = given.get("precision") or folder.precision("transformer")
    note = check_precision(precision, jax.devices()[0].device_kind)
    if note and is_first and not given.get("quiet", False):
        print(note, file=sys.stderr)
    negative, frames_dtype = given.get("negative_prompt", ""), "uint8"
    texts = [*prompts, *(change.prompt for change in schedule)]
    if len(prompts) > 1:  # one program for all of them
        read = [*texts, negative] if run.guidance_scale > 1 else texts
        rows = map(len, token_ids(Tokenizer.from_folder(folder.tokenizer), read))
        run = dataclasses.replace(run, text_rows=max(rows))
    ahead = {"prompts": texts, "negative_prompt": negative, "frames_dtype": frames_dtype, "options": run}
    if sys.stderr.isatty() and not given.get("quiet", False):  # elsewhere a mistake is to cost one line
        print("reading the weights, compiling the programs", file=sys.stderr, flush=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="precision ")  # said above
        pipeline = HeliosPipeline.from_pretrained(
            folder.root, dtype=given.get("dtype"), vae_dtype=given.get("vae_dtype"), lora=lora,
            merge_lora=not given.get("lora_apart", False), mesh=mesh,
            precision=precision, stream_weights=given.get("stream_weights", False), compile_for=ahead,
            read_weights=not given.get("compile_only", False))
    if given.get("compile_only", False):
        return 0
    for prompt, path in zip(prompts, paths, strict=True):
        stream = pipeline.stream(prompt, negative_prompt=negative, image=image, video=frames, prompt_schedule=schedule,
                                 options=run, lookahead=True, frames_dtype=frames_dtype)
        if not is_first:  # of several processes the first one writes
            collections.deque(stream, maxlen=0)
            continue
        progress = Progress(path.name, stream, given.get("quiet", False))
        sample_one(stream, video_io.VideoWriter(path, fps), progress)
    return 0


if __name__ == "__main__":
    main()
