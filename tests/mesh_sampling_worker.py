"""Samples on one device and on meshes of eight CPU devices, in a process of its own; see test_sampling_mesh.py.

    python mesh_sampling_worker.py FOLDER VARIANT   writes FOLDER/<variant>.json: largest differences by mesh
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

# Quick compilation: the steps are few.
os.environ["XLA_FLAGS"] = ("--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
                           "--xla_llvm_disable_expensive_passes=true")

import numpy as np  # noqa: E402

from helios_jax.errors import UserError  # noqa: E402
from helios_jax.pipeline.pipeline import HeliosPipeline  # noqa: E402
from helios_jax.sharding import MeshConfig  # noqa: E402
from tests import tiny_checkpoint  # noqa: E402

MESHES = {
    "base": (MeshConfig(context=2, tensor=2), MeshConfig(data=2, fsdp=2, tensor=2)),
    "mid": (MeshConfig(fsdp=2, context=2, tensor=-1),),
}


def latents(folder: Path, steps: int, mesh: MeshConfig | None) -> np.ndarray:
    pipeline = HeliosPipeline.from_pretrained(folder, mesh=mesh, unroll=1)
    chunks = pipeline.stream("a red circle", num_frames=66, steps=steps, guidance_scale=3.0, seed=5, height=64,
                             width=64)
    return np.stack([np.asarray(chunk.latents) for chunk in chunks])


def main(root: Path, variant: str) -> None:
    # Four heads, so that they divide over context and tensor.
    tiny_checkpoint.CONFIGS["transformer"] = dataclasses.replace(tiny_checkpoint.CONFIGS["transformer"],
                                                                 num_attention_heads=4)
    folder = tiny_checkpoint.write_tiny_checkpoint(root / variant, variant)
    steps = 2 if variant == "base" else 1
    one = latents(folder, steps, None)
    found = {"range": float(np.ptp(one)), "differences": [
        float(np.abs(latents(folder, steps, mesh) - one).max()) for mesh in MESHES[variant]]}
    try:
        HeliosPipeline.from_pretrained(folder, mesh=MeshConfig(tensor=8))
    except UserError as error:
        found["refused"] = str(error)
    (root / f"{variant}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
