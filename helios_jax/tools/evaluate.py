"""Judges a model of moving shapes by the rule-based reader.

    python -m helios_jax.tools.evaluate --model assets/helios-tiny --prompts assets/prompts/held_out_200.json

Samples every prompt of the file with its own seed and length, reads the frames (``helios_jax/data/reader.py``) and
prints how many are right in every attribute, with the 95 % Wilson interval. Videos longer than ``LONG`` frames are
judged by what they keep: object, colour and direction in the first window, the last and most of those between.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from helios_jax.data import reader
from helios_jax.data.shapes import Attributes
from helios_jax.data.writing import check_output, write_json
from helios_jax.errors import UserError, command_line

LONG = 12 * reader.NATIVE_WINDOW
KEPT = ("shape", "colour", "direction")


def read_prompts(path: str) -> list[dict[str, Any]]:
    """The prompt file: a list of objects with prompt, attributes, seed and num_frames.

    Raises:
      UserError: not such a list.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--prompts: {path} cannot be read ({error})") from None
    needed = {"prompt", "attributes", "seed", "num_frames"}
    if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) and needed <= set(e)
                                                               for e in entries):
        raise UserError(f"--prompts: {path} must be a list of objects with {', '.join(sorted(needed))}")
    for number, entry in enumerate(entries):
        try:
            Attributes(**entry["attributes"])
        except (TypeError, UserError) as error:
            raise UserError(f"--prompts: {path}: entry {number}: attributes: {error}") from None
        for name, lowest in (("seed", 0), ("num_frames", 1)):
            if type(entry[name]) is not int or entry[name] < lowest:
                raise UserError(f"--prompts: {path}: entry {number} needs a whole {name} of at least {lowest}, got "
                                f"{entry[name]!r}")
    return entries


def plain_numbers(frames: np.ndarray) -> dict[str, float]:
    """Motion, coherence and, where the video is long enough to have them, drift and seams."""
    numbers = {"motion_px_per_frame": reader.motion_amplitude(frames), "coherence": reader.temporal_coherence(frames)}
    if len(frames) > 2 * reader.NATIVE_WINDOW:
        numbers |= {"colour_drift": reader.colour_drift(frames), "seam_jump": reader.seam_jump(frames)}
    return numbers


class Judged(NamedTuple):
    """What the reader says of one video. kept: only of long ones."""

    reading: reader.Reading
    kept: dict[str, bool] | None
    numbers: dict[str, float]


class Settings(NamedTuple):
    """How the prompts are sampled; None leaves it to the model or the prompt file."""

    model: str
    batch: int
    steps: tuple[int, ...] | None
    guidance: float | None
    num_frames: int | None
    seed_offset: int
    precision: str | None = None
    keep_first_frame: bool = True
    dtype: str = "float32"


def judge(settings: Settings, entries: Sequence[dict[str, Any]]) -> tuple[str, list[Judged]]:
    """Samples and reads the videos of some entries of a prompt file; returns the model's variant with the readings."""
    from helios_jax.pipeline.pipeline import HeliosPipeline

    pipeline = HeliosPipeline.from_pretrained(settings.model, dtype=settings.dtype, vae_dtype="float32",
                                              precision=settings.precision)
    judged: dict[int, Judged] = {}
    start = time.monotonic()
    for group, num_frames in _groups(settings, entries):
        # A short last group is filled up, so that one program serves all.
        filled = [entries[i] for i in [*group, *[group[-1]] * (settings.batch - len(group))]]
        videos = pipeline([e["prompt"] for e in filled], seed=[e["seed"] + settings.seed_offset for e in filled],
                          num_frames=num_frames, steps=settings.steps, guidance_scale=settings.guidance,
                          keep_first_frame=settings.keep_first_frame)
        for i, video in zip(group, videos, strict=False):
            is_long = len(video) >= LONG
            kept = reader.read_long(video).kept(Attributes(**entries[i]["attributes"]), KEPT) if is_long else None
            judged[i] = Judged(reader.read(video), kept, plain_numbers(video))
        print(f"{len(judged)}/{len(entries)} in {time.monotonic() - start:.0f} s", file=sys.stderr)
    return pipeline.index.variant, [judged[i] for i in range(len(entries))]


def _groups(settings: Settings, entries: Sequence[dict[str, Any]]) -> Iterator[tuple[list[int], int]]:
    """Which entries are sampled together, and their length, which they share."""
    by_length: dict[int, list[int]] = {}
    for i, entry in enumerate(entries):
        by_length.setdefault(settings.num_frames or entry["num_frames"], []).append(i)
    for num_frames, indices in by_length.items():
        for first in range(0, len(indices), settings.batch):
            yield indices[first : first + settings.batch], num_frames


