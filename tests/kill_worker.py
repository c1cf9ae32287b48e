"""Trains the toy problem and kills it, again and again; see test_killed_runs.py.

    python kill_worker.py FOLDER KILLS   writes FOLDER/whole, FOLDER/killed and FOLDER/report.json

Every attempt is a fork of this process, which has imported everything and started nothing: what is tested is the
training, not Python's start.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import training_toy_config

from helios_jax.training.config import run_config
from helios_jax.training.loop import train

STEPS, CHECKPOINT_EVERY = 120, 3


def losses(workdir: Path) -> dict[int, float]:
    path, found = workdir / "metrics.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # the line that was being written
            continue
        found[row["step"]] = row["loss"]
    return found


def saving(workdir: Path) -> bool:
    """Whether a checkpoint is unfinished: Orbax writes it under a temporary name."""
    folder = workdir / "checkpoints"
    return folder.is_dir() and any("tmp" in name for name in os.listdir(folder))


def start(workdir: Path) -> int:
    """A process that trains until the end; its number."""
    child = os.fork()
    if child:
        return child
    try:
        config = training_toy_config.get_config()
        config.update({"num_steps": STEPS, "checkpoint_every": CHECKPOINT_EVERY})
        config.objective.step_sleep = 0.04
        train(run_config(config), workdir, print_line=lambda line: None)
        os._exit(0)
    finally:  # an error
        os._exit(1)


def finish(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def newest_checkpoint(workdir: Path) -> int:
    folder = workdir / "checkpoints"
    return max((int(name) for name in os.listdir(folder) if name.isdigit()), default=0) if folder.is_dir() else 0


def has_reached(workdir: Path, step: int, since: float) -> bool:
    """Whether the attempt that began at ``since`` has: it first removes the lines that it will write again."""
    path = workdir / "metrics.jsonl"
    return path.exists() and path.stat().st_mtime > since and max(losses(workdir), default=0) >= step


def has_saved(workdir: Path, since: int) -> bool:
    return newest_checkpoint(workdir) > since


def wait(child: int, happens: Callable[..., bool], *arguments) -> None:
    while not happens(*arguments):
        if os.waitpid(child, os.WNOHANG)[0]:
            raise SystemExit("the run ended before it was killed")
        time.sleep(0.0005)


def main(folder: Path, kills: int) -> None:
    if finish(start(folder / "whole")):
        raise SystemExit("the uninterrupted run failed")
    expected, killed = losses(folder / "whole"), folder / "killed"
    rng, report = random.Random(0), {"kills": 0, "inside_a_save": 0, "steps": []}
    for number in range(kills):
        saved, begun = newest_checkpoint(killed), time.time()
        child = start(killed)
        if number % 2:  # anywhere in a save
            wait(child, has_reached, killed, saved + rng.randint(0, 4), begun)
            wait(child, saving, killed)
            time.sleep(rng.uniform(0, 0.02))
        else:  # anywhere after a save
            wait(child, has_saved, killed, saved)
            time.sleep(rng.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        if finish(child) != -signal.SIGKILL:
            raise SystemExit("the run ended before it was killed")
        found = losses(killed)
        if any(expected[step] != loss for step, loss in found.items()):
            raise SystemExit(f"other losses after kill {number}")
        report["kills"] += 1
        report["inside_a_save"] += saving(killed)
        report["steps"].append(max(found, default=0))
    if finish(start(killed)):
        raise SystemExit("the last attempt failed")
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
