"""What low precision costs in fidelity: the first chunk of a model in every mode against plain float32.

    python benchmarks/precision.py                                       # the model in the box, 64x128, 8 steps
    python benchmarks/precision.py --modes fp8 int8 --steps 50
    python benchmarks/precision.py --score assets/prompts/held_out_200.json --processes 2    # hours on a CPU

Same prompt, seed and steps for all. One row per mode: PSNR of the frames (peak 1) and of the latents (peak: their
range) against float32, and the bytes of the transformer's weights. The row 'none, bfloat16' shows what bfloat16 does.
With --score the rule-based reader judges the model in each mode, too (helios_jax.tools.evaluate). JSON holds the
machine's description.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PROMPT = "a red circle moving right on a dark background"


def psnr(got: np.ndarray, want: np.ndarray, peak: float) -> float:
    error = float(np.mean(np.square(got.astype(np.float64) - want)))
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


def first_chunk(model: str, mode: str, dtype: str, size: tuple[int, int], steps: int | None) -> dict:
    """Frames and latents of the first chunk, and the bytes of the transformer's weights."""
    import jax

    from helios_jax.pipeline.pipeline import HeliosPipeline

    # A few steps do not repay compiling every layer by itself.
    pipeline = HeliosPipeline.from_pretrained(model, dtype=dtype, precision=mode, unroll=1)
    chunk = next(pipeline.stream(PROMPT, num_frames=33, height=size[0], width=size[1], seed=42,
                                 steps=None if steps is None else (steps,) * pipeline.scheduler.stages))
    sizes = [leaf.size * (4 if "int4" in str(leaf.dtype) else 8 * leaf.dtype.itemsize)
             for leaf in jax.tree.leaves(pipeline.params["transformer"])]
    return {"frames": chunk.frames, "latents": np.asarray(chunk.latents), "bytes": sum(sizes) // 8}


def score(model: str, mode: str, prompts: str, processes: int) -> tuple[float, tuple[float, float]]:
    """Share of videos that are right in every attribute, with its 95 % interval."""
    from helios_jax.data import reader
    from helios_jax.data.shapes import Attributes
    from helios_jax.tools.evaluate import Settings, judge_in_processes, read_prompts

    entries = read_prompts(prompts)
    _, judged = judge_in_processes(Settings(model, 8, None, None, None, 0, mode), entries, processes)
    result = reader.score([j.reading for j in judged], [Attributes(**entry["attributes"]) for entry in entries])
    return result.all_fields, result.interval


def main() -> int:
    from benchmarks.machine import describe
    from helios_jax.models.quantize import PRECISIONS

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=str(ROOT / "assets" / "helios-tiny"), metavar="FOLDER")
    p.add_argument("--modes", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the quantised models")
    p.add_argument("--size", default="64x128", metavar="HxW")
    p.add_argument("--steps", type=int, default=8, metavar="N", help="per stage")
    p.add_argument("--score", metavar="FILE", help="prompts for the reader")
    p.add_argument("--processes", type=int, default=1, metavar="N", help="that divide the reader's prompts")
    p.add_argument("--json", metavar="FILE")
    arguments = p.parse_args()
    size = tuple(int(n) for n in arguments.size.split("x"))
    want = first_chunk(arguments.model, "none", "float32", size, arguments.steps)
    peak = float(np.ptp(want["latents"]))
    rows = []
    for mode, dtype in [(mode, "bfloat16" if mode == "none" else arguments.dtype) for mode in arguments.modes]:
        start = time.monotonic()
        got = first_chunk(arguments.model, mode, dtype, size, arguments.steps)
        row = {"mode": mode, "dtype": dtype, "frames_psnr": psnr(got["frames"], want["frames"], 1.0),
               "latents_psnr": psnr(got["latents"], want["latents"], peak), "bytes": got["bytes"]}
        line = (f"{mode + ', ' + dtype:<23} frames {row['frames_psnr']:5.1f} dB   latents "
                f"{row['latents_psnr']:5.1f} dB   weights {row['bytes'] / 1e6:8.2f} MB   "
                f"{time.monotonic() - start:5.0f} s")
        if arguments.score:
            row["right_in_all"], row["wilson_95"] = score(arguments.model, mode, arguments.score, arguments.processes)
            line += "   right {:.1%} ({:.1%} to {:.1%})".format(row["right_in_all"], *row["wilson_95"])
        rows.append(row)
        print(line, flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"machine": describe(), "steps": arguments.steps, "size": size,
                                                    "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
