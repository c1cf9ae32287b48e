"""Trains student, critic and heads of a small model in a process of its own; see test_training_stage3_dmd_runs.py.

    python dmd_worker.py FOLDER CASE...   writes FOLDER/<case>/metrics.jsonl; the case "killed" ends by SIGKILL

"whole", "killed" and "resumed" are one run on one device, in which not everybody plays in every step; "one" and the
meshes are another, in which everything takes part from the first step on.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax  # noqa: E402
import numpy as np  # noqa: E402

from helios_jax import sharding  # noqa: E402
from helios_jax.config import ModelIndex, SchedulerConfig, TransformerConfig  # noqa: E402
from helios_jax.convert.export import export_pipeline  # noqa: E402
from helios_jax.convert.rules import abstract_params  # noqa: E402
from helios_jax.data.random_latents import write_random_latents  # noqa: E402
from helios_jax.training.config import run_config  # noqa: E402
from helios_jax.training.loop import train  # noqa: E402

TRANSFORMER = {"num_attention_heads": 4, "attention_head_dim": 8, "rope_dim": (4, 2, 2), "in_channels": 4,
               "out_channels": 4, "text_dim": 6, "freq_dim": 8, "ffn_dim": 32, "num_layers": 1}
LORA = {"rank": 4, "targets": ("to_q", "to_v", "patch_short"), "base_dtype": "float32"}
sharding.SMALL_PARAMETER = 64  # so that heads and adapters of this size are divided, too
MESHES = {"mixed": {"data": 2, "fsdp": 2, "tensor": 2}, "context": {"fsdp": 2, "context": 2, "tensor": 2}}


def prepare(folder: Path) -> None:
    """Random latents, and random models for student and teacher."""
    write_random_latents(folder / "latents", clips=12, sections=3, height=8, width=8, channels=4, text_rows=5,
                         text_dim=6)
    config = TransformerConfig(**TRANSFORMER)
    for seed, name in enumerate(("student", "teacher")):
        rng = np.random.default_rng(seed)
        params = jax.tree.map(lambda leaf: (0.2 * rng.standard_normal(leaf.shape)).astype(np.float32),  # noqa: B023
                              abstract_params("transformer", config))
        export_pipeline(folder / name, {"transformer": params}, {"transformer": config}, index=ModelIndex(),
                        scheduler=SchedulerConfig())


def values_of(folder: Path, case: str) -> dict:
    """The run. In turns: the student plays in every second step, the adversarial part begins at step 2, and the
    student's third turn, in step 4, is the first in which the average is more than a copy."""
    in_turns = case in ("whole", "killed", "resumed")
    optimizer = {"name": "adamw", "learning_rate": 3e-3, "schedule": "constant", "b1": 0.0}
    return {
        "objective": {
            "name": "stage3_dmd", "data": str(folder / "latents"), "transformer": TRANSFORMER,
            "init_from": str(folder / "student"), "teacher": str(folder / "teacher"), "lora": LORA,
            "critic": {"lora": LORA, "optimizer": optimizer | {"learning_rate": 1e-3}},
            "student_every": 2 if in_turns else 1,
            "rollout": {"steps": (1, 2)}, "stage_range": (0.0, 0.5, 1.0), "renoise": {"decay_steps": 3},
            "corruption": {"saturation": True},
            "gan": {"width": 8, "groups": 1, "blocks": (0,), "start_step": 2 if in_turns else 0, "crop": 1},
        },
        "batch_size": 8, "num_steps": 9 if in_turns else 5, "log_every": 1, "checkpoint_every": 2, "seed": 3,
        "ema_decay": 0.9, "ema_start_step": 1, "tensorboard": False, "optimizer": optimizer,
        "mesh": MESHES.get(case, {}),
    }


def report(line: str) -> None:
    print(line, flush=True)


def main(folder: Path, cases: list[str]) -> None:
    if not (folder / "latents").exists():
        prepare(folder)
    for case in cases:
        def watch(line: str, case: str = case) -> None:
            report(line)
            if case == "killed" and line.startswith("step 8/"):
                os.kill(os.getpid(), signal.SIGKILL)

        name = "killed" if case == "resumed" else case
        train(run_config(values_of(folder, case)), folder / name, print_line=watch)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
