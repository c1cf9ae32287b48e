"""Whether the 44th chunk of a video costs what the third one does: time and memory of every chunk of one long run.

    python benchmarks/long_video.py                                            # 60 seconds by the model in the box
    python benchmarks/long_video.py --model checkpoints/helios-distilled --size 384x640 --dtype bfloat16

Compares chunks 35 to 44 with chunks 3 to 12: the median time of a chunk (its frames on the host), and the most memory
in use so far, of the host and of the device (a CPU's device is the host). The history has a constant size and no
program is compiled twice, so both should be the same. JSON holds every chunk and the machine.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Run as a script, Python looks for modules beside this file only.
sys.path.insert(0, str(ROOT))

from benchmarks.machine import describe  # noqa: E402

PROMPT = "a red circle moving right on a dark background"


def measure(arguments: argparse.Namespace) -> list[dict[str, float]]:
    """Seconds of every chunk and the peaks behind it, in bytes; a device without statistics has none."""
    import jax

    from helios_jax.pipeline.pipeline import HeliosPipeline
    from helios_jax.pipeline.request import CHUNK_FRAMES

    height, width = (int(n) for n in arguments.size.split("x"))
    pipe = HeliosPipeline.from_pretrained(arguments.model, dtype=arguments.dtype, vae_dtype=arguments.dtype)
    stream = pipe.stream(PROMPT, height=height, width=width, num_frames=CHUNK_FRAMES * arguments.chunks,
                         steps=arguments.steps, frames_dtype="uint8")
    rows, device = [], jax.local_devices()[0]
    while True:
        start = time.perf_counter()
        if next(stream, None) is None:
            return rows
        seconds = time.perf_counter() - start
        statistic = device.memory_stats() or {}
        rows.append({"seconds": seconds, "host_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                     **({"device_peak": statistic["peak_bytes_in_use"]} if "peak_bytes_in_use" in statistic else {})})


def main(argv: list[str] | None = None) -> dict:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=str(ROOT / "assets" / "helios-tiny"))
    p.add_argument("--size", default="64x128", metavar="HxW")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    p.add_argument("--steps", type=int, default=1, metavar="N", help="of Base, or per level")
    p.add_argument("--chunks", type=int, default=44, metavar="N", help="of 33 frames, at least 14; 44 are a minute")
    p.add_argument("--json", metavar="FILE", help="where to write the numbers")
    arguments = p.parse_args(argv)
    if arguments.chunks < 14:
        p.error("--chunks: at least 14, so that the last ten are not the first")
    rows = measure(arguments)
    early, late = rows[2:12], rows[-10:]
    compared = {"seconds": [statistics.median(row["seconds"] for row in part) for part in (early, late)]}
    for name in ("host_peak", "device_peak"):
        if name in rows[0]:
            compared[name] = [part[-1][name] for part in (early, late)]
    print(f"{'':<12} {'chunks 3-12':>14} {f'{len(rows) - 9}-{len(rows)}':>14} {'change':>9}")
    for name, (before, after) in compared.items():
        shown = [f"{x:12.3f} s" if name == "seconds" else f"{x / 2**20:10.1f} MiB" for x in (before, after)]
        print(f"{name:<12} {shown[0]:>14} {shown[1]:>14} {after / before - 1:9.2%}")
    report = {"machine": describe(), "arguments": vars(arguments), "compared": compared, "chunks": rows}
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main()
