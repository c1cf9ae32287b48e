"""The models in the box side by side: what the rule-based reader says of them, plain numbers, and their time.

    python benchmarks/quality.py --out quality --row "Base=assets/helios-tiny" --row "Mid=assets/helios-tiny-mid" \\
        --row "Distilled [1,1,1]=assets/helios-tiny-distilled:1,1,1"

A row is NAME=FOLDER or NAME=FOLDER:STEPS (a number of steps, or one a level; default: the model's). Every row is judged
on the held-out prompts with several sampling seeds, on the long ones (60 seconds) with the first seed, and timed alone:
one prompt, one video of 99 frames, warm, median of several calls. Denoising is everything between a chunk's noise and
its latents; the whole call has prompt, decoding and frames on the host as well.

Every part is a JSON file in the folder --out, and one that is there is not made again: a stopped run goes on, and the
table can be printed from several machines' parts (--report makes nothing, and what is missing is "-"). Base takes most
of the time, with its 50 guided steps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# Run as a script, Python looks for modules beside this file only.
sys.path.insert(0, str(ROOT))

from helios_jax.data.reader import wilson_interval  # noqa: E402
from helios_jax.errors import UserError, command_line  # noqa: E402

SEED_STRIDE = 1000
PROMPTS = {name: str(ROOT / "assets" / "prompts" / file)
           for name, file in (("short", "held_out_200.json"), ("long", "held_out_20_long.json"))}
TIMED_PROMPT = "a red circle moves to the right over a dark background"
TIMED_FRAMES = 99


class Row(NamedTuple):
    """One model with one schedule. steps: None takes the model's own."""

    name: str
    model: str
    steps: str | None

    @classmethod
    def parse(cls, text: str) -> Row:
        match = re.fullmatch(r"([^=]+)=([^:]+)(?::(\d+(?:,\d+)*))?", text)
        if not match:
            raise UserError(f"--row: NAME=FOLDER or NAME=FOLDER:STEPS expected, got {text!r}")
        return cls(*match.groups())

    @property
    def slug(self) -> str:
        return re.sub(r"\W+", "-", self.name).strip("-").lower()


class DenoisingClock:
    """A chunk sampler that waits for every chunk's latents and counts how long they took."""

    def __init__(self, sampler: Any):
        self.sampler, self.seconds = sampler, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)

    def denoise(self, *arguments: Any) -> Any:
        import jax

        jax.block_until_ready(arguments)
        start = time.perf_counter()
        latents = jax.block_until_ready(self.sampler.denoise(*arguments))
        self.seconds += time.perf_counter() - start
        return latents


def measure_time(row: Row, repeats: int) -> dict[str, Any]:
    """Median seconds of denoising and of the whole call, for one video."""
    from benchmarks.machine import describe
    from helios_jax.pipeline.pipeline import HeliosPipeline

    pipe = HeliosPipeline.from_pretrained(row.model)
    steps = row.steps and tuple(int(n) for n in row.steps.split(","))
    denoising, whole = [], []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        stream = pipe.stream(TIMED_PROMPT, num_frames=TIMED_FRAMES, steps=steps)
        clock = stream._sampler = DenoisingClock(stream._sampler)
        for _ in stream:
            pass
        whole.append(time.perf_counter() - start)
        denoising.append(clock.seconds)
    # The first call compiled.
    return {"denoising_s": statistics.median(denoising[1:]), "call_s": statistics.median(whole[1:]),
            "frames": TIMED_FRAMES, "machine": describe()}


def judge(row: Row, prompts: str, out: Path, arguments: argparse.Namespace, seed: int) -> None:
    """One run of helios_jax.tools.evaluate; its file appears only when it ran to the end."""
    if out.exists():
        return
    unfinished = out.with_name(f".{out.name}")
    command = ["-m", "helios_jax.tools.evaluate", "--model", row.model, "--prompts", prompts, "--batch",
               str(arguments.batch), "--processes", str(arguments.processes), "--seed_offset", str(seed), "--json",
               str(unfinished)]
    for flag, value in (("--steps", row.steps), ("--limit", arguments.limit)):
        command += [] if value is None else [flag, str(value)]
    print(f"{row.name}: {' '.join(command)}", file=sys.stderr, flush=True)
    if code := subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL).returncode:
        raise UserError(f"--row: {row.name} ended with exit code {code}; the same command goes on from here")
    unfinished.rename(out)


def make_parts(rows: list[Row], out: Path, arguments: argparse.Namespace) -> None:
    """Times and judges every row, but for what is in ``out`` already."""
    out.mkdir(parents=True, exist_ok=True)
    for row in rows:
        timed = out / f"{row.slug}.time.json"
        if not timed.exists():
            timed.write_text(json.dumps(measure_time(row, arguments.repeats), indent=1) + "\n")
        for seed in range(arguments.seeds):
            judge(row, PROMPTS["short"], out / f"{row.slug}.seed{seed}.json", arguments, SEED_STRIDE * seed)
        judge(row, PROMPTS["long"], out / f"{row.slug}.long.json", arguments, 0)


