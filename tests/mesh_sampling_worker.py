"""Samples on one device and on meshes of eight CPU devices, in a process of its own; see test_sampling_mesh.py.

    python mesh_sampling_worker.py FOLDER VARIANT   writes FOLDER/<variant>.json: largest differences by mesh
    python mesh_sampling_worker.py FOLDER vae       the same of the VAE in the box alone
    python mesh_sampling_worker.py FOLDER paths     latents of the models in the box; see test_fast_paths.py
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax  # noqa: E402
import numpy as np  # noqa: E402

from helios_jax import sharding  # noqa: E402
from helios_jax.errors import UserError  # noqa: E402
from helios_jax.models.vae import WanVAE  # noqa: E402
from helios_jax.pipeline.pipeline import HeliosPipeline  # noqa: E402
from helios_jax.sharding import MeshConfig, Partition  # noqa: E402
from tests import fast_paths, tiny_checkpoint  # noqa: E402

MESHES = {
    "base": (MeshConfig(context=2, tensor=2), MeshConfig(data=2, fsdp=2, tensor=2)),
    "mid": (MeshConfig(fsdp=2, context=2, tensor=-1),),
}


def latents(folder: Path, steps: int, mesh: MeshConfig | None) -> np.ndarray:
    pipeline = HeliosPipeline.from_pretrained(folder, mesh=mesh, unroll=1)
    chunks = pipeline.stream("a red circle", num_frames=66, steps=steps, guidance_scale=3.0, seed=5, height=64,
                             width=64)
    return np.stack([np.asarray(chunk.latents) for chunk in chunks])


def vae_in_stripes(root: Path) -> None:
    """Encodes a video and decodes the result; the VAE in the box, because a random one magnifies rounding."""
    pipeline = HeliosPipeline.from_pretrained("assets/helios-tiny")
    params = pipeline.params["vae"]
    pixels = np.random.default_rng(0).uniform(-1, 1, (1, 9, 64, 64, 3)).astype(np.float32)

    def program(partition: Partition | None, method):
        return sharding.jit(partition, lambda p, x: pipeline.vae.apply({"params": p}, x, method=method))

    mean = np.asarray(program(None, WanVAE.encode)(params, pixels)[0])
    frames = np.asarray(program(None, WanVAE.decode)(params, mean))
    found = []
    for config in (MeshConfig(context=2, tensor=2), MeshConfig(fsdp=2, context=4)):
        partition = Partition.create(config)
        encode, decode = program(partition, WanVAE.encode), program(partition, WanVAE.decode)
        placed = jax.device_put(params, partition.replicated)
        found.append({
            "encode": float(np.abs(np.asarray(encode(placed, pixels)[0]) - mean).max() / np.ptp(mean)),
            "decode": float(np.abs(np.asarray(decode(placed, mean)) - frames).max() / np.ptp(frames)),
            "exchanges": decode.lower(placed, mean).compile().as_text().count("collective-permute("),
        })
    (root / "vae.json").write_text(json.dumps(found))


def paths(root: Path) -> None:
    found = {}
    for run, mesh, dtype in fast_paths.SHARDED:
        pipeline = fast_paths.load(fast_paths.RUNS[run], dtype, mesh=fast_paths.MESHES[mesh], unroll=1)
        found[f"{run} {mesh} {dtype}"] = fast_paths.latents_of(pipeline, fast_paths.RUNS[run]).tolist()
    (root / "paths.json").write_text(json.dumps(found))


def main(root: Path, variant: str) -> None:
    if variant in ("vae", "paths"):
        return (vae_in_stripes if variant == "vae" else paths)(root)
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
