"""Judges a model of moving shapes by the rule-based reader.

    python -m helios_jax.tools.evaluate --model assets/helios-tiny --prompts assets/prompts/held_out_200.json

Samples every prompt of the file with its own seed and length, reads the frames (``helios_jax/data/reader.py``) and
prints how many are right in every attribute, with the 95 % Wilson interval. Videos longer than ``LONG`` frames are
judged by what they keep: object, colour and direction in the first window, the last and most of those between.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from helios_jax.data import reader
from helios_jax.data.shapes import Attributes
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
    if not isinstance(entries, list) or not all(isinstance(e, dict) and needed <= set(e) for e in entries):
        raise UserError(f"--prompts: {path} must be a list of objects with {', '.join(sorted(needed))}")
    return entries


def plain_numbers(frames: np.ndarray) -> dict[str, float]:
    """Motion, coherence and, where the video is long enough to have them, drift and seams."""
    numbers = {"motion_px_per_frame": reader.motion_amplitude(frames), "coherence": reader.temporal_coherence(frames)}
    if len(frames) > 2 * reader.NATIVE_WINDOW:
        numbers |= {"colour_drift": reader.colour_drift(frames), "seam_jump": reader.seam_jump(frames)}
    return numbers


@command_line
def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m helios_jax.tools.evaluate", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, metavar="FOLDER")
    p.add_argument("--prompts", default="assets/prompts/held_out_200.json", metavar="FILE")
    p.add_argument("--batch", type=int, default=8, metavar="N", help="videos sampled together")
    p.add_argument("--limit", type=int, metavar="N", help="only the first N prompts")
    p.add_argument("--steps", metavar="N[,N,N]", help="default: the model's")
    p.add_argument("--guidance", type=float, metavar="G", help="default: the model's")
    p.add_argument("--num_frames", type=int, metavar="N", help="default: what the file says")
    p.add_argument("--seed_offset", type=int, default=0, metavar="N", help="added to every seed")
    p.add_argument("--json", metavar="FILE", help="where to write the numbers")
    arguments = p.parse_args(argv)
    entries = read_prompts(arguments.prompts)[: arguments.limit]

    import jax

    from helios_jax.pipeline.pipeline import HeliosPipeline

    pipeline = HeliosPipeline.from_pretrained(arguments.model)
    steps = tuple(int(n) for n in arguments.steps.split(",")) if arguments.steps else None
    readings, kept, numbers = [], [], []
    start = time.monotonic()
    for first in range(0, len(entries), arguments.batch):
        group = entries[first : first + arguments.batch]
        frames_asked = arguments.num_frames or group[0]["num_frames"]
        # A short last group is filled up, so that one program serves all.
        filled = group + [group[-1]] * (arguments.batch - len(group))
        videos = pipeline([e["prompt"] for e in filled], seed=[e["seed"] + arguments.seed_offset for e in filled],
                          num_frames=frames_asked, steps=steps, guidance_scale=arguments.guidance)
        for entry, video in zip(group, videos, strict=False):
            expected = Attributes(**entry["attributes"])
            readings.append(reader.read(video))
            numbers.append(plain_numbers(video))
            if len(video) >= LONG:
                kept.append(reader.read_long(video).kept(expected, KEPT))
        print(f"{len(readings)}/{len(entries)} in {time.monotonic() - start:.0f} s", file=sys.stderr)
    expected = [Attributes(**entry["attributes"]) for entry in entries]
    score = reader.score(readings, expected)
    report = {
        "model": str(arguments.model), "variant": pipeline.index.variant, "prompts": arguments.prompts,
        "videos": score.total, "right_in_all": score.all_fields, "wilson_95": score.interval, "right": score.per_field,
        "plain_numbers": {k: float(np.median([n[k] for n in numbers if k in n])) for k in numbers[0]},
        "seconds": time.monotonic() - start, "steps": steps, "guidance": arguments.guidance,
        "machine": f"{platform.machine()}, {jax.devices()[0].device_kind}, jax {jax.__version__}",
    }
    print(f"right in every attribute: {score.all_fields:.1%} of {score.total}, 95 % interval "
          f"{score.interval[0]:.1%} to {score.interval[1]:.1%}")
    print("  " + ", ".join(f"{name} {rate:.1%}" for name, rate in score.per_field.items()))
    print("  median " + ", ".join(f"{name} {value:.3f}" for name, value in report["plain_numbers"].items()))
    if kept:
        whole = sum(all(k.values()) for k in kept)
        report["kept_to_the_end"] = {"all": whole, "of": len(kept), **{f: sum(k[f] for k in kept) for f in KEPT}}
        print(f"kept object, colour and direction to the end: {whole} of {len(kept)}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    main()
