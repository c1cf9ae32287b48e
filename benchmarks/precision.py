"""What low precision costs: the first chunk of a model in every mode, against plain float32 and plain bfloat16.

    python benchmarks/precision.py                            # the Distilled model in the box, with its own steps
    python benchmarks/precision.py --modes fp8 int8 --steps 1,1,1
    python benchmarks/precision.py --score assets/prompts/held_out_200.json --steps 1,1,1     # hours on a CPU

Same prompt, seed and steps for all. One row per mode: PSNR of the frames (peak 1) and of the latents (peak: their
range) against float32 and against bfloat16, and the bytes of the transformer's weights. The rows 'none' are not
quantised. With --score the rule-based reader judges the model in each mode, too (helios_jax.tools.evaluate), and the
row says how many points of 100 it loses against bfloat16. JSON holds the machine's description.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PROMPT = "a red circle moving right on a dark background"
PLAIN = (("none", "float32"), ("none", "bfloat16"))


class Sample(NamedTuple):
    """The first chunk: frames [1, 33, H, W, 3], latents [1, 9, h, w, 16]; bytes of the transformer's weights."""

    frames: np.ndarray
    latents: np.ndarray
    bytes: int


def psnr(got: np.ndarray, want: np.ndarray, peak: float) -> float | None:
    """In decibels; None where nothing differs."""
    error = float(np.mean(np.square(got.astype(np.float64) - want)))
    return 10 * math.log10(peak**2 / error) if error else None


def first_chunk(model: str, mode: str, dtype: str, size: tuple[int, int] | None, steps: tuple[int, ...] | None
                ) -> Sample:
    import jax

    from helios_jax.pipeline.pipeline import HeliosPipeline

    # A few steps do not repay compiling every layer by itself.
    pipeline = HeliosPipeline.from_pretrained(model, dtype=dtype, vae_dtype="float32", precision=mode, unroll=1)
    height, width = size or (None, None)
    chunk = next(pipeline.stream(PROMPT, num_frames=33, height=height, width=width, seed=42, steps=steps))
    bits = [leaf.size * (4 if "int4" in str(leaf.dtype) else 8 * leaf.dtype.itemsize)
            for leaf in jax.tree.leaves(pipeline.params["transformer"])]
    return Sample(chunk.frames, np.asarray(chunk.latents), sum(bits) // 8)


def compared(got: Sample, plain: dict[str, Sample]) -> dict[str, Any]:
    """PSNR against each of the plain samples."""
    return {f"{part}_psnr_{dtype}": psnr(getattr(got, part), getattr(want, part),
                                         1.0 if part == "frames" else float(np.ptp(want.latents)))
            for part in ("frames", "latents") for dtype, want in plain.items()}


def score(model: str, mode: str, dtype: str, steps: tuple[int, ...] | None, prompts: str, processes: int
          ) -> dict[str, Any]:
    """Share of videos that are right in every attribute, with its 95 % interval."""
    from helios_jax.data import reader
    from helios_jax.data.shapes import Attributes
    from helios_jax.tools import evaluate

    entries = evaluate.read_prompts(prompts)
    settings = evaluate.Settings(model, 8, steps, None, None, 0, mode, dtype=dtype)
    _, judged = evaluate.judge_in_processes(settings, entries, processes)
    result = reader.score([j.reading for j in judged], [Attributes(**entry["attributes"]) for entry in entries])
    return {"videos": result.total, "right_in_all": result.all_fields, "wilson_95": result.interval}


def described(row: dict[str, Any]) -> str:
    def decibels(part: str) -> str:
        return " /".join("    -" if row[f"{part}_psnr_{dtype}"] is None else f"{row[f'{part}_psnr_{dtype}']:5.1f}"
                         for _, dtype in PLAIN)

    line = (f"{row['mode'] + ', ' + row['dtype']:<23} frames {decibels('frames')} dB   latents {decibels('latents')} dB"
            f"   weights {row['bytes'] / 1e6:6.2f} MB")
    if "points_lost" in row:
        line += "   right {:.1%} ({:.1%} to {:.1%})".format(row["right_in_all"], *row["wilson_95"])
        line += f"   {row['points_lost']:+.1f} points lost"
    return line


def main(argv: list[str] | None = None) -> dict[str, Any]:
    from benchmarks.machine import describe
    from helios_jax.models.quantize import PRECISIONS

    modes = [mode for mode in PRECISIONS if mode != "none"]
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=str(ROOT / "assets" / "helios-tiny-distilled"), metavar="FOLDER")
    p.add_argument("--modes", nargs="*", choices=modes, default=modes)
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the quantised models")
    p.add_argument("--size", metavar="HxW", help="default: the model's")
    p.add_argument("--steps", metavar="N[,N,N]", help="default: the model's")
    p.add_argument("--score", metavar="FILE", help="prompts for the reader")
    p.add_argument("--processes", type=int, default=1, metavar="N", help="that divide the reader's prompts")
    p.add_argument("--json", metavar="FILE")
    arguments = p.parse_args(argv)
    size = tuple(int(n) for n in arguments.size.split("x")) if arguments.size else None
    steps = tuple(int(n) for n in arguments.steps.split(",")) if arguments.steps else None
    samples = {dtype: first_chunk(arguments.model, "none", dtype, size, steps) for _, dtype in PLAIN}
    start, rows, judged = time.monotonic(), [], {}
    print(f"{'':<23} against float32 / against bfloat16")
    # bfloat16 first: the others' points are counted from its own.
    for mode, dtype in [*reversed(PLAIN), *((mode, arguments.dtype) for mode in arguments.modes)]:
        got = samples[dtype] if mode == "none" else first_chunk(arguments.model, mode, dtype, size, steps)
        row = {"mode": mode, "dtype": dtype, **compared(got, samples), "bytes": got.bytes}
        if arguments.score:
            judged[mode, dtype] = score(arguments.model, mode, dtype, steps, arguments.score, arguments.processes)
            lost = judged["none", "bfloat16"]["right_in_all"] - judged[mode, dtype]["right_in_all"]
            row |= {**judged[mode, dtype], "points_lost": 100 * lost}
        rows.append(row)
        print(described(row), flush=True)
    report = {"machine": describe(), "model": arguments.model, "prompt": PROMPT, "steps": steps, "size": size,
              "prompts": arguments.score, "seconds": time.monotonic() - start, "rows": rows}
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main()
