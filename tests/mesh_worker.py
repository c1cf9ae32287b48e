"""Trains one small model in several layouts on eight CPU devices, in a process of its own; see test_sharding.py.

    python mesh_worker.py FOLDER CASE...   writes FOLDER/<case>/metrics.jsonl and FOLDER/shards.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

# Quick compilation: the steps are few.
os.environ["XLA_FLAGS"] = ("--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
                           "--xla_llvm_disable_expensive_passes=true")

import jax  # noqa: E402
import mesh_config  # noqa: E402

from helios_jax.training.config import run_config  # noqa: E402
from helios_jax.training.loop import train  # noqa: E402
from helios_jax.training.program import Program  # noqa: E402

ADAMW = {"name": "adamw", "learning_rate": 3e-3, "schedule": "constant"}
ODE = {"name": "stage3_ode", "sections": 2, "weight": 1.0}  # of records of another kind, in a folder of their own
CASES = {
    "one": {"num_steps": 7},
    "data": {"mesh": {"data": 8}},
    "one_muon": {"optimizer": {**ADAMW, "name": "muon"}},
    "fsdp_muon": {"mesh": {"fsdp": -1}, "optimizer": {**ADAMW, "name": "muon"}},
    "mixed": {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}},
    "context": {"mesh": {"fsdp": 2, "context": 2, "tensor": 2}},
    "ode": {"objective": ODE},
    "ode_mixed": {"objective": ODE, "mesh": {"data": 2, "fsdp": 2, "tensor": 2}},
    "ode_context": {"objective": ODE, "mesh": {"fsdp": 2, "context": 2, "tensor": 2}},
    "parts": {"mesh": {"fsdp": 2}, "accumulate": 2, "remat": "nothing_saveable"},
}


def run_of(folder: Path, remat: str | None = None, **changes):
    config = mesh_config.get_config()
    config.optimizer = {**ADAMW, **changes.pop("optimizer", {})}
    config.update(changes)
    config.objective.data = str(folder / "latents")
    config.objective.remat = remat
    return run_config(config)


def main(folder: Path, cases: list[str]) -> None:
    def report(line: str) -> None:
        print(line, flush=True)

    for name in cases:
        train(run_of(folder, **CASES[name]), folder / name, print_line=report)
    if "ode" in cases:
        return
    if "context" in cases:  # the same run goes on from its checkpoint on another mesh
        train(run_of(folder, mesh=CASES["mixed"]["mesh"], num_steps=7), folder / "context", print_line=report)

    state = Program.build(run_of(folder, mesh=CASES["mixed"]["mesh"],
                                 optimizer=CASES["one_muon"]["optimizer"])).abstract_state
    shards = {jax.tree_util.keystr(path): [list(leaf.shape), list(leaf.sharding.shard_shape(leaf.shape))]
              for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    (folder / "shards.json").write_text(json.dumps(shards))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
