"""Trains, samples, validates and exports a LoRA model; see test_lora_mesh.py.

    python lora_mesh_worker.py FOLDER CASE                      on eight CPU devices of one process
    python lora_mesh_worker.py FOLDER CASE ADDRESS NUMBER ID    on two devices of each of NUMBER processes
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

alone = len(sys.argv) == 3
# Quick compilation: the steps are few.
os.environ["XLA_FLAGS"] = (f"--xla_force_host_platform_device_count={8 if alone else 2} "
                           "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

from helios_jax import distributed  # noqa: E402
from helios_jax.training.config import run_config  # noqa: E402
from tests.tiny_training import train_keeping_frames  # noqa: E402

MESHES = {"one": {}, "mesh": {"data": 2, "fsdp": 2, "tensor": 2}, "two": {"fsdp": 2, "tensor": 2}}


def run_of(folder: Path, case: str):
    return run_config({
        "objective": {
            "name": "stage1", "data": str(folder / "latents"), "model": str(folder / "model"),
            "init_from": str(folder / "model"), "export_dtype": "float32",
            "transformer": {"num_attention_heads": 2, "attention_head_dim": 16, "rope_dim": (4, 6, 6), "text_dim": 24,
                            "freq_dim": 32, "ffn_dim": 48, "num_layers": 2},
            "lora": {"rank": 4, "alpha": 8.0, "full": ("patch_short",), "base_dtype": "float32"},
            "sample": {"prompts": ("a red circle",), "num_frames": 33, "steps": 1, "guidance": 2.0},
            "validation": {"items": 8, "batch_size": 4},
        },
        "batch_size": 4, "num_steps": 2, "log_every": 1, "checkpoint_every": 10, "sample_every": 2,
        "tensorboard": False,
        "optimizer": {"learning_rate": 0.01, "schedule": "constant"}, "mesh": MESHES[case],
    })


def main(folder: Path, case: str, *others: str) -> None:
    if others:
        distributed.initialise(others[0], int(others[1]), int(others[2]))

    train_keeping_frames(run_of(folder, case), folder / case)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
