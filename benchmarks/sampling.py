"""Sampling as a user sees it, on the device at hand: both schedules end to end, and where the time goes.

    python benchmarks/sampling.py                                              # 14B, random weights made on the device
    python benchmarks/sampling.py --minutes 15 --json sampling.json            # the main rows first, as many as fit
    python benchmarks/sampling.py --precision all --stream_weights             # every kind of row for one device
    python benchmarks/sampling.py --layers 2 --heads 2 --size 64x64            # the same at any size, for a CPU
    python benchmarks/sampling.py --model assets/helios-tiny-distilled --size 64x128      # a checkpoint

A row is a side (helios_jax or diffusers), a dtype, a precision of the linear layers (docs/low_precision.md), a place of
the weights and a schedule: [1,1,1] or [2,2,2] with an amplified first chunk. Every row runs in a process of its own, so
memory and cold starts are its own and the device is empty when it begins. One that fails (no memory, no such mode on
the device) is one line with the reason, and the next one follows. First come bfloat16 and fp8, then diffusers, then the
other precisions, weights streamed from the host and meshes. JSON, written anew after every row, holds all of it and the
machine; --table and --plot make a table and a figure of it.

Of each row: seconds from the prompt (as text) to the first chunk's frames on the host as bytes, cold, which is with an
empty cache of compiled programs and includes their compilation but not the loading of the weights, and warm; frames per
second of the stream of later chunks; the parts by themselves (the text of a prompt, of which the first chunk's share is
given; transformer, VAE and copy of the frames, of which a chunk's share is given: a copy hides behind the next chunk,
so shares need not add up to one); the operations of a chunk, the rate that they reach, and the floor; the most memory
of device and host since the process began, and beside it that of the device when the weights were in place (where the
two are equal, loading took more than sampling).

The floor is the time that the device's published peaks would allow: every matrix product and convolution of the traced
programs counts at the peak of its operands' type. So in mode fp8 or int8 the quantised linear layers count at the peak
of fp8 or int8, attention, VAE and embeddings at bfloat16's; weights of few bits that are widened before the product,
types without units of their own on the device, and float32 count at bfloat16's. Copies from the host (streamed
weights) and between devices are not in it; on a mesh all devices' peaks count. `helios_jax/tools/roofline.py` holds the
peaks; a device that is not there has no floor.

diffusers, eager and with torch.compile, does the same work where PyTorch is installed: same prompt, sizes, steps,
dtype (VAE included), weights or sizes of random weights, text encoder (random, too, where the others are; both sides
then take 64 made-up tokens for a prompt). What differs: it encodes all 512 rows of a padded prompt; its frames come to
the host as float32; it gives a video only when it is whole, so the time of a later chunk is what a video of --chunks
takes more than one of a single chunk, divided; nothing overlaps. Cold includes torch.compile, with empty caches.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Run as a script, Python looks for modules beside this file only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.sampling_rows import SCHEDULES  # noqa: E402

PRECISIONS = ("none", "fp8", "int8", "int8_weights", "int4_weights")
ON_DEVICE = "on the device"
FIRST = ("none", "fp8")  # before the peers


def plan(arguments: argparse.Namespace, prepared: dict[str, Any], has_peer: bool) -> list[dict[str, str]]:
    """The rows in the order in which they are measured."""
    given = arguments.precision or [mode for mode in FIRST if mode in ("none", *prepared["native"])]
    precisions = PRECISIONS if "all" in given else given
    first, others = ([mode for mode in precisions if (mode in FIRST) == early] for early in (True, False))
    dtypes = arguments.dtype or [prepared["dtype"]]
    places = [name for name in ("streamed" if arguments.stream_weights else None, arguments.mesh) if name]
    kinds = [("helios_jax", dtype, mode, ON_DEVICE) for dtype in dtypes for mode in first]
    kinds += [(f"diffusers, {way}", dtype, "none", ON_DEVICE) for dtype in dtypes
              for way in (arguments.peer if has_peer else ())]
    kinds += [("helios_jax", dtype, mode, ON_DEVICE) for dtype in dtypes for mode in others]
    kinds += [("helios_jax", dtype, mode, place) for place in places for dtype in dtypes for mode in precisions]
    return [dict(zip(("side", "dtype", "precision", "weights", "schedule"), (*kind, schedule), strict=True))
            for kind in kinds for schedule in SCHEDULES]


def run_process(settings: dict[str, Any], row: dict[str, str] | None, timeout: float | None) -> dict[str, Any]:
    """What ``sampling_rows.py`` finds, or {"error": why not in one line, "log": the end of what it printed}."""
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder) / "result.json", Path(folder) / "log"
        # Cold is cold: no compiled program of any kind from an earlier run.
        surroundings = dict(os.environ, JAX_ENABLE_COMPILATION_CACHE="false",
                            TORCHINDUCTOR_CACHE_DIR=f"{folder}/inductor", TRITON_CACHE_DIR=f"{folder}/triton")
        surroundings.pop("JAX_COMPILATION_CACHE_DIR", None)
        if row and row["side"] != "helios_jax":
            surroundings["JAX_PLATFORMS"] = "cpu"  # the device is PyTorch's alone
        command = [sys.executable, str(Path(__file__).with_name("sampling_rows.py")),
                   json.dumps({"settings": settings} | ({"row": row} if row else {})), str(result)]
        start = time.perf_counter()
        with log.open("w") as printed:
            process = subprocess.Popen(command, stdout=printed, stderr=printed, env=surroundings,
                                       start_new_session=True)
        late = False
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            if process.poll() is None:  # with the processes that it started
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if result.is_file():
            found = json.loads(result.read_text())
        elif late:
            found = {"error": "no time left"}
        else:
            code = process.returncode
            found = {"error": f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"}
        if "error" in found:
            found["log"] = log.read_text(errors="replace")[-2000:]
        return found | {"process_s": time.perf_counter() - start}


# -- report -----------------------------------------------------------------------------------------------------------


def label(row: dict[str, Any]) -> str:
    numbers = row["dtype"] if row["precision"] == "none" else f"{row['dtype']} {row['precision']}"
    where = "" if row["weights"] == ON_DEVICE else f" {row['weights']}"
    return f"{row['side']:<19} {numbers + where:<21} {row['schedule']:<17}"


def gib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**30:.2f}"


def describe_row(row: dict[str, Any]) -> str:
    """One line, and two more with the parts of ours."""
    if "error" in row:
        return f"{label(row)} failed: {row['error']}"
    line = (f"{label(row)} {row['frames_per_second']:8.2f} frames/s   prompt to first chunk "
            f"{row['first_chunk_cold_s']:.2f} s cold, {row['first_chunk_warm_s']:.2f} s warm   at most "
            f"{gib(row['host_peak_bytes'])} GiB of the host")
    if row["device_peak_bytes"] is not None:
        line += (f", {gib(row['device_peak_bytes'])} of the device ({gib(row['weights_memory']['device_peak_bytes'])} "
                 "while loading)")
    if "parts_s" not in row:
        return line
    shares = "  ".join(f"{name} {value * 1e3:.1f} ms ({row['shares'][name]:.0%})"
                       for name, value in row["parts_s"].items())
    flops = sum(sum(part.values()) for part in row["flops"].values())
    floor = "" if row["floor_s"] is None else (f", floor {row['floor_s']:.3f} s: {row['chunk_s'] / row['floor_s']:.2f} "
                                               "times that")
    return (f"{line}\n    {shares}\n    a chunk {row['chunk_s']:.3f} s, {flops / 1e12:.3f} TFLOP, "
            f"{row['flops_per_second'] / 1e12:.3f} TFLOP/s{floor}")


def table(report: dict[str, Any]) -> str:
    """The report in Markdown, the machine first."""
    machine = report["machine"]
    lines = [f"{machine['devices']} x {machine['device']} ({gib(machine['device_memory']) or '?'} GiB for JAX), "
             f"{machine['processor']}, {machine['cores']} cores, {gib(machine['memory']) or '?'} GiB; jax "
             f"{machine['jax']}, Python {machine['python']}. {report['arguments']['size']}, chunks of 33 frames.", "",
             "| side | numbers | weights | schedule | frames/s | first chunk, cold | warm | TFLOP/s | "
             "times the floor | device, GiB | host, GiB |", "| --- | --- | --- | --- |" + " ---: |" * 7]
    for row in report["rows"]:
        cells = [row["side"], row["dtype"] if row["precision"] == "none" else f"{row['dtype']} {row['precision']}",
                 row["weights"], row["schedule"]]
        if "error" in row:
            cells += [row["error"].replace("|", "/"), *[""] * 6]
        else:
            floor, rate = row.get("floor_s"), row.get("flops_per_second")
            cells += [f"{row['frames_per_second']:.2f}", f"{row['first_chunk_cold_s']:.2f} s",
                      f"{row['first_chunk_warm_s']:.2f} s", "" if rate is None else f"{rate / 1e12:.2f}",
                      "" if floor is None else f"{row['chunk_s'] / floor:.2f}", gib(row["device_peak_bytes"]),
                      gib(row["host_peak_bytes"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], file: str) -> None:
    """Bars of frames per second; rows that failed have none."""
    import matplotlib.pyplot as plt

    rows = [row for row in rows if "error" not in row][::-1]
    figure, axes = plt.subplots(figsize=(8, 1 + 0.5 * len(rows)), layout="constrained")
    bars = axes.barh([" ".join(label(row).split()) for row in rows], [row["frames_per_second"] for row in rows])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.margins(x=0.12)
    axes.set_xlabel("frames per second")
    figure.savefig(file)
    plt.close(figure)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", help="hub id or folder of a checkpoint, which is sampled as a Distilled one; default: "
                   "random weights of the 14B model's sizes")
    p.add_argument("--layers", type=int, default=40, help="of the random model")
    p.add_argument("--heads", type=int, default=40, help="of the random model; its widths follow")
    p.add_argument("--size", default="384x640", metavar="HxW")
    p.add_argument("--chunks", type=int, default=6, help="of each video, at least 3")
    p.add_argument("--repeats", type=int, default=5, help="of the warm first chunk and each part measured alone")
    p.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"),
                   help="default: float32 on a CPU, else bfloat16")
    p.add_argument("--precision", nargs="+", choices=(*PRECISIONS, "all"), help="of the linear layers; default: none, "
                   "and fp8 where the device has products of it")
    p.add_argument("--stream_weights", action="store_true", help="rows with the weights in the host's memory, too")
    p.add_argument("--mesh", metavar="AXIS=N[,...]", help="rows on several devices, too; as sample.py takes it")
    p.add_argument("--peer", nargs="*", choices=("eager", "compiled"), default=["eager", "compiled"],
                   help="how diffusers runs, where it is installed; nothing for not at all")
    p.add_argument("--minutes", type=float, help="end after so many; rows that do not fit are reported as such")
    p.add_argument("--json", metavar="FILE")
    p.add_argument("--table", metavar="FILE", help="Markdown")
    p.add_argument("--plot", metavar="FILE", help="PNG, SVG or PDF; needs matplotlib")
    return p


def main(argv: list[str] | None = None) -> dict[str, Any]:
    p = parser()
    arguments = p.parse_args(argv)
    end = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    if arguments.chunks < 3:
        p.error(f"--chunks: at least 3, got {arguments.chunks}")
    try:
        height, width = (int(n) for n in arguments.size.split("x"))
    except ValueError:
        p.error(f"--size: HxW expected, got {arguments.size!r}")
    if arguments.mesh and "=" not in arguments.mesh:
        p.error(f"--mesh: AXIS=N[,AXIS=N] expected, got {arguments.mesh!r}")
    if arguments.plot and not importlib.util.find_spec("matplotlib"):
        p.error("--plot: matplotlib is not installed")
    settings = {name: getattr(arguments, name) for name in ("model", "layers", "heads", "chunks", "repeats")}
    settings["size"] = height, width
    has_peer = all(importlib.util.find_spec(name) for name in ("torch", "diffusers", "transformers"))
    if arguments.peer and not has_peer:
        print("diffusers: left out, PyTorch or diffusers or transformers is not installed", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        # Not in this process, which must not hold the device.
        prepared = run_process({**settings, "scratch": scratch}, None, None)
        if "error" in prepared:
            raise SystemExit(f"{prepared['log']}error: {prepared['error']}")
        settings |= {"model": prepared["model"], "device": prepared["machine"]["device"]}
        report: dict[str, Any] = {"machine": prepared["machine"], "arguments": vars(arguments), "rows": []}
        for row in plan(arguments, prepared, has_peer):
            left = None if end is None else max(0.0, end - time.monotonic())
            found = {"error": "no time left"} if left == 0 else run_process(settings, row, left)
            report["rows"].append(row | found)
            print(describe_row(report["rows"][-1]), flush=True)
            if arguments.json:
                Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")
    if arguments.table:
        Path(arguments.table).write_text(table(report))
    if arguments.plot:
        plot(report["rows"], arguments.plot)
    return report


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the row that is being measured must end, too
    main()
