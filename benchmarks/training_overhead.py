"""What the trainer costs beside its own step: data, placing, logging, signals against the bare compiled step.

    python benchmarks/training_overhead.py --config configs/tiny_stage1.py --set batch_size=64 --json overhead.json

The trainer runs as train.py runs it, on random records where the data are not there. After every log line, the same
compiled step runs as often on a batch that lies on the device already, so that both see the machine in the same
minutes. Printed are medians over the rounds after a warm-up; JSON holds every round and the machine. The comparison
means something where a step takes a second or more; the batch size sets that.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Run as a script, Python looks for modules beside this file only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

WARM_UP = 1  # rounds


def measure(values: dict[str, Any], rounds: int, steps: int) -> dict[str, Any]:
    """Seconds of a step by rounds, of the trainer and of the bare step.

    Args:
      values: of a configuration file.
      rounds: that count; steps: of each round.
    """
    import jax

    from helios_jax import sharding
    from helios_jax.training.config import run_config
    from helios_jax.training.loop import train
    from helios_jax.training.program import Program

    run = dataclasses.replace(run_config(values), num_steps=steps * (rounds + WARM_UP), log_every=steps,
                              checkpoint_every=steps * (rounds + WARM_UP), sample_every=0)
    program = Program.build(run)
    batch = sharding.place_batch(program.partition, next(iter(program.objective.dataset)), run.batch_size)
    compiled, frozen = program.lower(batch).compile(), program.load_frozen()
    state, bare = program.initial_state(), []

    def after_line(line: str) -> None:
        nonlocal state
        print(line, flush=True)
        if not line.startswith("step "):
            return
        start = time.perf_counter()
        for _ in range(steps):
            state, metrics = compiled(state, frozen, batch)
        jax.block_until_ready((state, metrics))
        bare.append((time.perf_counter() - start) / steps)

    with tempfile.TemporaryDirectory() as workdir:
        train(run, workdir, print_line=after_line)
        rows = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    return {"trainer_s": [row["step_seconds"] for row in rows][WARM_UP:], "bare_s": bare[WARM_UP:]}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--config", required=True, help="a file of configs/, with :argument where it takes one")
    p.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="changes")
    p.add_argument("--size", default="64x128", metavar="HxW", help="pixels of a video where the data are not there")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--steps", type=int, default=3, help="of each round")
    p.add_argument("--json", metavar="FILE", help="where to write the numbers")
    arguments = p.parse_args(argv)
    from benchmarks.machine import describe
    from helios_jax.tools.compile_check import load_values, stand_in_data

    height, width = (int(n) for n in arguments.size.split("x"))
    machine = describe()
    with stand_in_data(load_values(arguments.config, arguments.changes), (height, width)) as (values, note):
        print(note)
        report = measure(values, arguments.rounds, arguments.steps)
    trainer, bare = statistics.median(report["trainer_s"]), statistics.median(report["bare_s"])
    report |= {"trainer_median_s": trainer, "bare_median_s": bare, "overhead": trainer / bare - 1,
               "arguments": vars(arguments), "machine": machine}
    print(f"a step takes {trainer:.3f} s in the trainer and {bare:.3f} s by itself: {100 * report['overhead']:+.1f} %"
          + ("" if bare >= 1 else "; steps of less than a second say little"))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


if __name__ == "__main__":
    main()
