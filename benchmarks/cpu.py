"""Sampling on a CPU against diffusers: same weights, same work, same dtype and threads, in one process, interleaved.

    python benchmarks/cpu.py --model assets/helios-tiny --size 64x128      # the model in the box
    python benchmarks/cpu.py --model mid --size 192x320                    # about 300 M random parameters

Prints a table part by part and whole, with compile times beside it, and writes JSON with the machine's description.
Needs PyTorch (tests/requirements-oracle.txt). Every figure is a median over interleaved runs after a warm-up.

The original's block noise cannot be drawn on a CPU (its covariance is singular in float32); both sides get the
factor computed in float64.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

# Run as a script, Python looks for modules beside this file only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PROMPT = "a red circle moving right on a dark background"


def median_pair(ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """(seconds of ours, of theirs, first call of ours): medians of interleaved runs after one warm-up each."""
    start = time.perf_counter()
    ours()
    first = time.perf_counter() - start
    theirs()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for run, log in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            run()
            log.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1]), first


def write_models(model: str, size: tuple[int, int], folder: Path) -> tuple[Path, Path]:
    """Base and distilled checkpoints with the same transformer, in the published layout."""
    import jax

    from helios_jax.config import ModelIndex, SchedulerConfig, TransformerConfig, VAEConfig
    from helios_jax.convert.export import export_pipeline
    from helios_jax.convert.load import load_pipeline_params
    from helios_jax.models.partition import unbox
    from helios_jax.models.transformer import HeliosTransformer

    box = Path(__file__).resolve().parents[1] / "assets" / "helios-tiny"
    source, params = load_pipeline_params(box if model == "mid" else model)
    configs = {name: source.config(name) for name in ("transformer", "vae", "text_encoder")}
    if model == "mid":
        transformer = TransformerConfig(num_attention_heads=16, attention_head_dim=64, rope_dim=(24, 20, 20),
                                        text_dim=configs["text_encoder"].d_model, ffn_dim=4096, num_layers=18)
        fresh = unbox(HeliosTransformer(transformer).init(jax.random.key(0)))
        # The original starts its output at zero; a random one keeps the numbers alive.
        kernel = fresh["proj_out"]["kernel"]
        fresh["proj_out"]["kernel"] = jax.random.normal(jax.random.key(1), kernel.shape) * kernel.shape[0] ** -0.5
        configs["transformer"], params["transformer"] = transformer, fresh
        configs["vae"] = VAEConfig(base_dim=32)
        from helios_jax.models.vae import WanVAE

        video = np.zeros((1, 5, 32, 32, 3), np.float32)
        params["vae"] = unbox(WanVAE(configs["vae"]).init(jax.random.key(2), video)["params"])
    schedulers = {
        "base": (ModelIndex(native_size=size), SchedulerConfig(stages=1, use_dynamic_shifting=True)),
        "distilled": (ModelIndex("HeliosPyramidPipeline", "HeliosDMDScheduler", is_distilled=True, native_size=size),
                      SchedulerConfig("HeliosDMDScheduler", use_dynamic_shifting=True)),
    }
    for name, (index, scheduler) in schedulers.items():
        export_pipeline(folder / name, params, configs, index=index, scheduler=scheduler, tokenizer=source.tokenizer,
                        dtype=np.float32)
    return folder / "base", folder / "distilled"


def torch_pipelines(base: Path, distilled: Path):
    """diffusers' pipelines, with the block noise factorised in float64."""
    import diffusers
    import torch

    one = diffusers.HeliosPipeline.from_pretrained(base, torch_dtype=torch.float32)
    few = diffusers.HeliosPyramidPipeline.from_pretrained(distilled, torch_dtype=torch.float32)
    few.sample_block_noise = exact_block_noise
    for pipe in (one, few):
        pipe.set_progress_bar_config(disable=True)
    return one, few


