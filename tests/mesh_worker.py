"""Trains one small model in several layouts on eight CPU devices, in a process of its own; see test_sharding.py.

    python mesh_worker.py FOLDER CASE...   writes FOLDER/<case>/metrics.jsonl and FOLDER/shards.json

A case is one of CASES, or KIND:MESH, a kind of training (KINDS) with the mesh of a case.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax  # noqa: E402
import mesh_config  # noqa: E402
import numpy as np  # noqa: E402

from helios_jax.config import ModelIndex, TransformerConfig  # noqa: E402
from helios_jax.convert.export import export_pipeline  # noqa: E402
from helios_jax.convert.rules import abstract_params  # noqa: E402
from helios_jax.training.config import from_mapping, run_config  # noqa: E402
from helios_jax.training.loop import train  # noqa: E402
from helios_jax.training.program import Program  # noqa: E402
from helios_jax.training.validation import BASE_SCHEDULER  # noqa: E402

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
    "fsdp": {"mesh": {"fsdp": -1}},
}
LORA = {"rank": 4, "full": ("patch_short",), "base_dtype": "float32"}
KINDS = {"stage1": {}, "stage1_lora": {"lora": LORA}, "stage2": {"name": "stage2"},
         "stage2_lora": {"name": "stage2", "lora": LORA}}


def write_base(folder: Path) -> None:
    """A transformer with nothing zero, for the adapters."""
    transformer = from_mapping(TransformerConfig, mesh_config.get_config().objective.transformer.to_dict())
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: (0.2 * rng.standard_normal(leaf.shape)).astype(np.float32),
                          abstract_params("transformer", transformer))
    export_pipeline(folder, {"transformer": params}, {"transformer": transformer}, index=ModelIndex(),
                    scheduler=BASE_SCHEDULER)


def run_of(folder: Path, remat: str | None = None, kind: str = "stage1", **changes):
    config = mesh_config.get_config()
    config.objective.update(KINDS[kind])
    if "lora" in KINDS[kind]:
        config.objective.init_from = str(folder / "base")
    config.optimizer = {**ADAMW, **changes.pop("optimizer", {})}
    config.update(changes)
    config.objective.data = str(folder / "latents")
    config.objective.remat = remat
    return run_config(config)


def main(folder: Path, cases: list[str]) -> None:
    def report(line: str) -> None:
        print(line, flush=True)

    if any("lora" in name for name in cases):
        write_base(folder / "base")
    for name in cases:
        kind, _, case = name.rpartition(":")
        train(run_of(folder, kind=kind or "stage1", **CASES[case]), folder / name.replace(":", "-"), print_line=report)
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
