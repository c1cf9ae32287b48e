"""Looks at a LoRA model and exports it, on one device and on a mesh; see test_lora_mesh.py.

    python lora_mesh_worker.py FOLDER CASE...                 cases on eight CPU devices of one process
    python lora_mesh_worker.py FOLDER two ADDRESS NUMBER ID   on two devices of each of NUMBER processes
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

several = sys.argv[2] == "two"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={2 if several else 8}"

import jax  # noqa: E402
import numpy as np  # noqa: E402

from helios_jax import distributed, sharding  # noqa: E402
from helios_jax.training import loop  # noqa: E402
from helios_jax.training.config import run_config  # noqa: E402
from helios_jax.training.program import Program  # noqa: E402

MESHES = {"one": {}, "mesh": {"data": 2, "fsdp": 2, "tensor": 2}, "two": {"fsdp": 2, "tensor": 2}}


def run_of(folder: Path, case: str):
    return run_config({
        "objective": {
            "name": "stage1", "data": str(folder / "latents"), "model": str(folder / "model"),
            "init_from": str(folder / "model"), "export_dtype": "float32",
            "transformer": {"num_attention_heads": 2, "attention_head_dim": 16, "rope_dim": (4, 6, 6), "text_dim": 24,
                            "freq_dim": 32, "ffn_dim": 48, "num_layers": 2},
            "lora": {"rank": 4, "alpha": 8.0, "targets": ("to_q", "to_v"), "full": ("patch_short",),
                     "base_dtype": "float32"},
            "sample": {"prompts": ("a red circle",), "num_frames": 33, "steps": 1, "guidance": 2.0},
            "validation": {"items": 4, "batch_size": 4},
        },
        "batch_size": 4, "mesh": MESHES[case],
    })


class Recorder:
    """Keeps what a run would write."""

    def __init__(self, folder: Path):
        self.folder = folder

    def scalars(self, step, values) -> None:
        (self.folder / "numbers.json").write_text(json.dumps(values))

    def video(self, step, name, frames, fps) -> None:
        np.save(self.folder / "frames.npy", frames)


def look(folder: Path, case: str) -> None:
    """Parameters of which nothing is zero, looked at by the loop's own function and exported."""
    program = Program.build(run_of(folder, case))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: (0.1 * rng.standard_normal(leaf.shape)).astype(np.float32),
                          program.abstract_state.params)
    params = sharding.place(params, program.state_shardings.params)
    program.load_frozen()
    out = folder / case
    out.mkdir(exist_ok=True)
    loop._evaluate(program, params, 1, Recorder(out) if jax.process_index() == 0 else None)
    program.objective.export(params, str(out / "export"))
    distributed.wait_for_all("exported")


def main(folder: Path, *arguments: str) -> None:
    if several:
        distributed.initialise(arguments[1], int(arguments[2]), int(arguments[3]))
        arguments = arguments[:1]
    for case in arguments:
        look(folder, case)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