def exact_block_noise(batch, channels, frames, height, width, patch_size=(1, 2, 2), device=None, generator=None):
    """diffusers' ``sample_block_noise`` with the covariance factorised in float64."""
    import torch

    covariance = torch.eye(4, dtype=torch.float64) * (4 / 3) - 1 / 3 + 1e-8 * torch.eye(4, dtype=torch.float64)
    factor = torch.linalg.cholesky(covariance).float()
    z = torch.randn(batch * channels * frames * (height // 2) * (width // 2), 4, generator=generator)
    noise = (z @ factor.T).view(batch, channels, frames, height // 2, width // 2, 2, 2)
    return noise.permute(0, 1, 2, 3, 5, 4, 6).reshape(batch, channels, frames, height, width)


def measure(arguments: argparse.Namespace, folder: Path) -> list[dict]:
    import jax
    import jax.numpy as jnp
    import torch

    from helios_jax.diffusion.noise import SeededNoise
    from helios_jax.models.inputs import FrameIndices
    from helios_jax.pipeline.pipeline import HeliosPipeline

    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    height, width = (int(n) for n in arguments.size.split("x"))
    base, distilled = write_models(arguments.model, (height, width), folder)
    their_base, their_few = torch_pipelines(base, distilled)
    our_base, our_few = HeliosPipeline.from_pretrained(base), HeliosPipeline.from_pretrained(distilled)
    count = sum(x.size for x in jax.tree.leaves(our_base.params["transformer"]))
    print(f"transformer: {count / 1e6:.1f} M parameters, {height}x{width}, {arguments.threads} threads, float32")
    rows = []

    def add(part: str, ours, theirs, repeats=arguments.repeats):
        mine, other, first = median_pair(ours, theirs, repeats)
        rows.append({"part": part, "ours_s": mine, "diffusers_s": other, "speedup": other / mine,
                     "first_call_s": first})
        print(f"{part:<42} {mine:9.3f} s {other:9.3f} s {other / mine:7.2f}x   first call {first:6.1f} s", flush=True)

    print(f"{'part':<42} {'ours':>11} {'diffusers':>11} {'speed-up':>8}")
    # Text: our cache of prompts would make the comparison meaningless.
    encoder = our_base._prompt_encoder
    encoder._cache_size = our_few._prompt_encoder._cache_size = 0
    add("text encoder, one prompt", lambda: jax.block_until_ready(encoder((PROMPT,)).rows),
        lambda: their_base.encode_prompt(PROMPT, do_classifier_free_guidance=False, max_sequence_length=512))

    video = np.random.default_rng(0).uniform(-1, 1, (1, 33, height, width, 3)).astype(np.float32)
    eps = jnp.zeros((1, 9, height // 8, width // 8, 16))
    on_device, torch_video = jnp.asarray(video), torch.from_numpy(np.moveaxis(video, -1, 1))
    add("VAE encode, 33 frames",
        lambda: jax.block_until_ready(our_base._encode(our_base.params["vae"], on_device, eps)),
        lambda: their_base.vae.encode(torch_video))
    z = np.random.default_rng(1).normal(size=(1, 9, height // 8, width // 8, 16)).astype(np.float32)
    z_device, z_torch = jnp.asarray(z), torch.from_numpy(np.moveaxis(z, -1, 1))
    add("VAE decode, 9 latent frames", lambda: jax.block_until_ready(our_base.decode(z_device)),
        lambda: their_base.vae.decode(z_torch))

    # The transformer, as the samplers run it: history tokens and text keys are made outside the step.
    model, variables, line = our_base.transformer, our_base.variables, FrameIndices.for_history()
    text = our_base.context(our_base.embed((PROMPT,)))
    padded, _ = their_base.encode_prompt(PROMPT, do_classifier_free_guidance=False, max_sequence_length=512)
    full = (height // 8, width // 8)
    source = SeededNoise((0,))
    tiers = our_base_history(source, full)
    tokens = jax.jit(model.embed_history)(variables, tiers)
    forward = jax.jit(lambda v, x, t, c, h: model.apply(v, x, t, c, h, history_size=full))
    torch_inputs = {"encoder_hidden_states": padded}
    for name, part, frames in (("short", tiers.short, line.short), ("mid", tiers.mid, line.mid),
                               ("long", tiers.long, line.long)):
        torch_inputs[f"latents_history_{name}"] = torch.from_numpy(np.moveaxis(np.array(part), -1, 1))
        torch_inputs[f"indices_latents_history_{name}"] = torch.tensor([frames])
    for factor in (4, 2, 1):
        h, w = full[0] // factor, full[1] // factor
        x = np.random.default_rng(2).normal(size=(1, 9, h, w, 16)).astype(np.float32)
        x_device, x_torch = jnp.asarray(x), torch.from_numpy(np.moveaxis(x, -1, 1))
        time_device, time_torch = jnp.array([500.0]), torch.tensor([500.0])
        tokens_count = 9 * h * w // 4 + tokens.shape[1]
        add(f"transformer forward, {tokens_count} tokens",
            lambda x=x_device, t=time_device: jax.block_until_ready(forward(variables, x, t, text, tokens)),
            lambda x=x_torch, t=time_torch: their_base.transformer(
                hidden_states=x, timestep=t, indices_hidden_states=torch.tensor([line.current]), return_dict=False,
                **torch_inputs))

    size = {"height": height, "width": width}
    frames = 33 * arguments.chunks
    repeats = max(1, arguments.repeats // 2)
    add(f"whole call, Base {arguments.base_steps} steps, guidance 5, {frames} frames",
        lambda: our_base(PROMPT, num_frames=frames, steps=arguments.base_steps, **size),
        lambda: their_base(PROMPT, num_frames=frames, num_inference_steps=arguments.base_steps, guidance_scale=5.0,
                           generator=torch.Generator().manual_seed(0), **size), repeats)
    for steps in (1, 2):
        add(f"whole call, Distilled [{steps},{steps},{steps}], {frames} frames",
            lambda steps=steps: our_few(PROMPT, num_frames=frames, steps=steps, amplify_first_chunk=False, **size),
            lambda steps=steps: their_few(
                PROMPT, num_frames=frames, pyramid_num_inference_steps_list=[steps] * 3, guidance_scale=1.0,
                is_amplify_first_chunk=False, generator=torch.Generator().manual_seed(0), **size), repeats)
    return rows


def our_base_history(source, full: tuple[int, int]):
    from helios_jax.models.inputs import History

    def draw(index: int, frames: int):
        return source.normal("chunk", (index,), (1, frames, *full, 16))

    return History(short=draw(0, 2), mid=draw(1, 2), long=draw(2, 16))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="assets/helios-tiny", help="folder, or 'mid' for about 300 M random parameters")
    p.add_argument("--size", default="64x128", metavar="HxW")
    p.add_argument("--chunks", type=int, default=2)
    p.add_argument("--base_steps", type=int, default=50)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--json", metavar="FILE", help="where to write the numbers")
    arguments = p.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    folder = Path(tempfile.mkdtemp())
    try:
        rows = measure(arguments, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if arguments.json:
        import diffusers
        import jax
        import torch

        from benchmarks.machine import processor_name

        machine = {"processor": processor_name(), "threads": arguments.threads, "python": platform.python_version(),
                   "jax": jax.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
        report = {"machine": machine, "arguments": vars(arguments), "rows": rows}
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
