"""Sampling as a user sees it, on the device at hand: both schedules end to end, and where the time goes.

    python benchmarks/sampling.py                                              # 14B, random weights made on the device
    python benchmarks/sampling.py --layers 2 --heads 2 --size 64x64            # the same at any size, for a CPU
    python benchmarks/sampling.py --model assets/helios-tiny --size 64x128     # a checkpoint (its Distilled form)

For each dtype and precision (docs/low_precision.md), and for the schedules [1,1,1] and [2,2,2] with an amplified first
chunk: seconds of the first chunk cold (with compilation) and warm, frames per second of the stream (frames on the host
as bytes), the parts measured alone (text, transformer, VAE, copy of the frames), operations of a chunk, the rate
reached and the time that the device's peak would allow, memory of device and host. Where PyTorch is installed,
diffusers makes the same video with the same sizes, eager and with torch.compile. JSON holds all of it and the machine;
--plot draws it (needs matplotlib).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Run as a script, Python looks for modules beside this file only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PROMPT = "a red circle moving right on a dark background"
SCHEDULES = {"[1,1,1]": {"steps": (1, 1, 1), "amplify_first_chunk": False},
             "[2,2,2] amplified": {"steps": (2, 2, 2), "amplify_first_chunk": True}}
FRAMES = 33  # of a chunk
TEXT_ROWS = 64  # of the random prompt
KEPT_IN_FLOAT32 = ("time_embedder", "scale_shift_table", "norm2", "history_key_scale")


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


# -- models -----------------------------------------------------------------------------------------------------------


def random_folder(heads: int, layers: int, size: tuple[int, int]):
    """Configurations of the 14B model, narrower and shallower where asked; no files."""
    from helios_jax.config import ModelIndex, SchedulerConfig, TextEncoderConfig, TransformerConfig, VAEConfig
    from helios_jax.convert.folder import ModelFolder

    text, transformer, vae = TextEncoderConfig(), TransformerConfig(num_layers=layers), VAEConfig()
    if heads != transformer.num_attention_heads:
        transformer = dataclasses.replace(transformer, num_attention_heads=heads, text_dim=64 * heads,
                                          ffn_dim=transformer.ffn_dim * heads // 40)
        text = TextEncoderConfig(vocab_size=256, d_model=64 * heads, d_ff=160 * heads, num_heads=heads,
                                 num_layers=min(layers, text.num_layers))
        vae = dataclasses.replace(vae, base_dim=max(4, vae.base_dim * heads // 40))
    return ModelFolder(Path(), "diffusers", ModelIndex("HeliosPyramidPipeline", "HeliosDMDScheduler", is_distilled=True,
                                                       native_size=size),
                       transformer, vae, text, SchedulerConfig("HeliosDMDScheduler", use_dynamic_shifting=True))


def random_params(folder: Any, dtype: Any, precision: str) -> dict[str, Any]:
    """Seeded normals on the device, leaf by leaf, scaled by the number of inputs; norms at one, biases at zero."""
    import jax

    from helios_jax.convert.rules import abstract_params, flatten, unflatten
    from helios_jax.models.quantize import format_of, quantise

    constants = {"bias": 0.0, "weight": 1.0, "gamma": 1.0}

    def leaf(component: str, path: tuple[str, ...], like: Any, key: Any) -> Any:
        if path[-1] in constants:
            return jax.numpy.full(like.shape, constants[path[-1]], like.dtype)
        # A stack's first axis is its layers; a convolution of the VAE sees its whole window.
        inputs = math.prod(like.shape[:-1]) if component == "vae" else like.shape[-2]

        def normal(key: Any, shape: tuple[int, ...]) -> Any:
            return (inputs**-0.5 * jax.random.normal(key, shape)).astype(like.dtype)

        form = format_of(component, path, precision)
        if form is None:
            return jax.jit(normal, static_argnums=1)(key, like.shape)
        # A layer at a time, so that the plain stack is never there.
        return jax.jit(lambda keys: jax.lax.map(lambda key: quantise(normal(key, like.shape[1:]), form), keys))(
            jax.random.split(key, like.shape[0]))

    found = {}
    for i, name in enumerate(("transformer", "vae", "text_encoder")):
        leaves = list(flatten(abstract_params(name, folder.config(name), dtype)))
        keys = jax.random.split(jax.random.key(i), len(leaves))
        found[name] = unflatten([(path, jax.device_put(leaf(name, path, like, key), jax.local_devices()[0]))
                                 for (path, like), key in zip(leaves, keys, strict=True)])
    return found


# -- ours -------------------------------------------------------------------------------------------------------------


def build(folder: Any, dtype: str, precision: str) -> tuple[Any, Any]:
    """A pipeline and the prompt that it is given."""
    import jax
    import jax.numpy as jnp

    from helios_jax.pipeline.pipeline import DTYPES, HeliosPipeline
    from helios_jax.text import PromptEmbedding

    if isinstance(folder, Path):
        return HeliosPipeline.from_pretrained(folder, dtype=dtype, vae_dtype=dtype, precision=precision), PROMPT
    compute = DTYPES[dtype]
    pipe = HeliosPipeline(folder, random_params(folder, compute, precision), dtype=compute, vae_dtype=compute)
    rows = jax.random.normal(jax.random.key(9), (1, TEXT_ROWS, folder.transformer.text_dim), compute)
    return pipe, PromptEmbedding(jax.device_put(rows, jax.local_devices()[0]), jnp.full(1, TEXT_ROWS, jnp.int32))


def measure(pipe: Any, prompt: Any, schedule: dict[str, Any], size: tuple[int, int], chunks: int, repeats: int
            ) -> dict[str, Any]:
    """One schedule of one pipeline."""
    import jax

    from helios_jax.tools.roofline import peak_flops

    def stream():
        return pipe.stream(prompt, height=size[0], width=size[1], num_frames=FRAMES * chunks, frames_dtype="uint8",
                           lookahead=True, **schedule)

    row: dict[str, Any] = {"first_chunk_cold_s": seconds(lambda: next(stream()))}
    row["first_chunk_warm_s"] = seconds(lambda: next(stream()))
    run, times = stream(), []
    for _ in range(chunks):
        start = time.perf_counter()
        next(run)
        times.append(time.perf_counter() - start)
    # The first chunk has other steps, and with it the second one is begun; the last one is waited for alone.
    row["chunk_s"] = statistics.median(times[1:])
    row["video_s"], row["frames_per_second"] = sum(times), FRAMES / row["chunk_s"]
    row["parts_s"] = parts(pipe, prompt, stream(), repeats)
    row["flops"] = operations(pipe, run, schedule["steps"])
    row["flops_per_second"] = sum(row["flops"].values()) / row["chunk_s"]
    peak = peak_flops(jax.devices()[0].device_kind)
    row["floor_s"] = None if peak is None else sum(row["flops"].values()) / peak
    memory = jax.local_devices()[0].memory_stats() or {}
    row["device_peak_bytes"] = memory.get("peak_bytes_in_use")
    row["host_peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return row


def parts(pipe: Any, prompt: Any, stream: Any, repeats: int) -> dict[str, float]:
    """Median seconds of each part of a later chunk by itself, waited for."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from helios_jax.text import lower_encoder, pad_ids

    ids = pad_ids([(0,) * TEXT_ROWS], TEXT_ROWS)
    encoder = lower_encoder(pipe.text_encoder, pipe.params["text_encoder"], TEXT_ROWS).compile()
    embedding = pipe.embed(prompt if not isinstance(prompt, str) else (prompt,))
    history, anchor, _ = stream._condition
    text = stream._text(1)[0]
    made: dict[str, Any] = {}

    def text_part():
        jax.block_until_ready((encoder(pipe.params["text_encoder"], *map(jnp.asarray, ids)), pipe.context(embedding)))

    def transformer():
        drawn = stream._sampler.draw(stream._source, 1, 1)
        latents = stream._sampler.denoise(pipe.variables, drawn, 1, text, history, anchor)
        made["latents"] = jax.block_until_ready(latents)

    def vae():
        made["frames"] = jax.block_until_ready(pipe.decode_uint8(made["latents"]))[0]

    def copy():
        np.asarray(made["frames"])

    found = {}
    for name, part in (("text, once per prompt", text_part), ("transformer", transformer), ("vae", vae)):
        part()
        found[name] = statistics.median(seconds(part) for _ in range(repeats))
    vae()  # an array that was copied once is not copied again
    return found | {"copy of the frames": seconds(copy)}