def judge_in_processes(settings: Settings, entries: Sequence[dict[str, Any]], processes: int
                       ) -> tuple[str, list[Judged]]:
    """:func:`judge` by several processes, each with its part of the entries: small models leave most cores idle."""
    size = -(-len(entries) // processes)
    parts = [entries[first : first + size] for first in range(0, len(entries), size)]
    if len(parts) == 1:
        return judge(settings, entries)
    with ProcessPoolExecutor(len(parts), mp_context=multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(judge, [settings] * len(parts), parts))
    return results[0][0], [judged for _, part in results for judged in part]


@command_line
def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m helios_jax.tools.evaluate", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, metavar="FOLDER")
    p.add_argument("--prompts", default="assets/prompts/held_out_200.json", metavar="FILE")
    p.add_argument("--batch", type=int, default=8, metavar="N", help="videos sampled together")
    p.add_argument("--processes", type=int, default=1, metavar="N", help="that divide the prompts")
    p.add_argument("--limit", type=int, metavar="N", help="only the first N prompts")
    p.add_argument("--steps", metavar="N[,N,N]", help="default: the model's")
    p.add_argument("--guidance", type=float, metavar="G", help="default: the model's")
    p.add_argument("--num_frames", type=int, metavar="N", help="default: what the file says")
    p.add_argument("--no_first_frame", action="store_true", help="later chunks do not see the first frame, for models "
                   "trained so (keep_first_frame)")
    p.add_argument("--seed_offset", type=int, default=0, metavar="N", help="added to every seed")
    p.add_argument("--precision", metavar="MODE", help="of the linear layers (docs/low_precision.md); default: the "
                   "model's")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of transformer and text "
                   "encoder (default: float32)")
    p.add_argument("--json", metavar="FILE", help="where to write the numbers, with what was read of every video")
    arguments = p.parse_args(argv)
    for name in ("batch", "processes", "limit", "num_frames"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(f"--{name}: must be positive, got {value}")
    entries = read_prompts(arguments.prompts)[: arguments.limit]
    try:
        steps = tuple(int(n) for n in arguments.steps.split(",")) if arguments.steps else None
    except ValueError:
        raise UserError(f"--steps: whole numbers with commas between them expected, got {arguments.steps!r}") from None
    if arguments.json:
        check_output("--json", arguments.json)

    import jax

    settings = Settings(arguments.model, arguments.batch, steps, arguments.guidance, arguments.num_frames,
                        arguments.seed_offset, arguments.precision, not arguments.no_first_frame, arguments.dtype)
    start = time.monotonic()
    variant, judged = judge_in_processes(settings, entries, arguments.processes)
    expected = [Attributes(**entry["attributes"]) for entry in entries]
    score = reader.score([j.reading for j in judged], expected)
    report = {
        "model": str(arguments.model), "variant": variant, "prompts": arguments.prompts,
        "videos": score.total, "right_in_all": score.all_fields, "wilson_95": score.interval, "right": score.per_field,
        "plain_numbers": {k: float(np.median([j.numbers[k] for j in judged if k in j.numbers]))
                          for k in judged[0].numbers},
        "seconds": time.monotonic() - start, "steps": steps, "guidance": arguments.guidance,
        "precision": arguments.precision, "dtype": arguments.dtype, "keep_first_frame": settings.keep_first_frame,
        "machine": f"{platform.machine()}, {jax.devices()[0].device_kind}, jax {jax.__version__}",
    }
    print(f"right in every attribute: {score.all_fields:.1%} of {score.total}, 95 % interval "
          f"{score.interval[0]:.1%} to {score.interval[1]:.1%}")
    print("  " + ", ".join(f"{name} {rate:.1%}" for name, rate in score.per_field.items()))
    print("  median " + ", ".join(f"{name} {value:.3f}" for name, value in report["plain_numbers"].items()))
    kept = [j.kept for j in judged if j.kept is not None]
    if kept:
        whole = sum(all(k.values()) for k in kept)
        report["kept_to_the_end"] = {"all": whole, "of": len(kept), **{f: sum(k[f] for k in kept) for f in KEPT}}
        print(f"kept object, colour and direction to the end: {whole} of {len(kept)}")
    if arguments.json:
        report["each"] = [{"prompt": entry["prompt"], "right": j.reading.matches(e), "kept": j.kept, **j.numbers}
                          for entry, e, j in zip(entries, expected, judged, strict=True)]
        path = Path(arguments.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, report)
    return 0


if __name__ == "__main__":
    main()
