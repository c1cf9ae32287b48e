"""How long from the command to the first chunk of a video, with an empty cache of compiled programs and a full one.

    python benchmarks/startup.py                                                # the model in the box
    python benchmarks/startup.py --model checkpoints/helios-distilled --size 384x640 --dtype bfloat16

Every case is a process of its own that does what sample.py does: reads the weights and compiles beside it, then makes
two chunks. "import" ends when the library is there, "load" when weights and programs are. JSON holds the machine, too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Run as a script, Python looks for modules beside this file only.
sys.path.insert(0, str(ROOT))

PROMPT = "a red circle moving right on a dark background"


def one_start(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of each part in this process, whose command was given at ``arguments.started``."""
    marks = []

    def mark(part: str) -> None:
        marks.append((part, time.time()))

    from helios_jax import compilation
    from helios_jax.pipeline.pipeline import HeliosPipeline

    mark("import")
    compilation.use_cache(arguments.cache)
    height, width = (int(n) for n in arguments.size.split("x"))
    run = {"height": height, "width": width, "frames_dtype": "uint8"}
    pipe = HeliosPipeline.from_pretrained(arguments.model, dtype=arguments.dtype, vae_dtype=arguments.dtype,
                                          compile_for={"prompts": PROMPT, **run})
    mark("load and compile")
    stream = pipe.stream(PROMPT, num_frames=66, **run)
    mark("text")
    for part in ("first chunk", "second chunk"):
        next(stream)
        mark(part)
    before = arguments.started
    seconds = {}
    for part, now in marks:
        seconds[part], before = now - before, now
    return seconds | {"command to first chunk": marks[-2][1] - arguments.started}


def main(argv: list[str] | None = None) -> dict:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=str(ROOT / "assets" / "helios-tiny"))
    p.add_argument("--size", default="64x128", metavar="HxW")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    p.add_argument("--json", metavar="FILE", help="where to write the numbers")
    p.add_argument("--started", type=float, help=argparse.SUPPRESS)  # of the process that is measured
    p.add_argument("--cache", help=argparse.SUPPRESS)
    arguments = p.parse_args(argv)
    if arguments.started is not None:
        seconds = one_start(arguments)
        print(json.dumps(seconds))
        return seconds
    from benchmarks.machine import describe

    rows = {}
    with tempfile.TemporaryDirectory() as cache:
        for case in ("cold", "warm"):
            command = [sys.executable, __file__, "--model", arguments.model, "--size", arguments.size, "--dtype",
                       arguments.dtype, "--cache", cache, "--started", str(time.time())]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            rows[case] = json.loads(done.stdout.splitlines()[-1])
    print(f"{'part':<24} {'cold':>9} {'warm':>9}")
    for part in rows["cold"]:
        print(f"{part:<24} {rows['cold'][part]:7.2f} s {rows['warm'][part]:7.2f} s")
    report = {"machine": describe(), "arguments": vars(arguments), "seconds": rows}
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main()
