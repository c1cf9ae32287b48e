"""Compiles the runs of configs/ for TPU pods that are not there, and prints the table of docs/pods.md.

    pip install libtpu
    python benchmarks/compile_pods.py --out pods                     # all cases, one after another; minutes of CPU each
    python benchmarks/compile_pods.py --out pods --only s1-lora-v5p

Every case is one call of helios_jax.tools.compile_check, which the table's rows can be repeated with. Its output and
numbers are kept in the folder --out; a case whose numbers are there already is not compiled again. Nothing runs: times
and MFU are modelled.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from helios_jax.tools.roofline import CHIPS, model_time  # noqa: E402

GIB = 2**30
EFFICIENCY = 0.6


class Case(NamedTuple):
    """One compile check. title: of its row; sample: videos at once, or None for the training step; player: the one
    whose turn is compiled alone."""

    title: str
    config: str
    topology: str
    changes: tuple[str, ...] = ()
    sample: int | None = None
    player: str | None = None

    @property
    def arguments(self) -> list[str]:
        flags = [part for flag, value in (("--sample", self.sample), ("--player", self.player)) if value is not None
                 for part in (flag, str(value))]
        return ["--config", f"configs/{self.config}", "--topology", self.topology, *flags,
                *[part for change in self.changes for part in ("--set", change)]]


FULL = "objective.lora.rank=0"
CASES = {
    "s1-lora-v5p": Case("14B stage 1, LoRA", "stage1_init.py:14b", "v5p:4x4x4"),
    "s1-full-v5p": Case("14B stage 1, full", "stage1_init.py:14b", "v5p:4x4x4", (FULL,)),
    "s2-lora-v5p": Case("14B stage 2, LoRA", "stage2_init.py:14b", "v5p:4x4x4"),
    "s2-full-v5p": Case("14B stage 2, full", "stage2_init.py:14b", "v5p:4x4x4", (FULL,)),
    "s1-lora-v6e": Case("14B stage 1, LoRA", "stage1_init.py:14b", "v6e:16x16", ("mesh.context=2",)),
    "s1-full-v6e": Case("14B stage 1, full", "stage1_init.py:14b", "v6e:16x16", ("mesh.context=2", FULL)),
    "s2-lora-v6e": Case("14B stage 2, LoRA", "stage2_init.py:14b", "v6e:16x16", ("mesh.context=4",)),
    "s2-full-v6e": Case("14B stage 2, full", "stage2_init.py:14b", "v6e:16x16", ("mesh.context=4", FULL)),
    "s1-1.3b-v5e": Case("1.3B stage 1, LoRA", "stage1_init.py:1.3b", "v5e:4x4", ("accumulate=8",)),
    "s2-1.3b-v5e": Case("1.3B stage 2, LoRA", "stage2_init.py:1.3b", "v5e:4x4", ("accumulate=4",)),
    "critic-v5p": Case("14B stage 3, critic's turn", "stage3_dmd.py:post", "v5p:4x4x4", player="critic"),
    "student-v5p": Case("14B stage 3, student's turn", "stage3_dmd.py:post", "v5p:4x4x4", player="student"),
    "critic-v6e": Case("14B stage 3, critic's turn", "stage3_dmd.py:post", "v6e:16x16", ("mesh.context=2",),
                       player="critic"),
    "student-v6e": Case("14B stage 3, student's turn", "stage3_dmd.py:post", "v6e:16x16", ("mesh.context=2",),
                        player="student"),
    "base-v5p": Case("14B Base, sampling", "stage1_init.py:14b", "v5p:2x2x2", ("mesh.fsdp=1", "mesh.context=8"), 1),
    "mid-v6e": Case("14B Mid, sampling", "stage2_init.py:14b", "v6e:2x4", ("mesh.fsdp=1", "mesh.context=8"), 1),
    "distilled-v5p": Case("14B Distilled, sampling", "stage3_dmd.py:post", "v5p:2x2x1",
                          ("mesh.fsdp=1", "mesh.context=4"), 1),
    "distilled-v6e": Case("14B Distilled, sampling", "stage3_dmd.py:post", "v6e:2x4",
                          ("mesh.fsdp=1", "mesh.context=4", "mesh.tensor=2"), 1),
}


def compile_case(name: str, case: Case, out: Path) -> None:
    """Runs one compile check; its numbers are written only when it ran to the end."""
    numbers = out / f"{name}.json"
    if numbers.exists():
        return
    print(f"{name}: {' '.join(case.arguments)}", flush=True)
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    unfinished = out / f".{name}.json"
    with open(out / f"{name}.log", "wb") as log:
        code = subprocess.run([sys.executable, "-m", "helios_jax.tools.compile_check", *case.arguments, "--no-remedy",
                               "--efficiency", str(EFFICIENCY), "--json", str(unfinished)], cwd=ROOT, stdout=log,
                              stderr=subprocess.STDOUT, env={**os.environ, "JAX_PLATFORMS": "cpu"}).returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{name}: exit code {code}", flush=True)
    if code in (0, 1):
        values = json.loads(unfinished.read_text())
        values |= {"wall_seconds": time.monotonic() - start,
                   "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}
        numbers.write_text(json.dumps(values, indent=2) + "\n")
        unfinished.unlink()


def row(case: Case, values: dict, program: dict) -> list[str]:
    """One line of the table."""
    chip, kinds = CHIPS[case.topology.partition(":")[0]], program["kinds"]
    mesh = " ".join(f"{axis} {size}" for axis, size in values["mesh"].items() if size > 1)
    batch = f"{values['batch_size']} in {values['accumulate']}" if case.sample is None else f"{case.sample} video"
    held = sum(kinds.get(kind, 0.0) for kind in ("parameters", "average", "optimizer", "frozen"))
    level = "" if case.sample is None else f": {program['name'].removeprefix('sampling, ')}"
    start = [case.title + level, case.topology, mesh, batch, values["remat"] if case.sample is None else "-"]
    if not program["fits"]:
        return [*start, f"{program['used'] / GIB:.1f} of {chip.memory / GIB:.1f}: does not fit", *["-"] * 6]
    found = program["collectives"]
    sent = sum(collective["sent"] for collective in found.values())
    computed, useful = (program[key] / values["chips"] for key in ("flops", "flops_without_rematerialisation"))
    modelled = model_time(chip, computed, sent, EFFICIENCY)
    seconds = f"{modelled.best:.2f} - {modelled.worst:.2f}"
    if program["times"] > 1:
        seconds += f", {program['times']} times"
    percent = [100 * useful / chip.flops / bound for bound in (modelled.worst, modelled.best)]
    return [*start, f"{program['used'] / GIB:.1f} of {chip.memory / GIB:.1f}", f"{held / GIB:.2f}",
            f"{kinds['temporary'] / GIB:.1f}", f"{computed / 1e12:.0f}",
            ", ".join(f"{collective['count']} {kind}" for kind, collective in found.items()), f"{sent / GIB:.1f}",
            seconds, f"{percent[0]:.0f} - {percent[1]:.0f}"]


HEADER = ("case", "chips", "mesh", "batch, parts", "remat", "GiB used", "state, weights", "temporary", "TFLOP",
          "collectives", "GiB sent", "step s, modelled", "MFU %, modelled")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of outputs and numbers")
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES), help="cases (default: all)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    lines = [HEADER, ("---",) * 5 + ("---:",) * 4 + ("---",) + ("---:",) * 3]
    for name in options.only:
        compile_case(name, CASES[name], options.out)
        numbers = options.out / f"{name}.json"
        if numbers.exists():
            values = json.loads(numbers.read_text())
            lines += [row(CASES[name], values, program) for program in values["programs"]]
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return 0 if all((options.out / f"{name}.json").exists() for name in options.only) else 1


if __name__ == "__main__":
    sys.exit(main())