def operations(pipe: Any, stream: Any, steps: tuple[int, ...]) -> dict[str, float]:
    """Operations of a later chunk: of the transformer by level, and of the VAE; matrix products and convolutions."""
    import jax
    import jax.numpy as jnp

    from helios_jax.tools.roofline import count_flops

    sampler, text = stream._sampler, stream._text(1)[0]
    found = {}
    for stage, count in enumerate(steps):
        inputs = [shape and jax.ShapeDtypeStruct(shape, jnp.float32) for shape in sampler.input_shapes(stage, 1)]
        found[f"level {stage}"] = count * count_flops(sampler.trace(stage, pipe.variables, text, inputs).jaxpr)
    latents = jax.ShapeDtypeStruct((1, sampler.plan.layout.chunk, *sampler.size, sampler.channels), jnp.float32)
    return found | {"vae": count_flops(jax.make_jaxpr(pipe._decode)(pipe.params["vae"], latents))}


# -- theirs -----------------------------------------------------------------------------------------------------------


def their_pipeline(folder: Any, device: str, dtype: str) -> Any:
    """diffusers' pipeline of a checkpoint, or with random weights of the same sizes."""
    import diffusers
    import torch

    from benchmarks.cpu import exact_block_noise
    from helios_jax.convert.export import config_json, scheduler_json

    kind = getattr(torch, dtype)
    if isinstance(folder, Path):
        pipe = diffusers.HeliosPyramidPipeline.from_pretrained(folder, torch_dtype=kind)
    else:
        torch.manual_seed(0)
        with torch.device(device):
            torch.set_default_dtype(kind)
            transformer = diffusers.HeliosTransformer3DModel.from_config(config_json("transformer", folder.transformer))
            vae = diffusers.AutoencoderKLWan.from_config(config_json("vae", folder.vae))
            torch.set_default_dtype(torch.float32)
        for name, parameter in transformer.named_parameters():
            if any(part in name for part in KEPT_IN_FLOAT32):
                parameter.data = parameter.data.float()
        scheduler = diffusers.HeliosDMDScheduler.from_config(scheduler_json(folder.scheduler))
        pipe = diffusers.HeliosPyramidPipeline(None, None, vae, scheduler, transformer, is_distilled=True)
    if device == "cpu":
        pipe.sample_block_noise = exact_block_noise  # the original's factor is singular there
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def measure_theirs(folder: Any, schedule: dict[str, Any], size: tuple[int, int], chunks: int, dtype: str,
                   compiled: bool) -> dict[str, Any]:
    """The same video by diffusers, frames on the host; cold includes torch.compile."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = their_pipeline(folder, device, dtype)
    if compiled:
        pipe.transformer = torch.compile(pipe.transformer)
        pipe.vae.decoder = torch.compile(pipe.vae.decoder)
    given = {"prompt": PROMPT}
    if not isinstance(folder, Path):
        rows = torch.randn(1, 512, folder.transformer.text_dim, device=device, dtype=getattr(torch, dtype))
        given = {"prompt_embeds": rows}

    def video(count: int) -> float:
        with torch.no_grad():
            return seconds(lambda: pipe(
                **given, height=size[0], width=size[1], num_frames=FRAMES * count, guidance_scale=1.0,
                pyramid_num_inference_steps_list=list(schedule["steps"]), output_type="np",
                is_amplify_first_chunk=schedule["amplify_first_chunk"], generator=torch.Generator().manual_seed(0)))

    row = {"first_chunk_cold_s": video(1), "video_cold_s": video(chunks)}
    row["first_chunk_warm_s"], row["video_s"] = video(1), video(chunks)
    row["chunk_s"] = (row["video_s"] - row["first_chunk_warm_s"]) / (chunks - 1)
    row["frames_per_second"] = FRAMES / row["chunk_s"]
    if device == "cuda":
        row["device_peak_bytes"] = torch.cuda.max_memory_allocated()
    return row


# -- report -----------------------------------------------------------------------------------------------------------


def describe_row(row: dict[str, Any]) -> str:
    line = (f"{row['side']:<24} {row['numbers']:<21} {row['schedule']:<18} {row['frames_per_second']:8.2f} frames/s   "
            f"first chunk {row['first_chunk_cold_s']:7.2f} s cold {row['first_chunk_warm_s']:7.2f} s warm")
    if "parts_s" in row:
        shares = "  ".join(f"{name} {value * 1e3:.1f} ms" for name, value in row["parts_s"].items())
        floor = "" if row["floor_s"] is None else f", {row['chunk_s'] / row['floor_s']:.2f} times the peak's time"
        line += (f"\n    {shares}\n    {sum(row['flops'].values()) / 1e12:.3f} TFLOP a chunk, "
                 f"{row['flops_per_second'] / 1e12:.3f} TFLOP/s{floor}; host "
                 f"{row['host_peak_bytes'] / 2**30:.2f} GiB at most")
        if row["device_peak_bytes"] is not None:
            line += f", device {row['device_peak_bytes'] / 2**30:.2f} GiB"
    return line


def plot(rows: list[dict[str, Any]], file: str) -> None:
    """Bars of frames per second."""
    import matplotlib.pyplot as plt

    labels = [f"{row['side']}\n{row['numbers']} {row['schedule']}" for row in rows]
    figure, axes = plt.subplots(figsize=(8, 1 + 0.5 * len(rows)), layout="constrained")
    bars = axes.barh(labels[::-1], [row["frames_per_second"] for row in rows][::-1])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set_xlabel("frames per second")
    figure.savefig(file)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", help="folder of a checkpoint; default: random weights of the 14B model's sizes")
    p.add_argument("--layers", type=int, default=40, help="of the random model")
    p.add_argument("--heads", type=int, default=40, help="of the random model; its widths follow")
    p.add_argument("--size", default="384x640", metavar="HxW")
    p.add_argument("--chunks", type=int, default=6, help="of each video, at least 3")
    p.add_argument("--repeats", type=int, default=5, help="of each part measured alone")
    p.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"),
                   help="default: float32 on a CPU, else bfloat16")
    p.add_argument("--precision", nargs="+", choices=("none", "fp8", "int8", "int8_weights", "int4_weights"),
                   default=["none"], help="of the linear layers")
    p.add_argument("--peer", nargs="*", choices=("eager", "compiled"), default=["eager", "compiled"],
                   help="how diffusers runs, where it is installed; nothing for not at all")
    p.add_argument("--json", metavar="FILE")
    p.add_argument("--plot", metavar="FILE", help="PNG, SVG or PDF")
    arguments = p.parse_args(argv)
    if arguments.chunks < 3:
        p.error(f"--chunks: at least 3, got {arguments.chunks}")
    # The card is PyTorch's, too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    from benchmarks.cpu import write_models
    from benchmarks.machine import describe

    size = tuple(int(n) for n in arguments.size.split("x"))
    dtypes = arguments.dtype or ["float32" if jax.default_backend() == "cpu" else "bfloat16"]
    rows: list[dict[str, Any]] = []

    def add(side: str, numbers: str, schedule: str, row: dict[str, Any]) -> None:
        rows.append({"side": side, "numbers": numbers, "schedule": schedule, **row})
        print(describe_row(rows[-1]), flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        if arguments.model:
            folder = write_models(arguments.model, size, Path(scratch))[1]
        else:
            folder = random_folder(arguments.heads, arguments.layers, size)
        for dtype in dtypes:
            for precision in arguments.precision:
                pipe, prompt = build(folder, dtype, precision)
                numbers = dtype if precision == "none" else f"{dtype} {precision}"
                for name, schedule in SCHEDULES.items():
                    add("helios_jax", numbers, name, measure(pipe, prompt, schedule, size, arguments.chunks,
                                                             arguments.repeats))
                del pipe, prompt  # its memory is needed
                jax.clear_caches()
            has_peer = all(importlib.util.find_spec(name) for name in ("torch", "diffusers"))
            for way in arguments.peer if has_peer else ():
                for name, schedule in SCHEDULES.items():
                    add(f"diffusers, {way}", dtype, name, measure_theirs(folder, schedule, size, arguments.chunks,
                                                                         dtype, way == "compiled"))
    report = {"machine": describe(), "arguments": vars(arguments), "rows": rows}
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")
    if arguments.plot:
        plot(rows, arguments.plot)
    return report


if __name__ == "__main__":
    main()