def summary(row: Row, out: Path, seeds: int) -> dict[str, Any]:
    """One row of the table from the files in ``out``; what is missing there is None.

    Raises:
      UserError: a file is of another model or schedule.
    """
    def part(kind: str) -> dict[str, Any] | None:
        path = out / f"{row.slug}.{kind}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def judged(kind: str) -> dict[str, Any] | None:
        found = part(kind)
        made = found and (found["model"], ",".join(map(str, found["steps"])) if found["steps"] else None)
        if found and made != (row.model, row.steps):
            wanted, was = (f"{model} with steps {steps or 'of the model'}" for model, steps in (row[1:], made))
            raise UserError(f"--row: {row.name} is {wanted}, but {out / row.slug}.{kind}.json was made of {was}")
        return found

    short, long, timed = [judged(f"seed{seed}") for seed in range(seeds)], judged("long"), part("time") or {}
    there = [one for one in short if one]
    videos = sum(one["videos"] for one in there)
    right = round(sum(one["right_in_all"] * one["videos"] for one in there))
    plain = {name: statistics.mean(one["plain_numbers"][name] for one in there)
             for name in there[0]["plain_numbers"]} if there else None
    return {"name": row.name, "model": row.model, "steps": row.steps,
            "per_seed": [one and one["right_in_all"] for one in short], "right": right, "videos": videos,
            "wilson_95": list(wilson_interval(right, videos)) if videos else None, "plain_numbers": plain,
            "long": long and {name: long[name] for name in ("kept_to_the_end", "plain_numbers")},
            **{name: timed.get(name) for name in ("denoising_s", "call_s", "machine")}}


COLUMNS = ("", "right in all, by seed", "all seeds, 95 %", "motion", "coherence", "colour drift", "seam", "60 s: kept",
           "motion", "coherence", "colour drift", "seam", "denoising s", "", "call s")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown. Motion (pixels a frame), coherence, colour drift and the jump at seams are medians over videos: of the
    short ones, averaged over the seeds, then of the long ones. The denoising times are also given in parts of the first
    row's. A column in which everything is missing is left out."""
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    def plain(numbers: dict[str, float] | None) -> list[str]:
        names = ("motion_px_per_frame", "coherence", "colour_drift", "seam_jump")
        return [number(numbers and numbers[name], form) for name, form in zip(names, (".2f", ".3f", ".2f", ".1f"))]

    lines = [COLUMNS, ["---"] * 3 + ["---:"] * (len(COLUMNS) - 3)]
    for row in rows:
        long, interval = row["long"] or {}, row["wilson_95"]
        kept = long.get("kept_to_the_end")
        times = rows[0]["denoising_s"], row["denoising_s"]
        lines.append([
            row["name"], ", ".join(number(rate, ".1%") for rate in row["per_seed"]),
            f"{row['right']} of {row['videos']} ({interval[0]:.1%} - {interval[1]:.1%})" if interval else "-",
            *plain(row["plain_numbers"]), f"{kept['all']} of {kept['of']}" if kept else "-",
            *plain(long.get("plain_numbers")), number(row["denoising_s"], ".2f"),
            f"1/{times[0] / times[1]:.1f}" if all(times) else "-", number(row["call_s"], ".2f")])
    filled = [any(line[i] != "-" for line in lines[2:]) for i in range(len(COLUMNS))]
    return "\n".join(f"| {' | '.join(itertools.compress(line, filled))} |" for line in lines)


@command_line
def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--row", action="append", required=True, metavar="NAME=FOLDER[:STEPS]", help="may be repeated")
    p.add_argument("--out", required=True, type=Path, metavar="FOLDER")
    p.add_argument("--seeds", type=int, default=3, metavar="N", help="sampling seeds")
    p.add_argument("--repeats", type=int, default=5, metavar="N", help="timed calls")
    p.add_argument("--batch", type=int, default=10, metavar="N", help="videos judged together")
    p.add_argument("--processes", type=int, default=2, metavar="N", help="that divide the prompts")
    p.add_argument("--limit", type=int, metavar="N", help="only the first N prompts of both files")
    p.add_argument("--report", action="store_true", help="only print the table of the parts that are there")
    arguments = p.parse_args(argv)
    for name in ("seeds", "repeats", "batch", "processes"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name}: must be positive, got {getattr(arguments, name)}")
    rows = [Row.parse(text) for text in arguments.row]
    if len({row.slug for row in rows}) < len(rows):
        raise UserError("--row: two rows have the same name")
    out: Path = arguments.out
    if arguments.report and not out.is_dir():
        raise UserError(f"--out: no such folder: {out}")
    if not arguments.report:
        make_parts(rows, out, arguments)
    found = [summary(row, out, arguments.seeds) for row in rows]
    if not arguments.report:
        (out / "quality.json").write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
