"""One row of ``benchmarks/sampling.py``, measured in a process of its own.

    python benchmarks/sampling_rows.py '{"settings": {...}, "row": {...}}' result.json

A process has one peak of memory, one cold start and one set of programs; so every row has its own, and what it held is
free when the next one begins. Without "row" it describes the machine and gets the checkpoint ready. The result is JSON:
what was measured, or {"error": the reason in one line}.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import statistics
import sys
import time
import traceback
import types
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Run as a script, Python looks for modules beside this file only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PROMPT = "a red circle moving right on a dark background"
SCHEDULES = {"[1,1,1]": {"steps": (1, 1, 1), "amplify_first_chunk": False},
             "[2,2,2] amplified": {"steps": (2, 2, 2), "amplify_first_chunk": True}}
FRAMES = 33  # of a chunk
RANDOM_TOKENS = 64  # of every prompt that a random model is given
KEPT_IN_FLOAT32 = ("time_embedder", "scale_shift_table", "norm2", "history_key_scale")


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    return statistics.median(seconds(run) for _ in range(repeats))


# -- models -----------------------------------------------------------------------------------------------------------


class RandomTokens:
    """A tokeniser for random weights, for both sides: every text has the same tokens."""

    eos_id = 1

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def encode(self, texts: Sequence[str], max_tokens: int = 512) -> list[list[int]]:
        return [[*range(2, 1 + RANDOM_TOKENS), self.eos_id] for _ in texts]

    def __call__(self, texts: Sequence[str], max_length: int, **_: Any) -> Any:
        import torch

        ids = torch.zeros(len(texts), max_length, dtype=torch.long)
        ids[:, :RANDOM_TOKENS] = torch.tensor(self.encode(texts))
        return types.SimpleNamespace(input_ids=ids, attention_mask=(ids != 0).long())


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


@functools.cache
def _maker(shape: tuple[int, ...], dtype: Any, scale: float, form: Any) -> Callable[[Any], Any]:
    """A compiled function from a key to normals, quantised where there is a form. Stacks are made layer by layer, so
    that little is there beside the result."""
    import jax

    from helios_jax.models.quantize import quantise

    def array(key: Any, shape: tuple[int, ...]) -> Any:
        made = (scale * jax.random.normal(key, shape)).astype(dtype)
        return made if form is None else quantise(made, form)

    if len(shape) < 3:
        return jax.jit(lambda key: array(key, shape))
    return jax.jit(lambda key: jax.lax.map(lambda key: array(key, shape[1:]), jax.random.split(key, shape[0])))


def random_params(placement: Any) -> dict[str, Any]:
    """Seeded normals in the form and place that loading gives, made on the device leaf by leaf and scaled by the number
    of inputs; norms at one, biases at zero."""
    import jax
    import numpy as np

    from helios_jax.models.quantize import format_of, is_quantised

    constants = {"bias": 0.0, "weight": 1.0, "gamma": 1.0}

    def leaf(component: str, path: tuple[str, ...], like: Any, key: Any) -> Any:
        form = format_of(component, path, placement.precision)
        if path[-1] in constants and path[0] != "shared":  # that is the table of tokens
            return np.full(like.shape, constants[path[-1]], like.dtype)
        if form is None:
            shape, dtype = like.shape, like.dtype
        else:
            *lead, features_out, features_in = like.qvalue.shape
            shape, dtype = (*lead, features_in, features_out), jax.numpy.float32
        # A stack's first axis is its layers; a convolution of the VAE sees its whole window.
        inputs = math.prod(shape[:-1]) if component == "vae" else shape[-2]
        return _maker(tuple(shape), dtype, inputs**-0.5, form)(key)

    found, wanted = {}, placement.abstract()
    # The text encoder has the largest single array, which takes most room beside it while it is made.
    for i, component in enumerate(("text_encoder", "transformer", "vae")):
        leaves, structure = jax.tree.flatten_with_path(wanted[component], is_leaf=is_quantised)
        made = []
        for (path, like), key in zip(leaves, jax.random.split(jax.random.key(i, impl="rbg"), len(leaves)), strict=True):
            value = leaf(component, tuple(entry.key for entry in path), like, key)
            made.append(jax.device_put(value, jax.tree.map(lambda x: x.sharding, like)))
        found[component] = structure.unflatten(made)
    return found


# -- ours -------------------------------------------------------------------------------------------------------------


def build(row: dict[str, Any], settings: dict[str, Any]) -> Any:
    """A pipeline with its weights in place, that encodes every prompt anew."""
    import jax

    from helios_jax.convert.rules import COMPONENTS
    from helios_jax.models.quantize import check_precision, require_qwix
    from helios_jax.models.streaming import COPIES_FROM_STACKS, split_layers
    from helios_jax.pipeline.memory import Budget
    from helios_jax.pipeline.pipeline import DTYPES, HeliosPipeline
    from helios_jax.pipeline.placement import Placement
    from helios_jax.sharding import Partition
    from sample import parse_mesh

    dtype, precision, streamed = row["dtype"], row["precision"], row["weights"] == "streamed"
    mesh = parse_mesh(row["weights"]) if "=" in row["weights"] else None
    if settings["model"] is not None:
        pipe = HeliosPipeline.from_pretrained(settings["model"], dtype=dtype, vae_dtype=dtype, precision=precision,
                                              mesh=mesh, stream_weights=streamed)
    else:
        check_precision(precision, jax.devices()[0].device_kind)
        if precision != "none":
            require_qwix()
        folder = random_folder(settings["heads"], settings["layers"], settings["size"])
        partition = None if mesh is None else Partition.create(mesh)
        placement = Placement(folder, dict.fromkeys(COMPONENTS, DTYPES[dtype]), precision, partition, streamed)
        Budget(placement).check()
        params = random_params(placement)
        if jax.default_backend() in COPIES_FROM_STACKS and not streamed:  # as loading does
            params["transformer"]["blocks"] = split_layers(params["transformer"]["blocks"], in_place=True)
        pipe = HeliosPipeline(folder, params, dtype=DTYPES[dtype], vae_dtype=DTYPES[dtype],
                              tokenizer=RandomTokens(folder.text_encoder.vocab_size), partition=partition,
                              streamed=streamed)
    pipe._prompt_encoder._cache_size = 0
    jax.block_until_ready(pipe.params)
    return pipe


def measure(row: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """One schedule of our pipeline; every time begins with the prompt as text."""
    import jax

    from benchmarks.machine import host_peak_bytes
    from helios_jax.tools.roofline import floor_seconds

    start = time.perf_counter()
    pipe = build(row, settings)
    found: dict[str, Any] = {"weights_s": time.perf_counter() - start, "weights_memory": memory()}
    schedule, chunks = SCHEDULES[row["schedule"]], settings["chunks"]
    options = dict(zip(("height", "width"), settings["size"], strict=True)) | schedule | {"frames_dtype": "uint8"}

    def first_chunk() -> None:
        next(pipe.stream(PROMPT, num_frames=FRAMES, **options))

    found["compile_s"] = seconds(lambda: pipe.compile(PROMPT, num_frames=FRAMES, **options))
    found["first_chunk_cold_s"] = found["compile_s"] + seconds(first_chunk)
    found["first_chunk_warm_s"] = median_seconds(first_chunk, settings["repeats"])
    times = []
    start = time.perf_counter()
    stream = pipe.stream(PROMPT, num_frames=FRAMES * chunks, lookahead=True, **options)
    for _ in range(chunks):
        next(stream)
        times.append(time.perf_counter() - start - sum(times))
    # The first chunk has the text and other steps, and with it the second one is begun.
    found["chunk_s"] = statistics.median(times[1:])
    found["video_s"], found["frames_per_second"] = sum(times), FRAMES / found["chunk_s"]
    found |= memory() | {"host_peak_bytes": host_peak_bytes()}
    found["parts_s"] = parts(pipe, pipe.stream(PROMPT, num_frames=FRAMES * chunks, **options), settings["repeats"])
    whole = {name: found["first_chunk_warm_s" if name == "text" else "chunk_s"] for name in found["parts_s"]}
    found["shares"] = {name: part / whole[name] for name, part in found["parts_s"].items()}
    found["flops"] = operations(pipe, stream, schedule["steps"])
    by_type = Counter()
    for part in found["flops"].values():
        by_type.update(part)
    devices = 1 if pipe._partition is None else pipe._partition.mesh.size
    found["flops_per_second"] = by_type.total() / found["chunk_s"]
    found["floor_s"] = floor_seconds(by_type, jax.devices()[0].device_kind, devices)
    return found


def memory() -> dict[str, int | None]:
    """Bytes on the fullest device: now, and at most since the process began; None where it does not say."""
    import jax

    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return {f"device_{name}": max((each[key] for each in stats if key in each), default=None)
            for name, key in (("bytes", "bytes_in_use"), ("peak_bytes", "peak_bytes_in_use"))}


def parts(pipe: Any, stream: Any, repeats: int) -> dict[str, float]:
    """Median seconds of each part by itself, waited for: the text of a prompt, and what makes a later chunk."""
    import jax
    import numpy as np

    history, anchor, _ = stream._condition
    text = stream._text(1)[0]
    made: dict[str, Any] = {}

    def text_part():
        jax.block_until_ready(pipe.context(pipe.embed((PROMPT,))))

    def transformer():
        drawn = stream._sampler.draw(stream._source, 1, 1)
        latents = stream._sampler.denoise(pipe.variables, drawn, 1, text, history, anchor)
        made["latents"] = jax.block_until_ready(latents)

    def vae():
        made["frames"] = jax.block_until_ready(pipe.decode_uint8(made["latents"]))[0]

    found = {}
    for name, part in (("text", text_part), ("transformer", transformer), ("vae", vae)):
        part()
        found[name] = median_seconds(part, repeats)
    copies = []
    for _ in range(repeats):
        vae()  # an array that was copied once is not copied again
        copies.append(seconds(lambda: np.asarray(made["frames"])))
    return found | {"copy of the frames": statistics.median(copies)}


def operations(pipe: Any, stream: Any, steps: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """Operations of a later chunk by part and type of the operands; matrix products and convolutions."""
    import jax
    import jax.numpy as jnp

    from helios_jax.tools.roofline import flops_by_type

    sampler, text = stream._sampler, stream._text(1)[0]
    found = {}
    for stage, count in enumerate(steps):
        inputs = [shape and jax.ShapeDtypeStruct(shape, jnp.float32) for shape in sampler.input_shapes(stage, 1)]
        by_type = flops_by_type(sampler.trace(stage, pipe.variables, text, inputs).jaxpr)
        found[f"level {stage}"] = {dtype: count * flops for dtype, flops in by_type.items()}
    latents = jax.ShapeDtypeStruct((1, sampler.plan.layout.chunk, *sampler.size, sampler.channels), jnp.float32)
    return found | {"vae": flops_by_type(pipe._decode.trace(pipe.params["vae"], latents).jaxpr)}


# -- theirs -----------------------------------------------------------------------------------------------------------


def their_pipeline(settings: dict[str, Any], device: str, dtype: str) -> Any:
    """diffusers' pipeline of a checkpoint, or with random weights of the same sizes."""
    import diffusers
    import torch
    import transformers

    from benchmarks.cpu import exact_block_noise
    from helios_jax.convert.export import config_json, scheduler_json

    kind = getattr(torch, dtype)
    if settings["model"] is not None:
        pipe = diffusers.HeliosPyramidPipeline.from_pretrained(settings["model"], torch_dtype=kind)
    else:
        folder = random_folder(settings["heads"], settings["layers"], settings["size"])
        torch.manual_seed(0)
        with torch.device(device):
            torch.set_default_dtype(kind)
            transformer = diffusers.HeliosTransformer3DModel.from_config(config_json("transformer", folder.transformer))
            vae = diffusers.AutoencoderKLWan.from_config(config_json("vae", folder.vae))
            text = transformers.UMT5EncoderModel(transformers.UMT5Config.from_dict(
                config_json("text_encoder", folder.text_encoder))).eval()
            torch.set_default_dtype(torch.float32)
        for name, parameter in transformer.named_parameters():
            if any(part in name for part in KEPT_IN_FLOAT32):
                parameter.data = parameter.data.float()
        scheduler = diffusers.HeliosDMDScheduler.from_config(scheduler_json(folder.scheduler))
        pipe = diffusers.HeliosPyramidPipeline(RandomTokens(folder.text_encoder.vocab_size), text, vae, scheduler,
                                               transformer, is_distilled=True)
    if device == "cpu":
        pipe.sample_block_noise = exact_block_noise  # the original's factor is singular there
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def measure_theirs(row: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The same video by diffusers, from the prompt as text to frames on the host."""
    import diffusers
    import torch

    from benchmarks.machine import host_peak_bytes
    from helios_jax.errors import UserError

    start = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and settings["device"] != "cpu":
        raise UserError(f"diffusers: PyTorch sees no {settings['device']}, and a processor would be no comparison")
    pipe = their_pipeline(settings, device, row["dtype"])
    if row["side"] == "diffusers, compiled":
        pipe.transformer = torch.compile(pipe.transformer)
        pipe.vae.decoder = torch.compile(pipe.vae.decoder)
    schedule, (height, width), chunks = SCHEDULES[row["schedule"]], settings["size"], settings["chunks"]

    def video(count: int) -> None:
        with torch.no_grad():
            pipe(PROMPT, height=height, width=width, num_frames=FRAMES * count, guidance_scale=1.0,
                 pyramid_num_inference_steps_list=list(schedule["steps"]), output_type="np",
                 is_amplify_first_chunk=schedule["amplify_first_chunk"], generator=torch.Generator().manual_seed(0))

    def memory() -> dict[str, int | None]:
        used = (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()) if device == "cuda" else (None, None)
        return dict(zip(("device_bytes", "device_peak_bytes"), used, strict=True))

    found: dict[str, Any] = {"weights_s": time.perf_counter() - start, "weights_memory": memory()}
    found["first_chunk_cold_s"] = seconds(lambda: video(1))
    video(chunks)  # later chunks have programs of their own
    found["first_chunk_warm_s"] = median_seconds(lambda: video(1), settings["repeats"])
    found["video_s"] = seconds(lambda: video(chunks))
    found["chunk_s"] = (found["video_s"] - found["first_chunk_warm_s"]) / (chunks - 1)
    found["frames_per_second"] = FRAMES / found["chunk_s"]
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "diffusers": diffusers.__version__}
    return found | memory() | {"host_peak_bytes": host_peak_bytes(), "versions": versions}


# -- the process ------------------------------------------------------------------------------------------------------


def prepare(settings: dict[str, Any]) -> dict[str, Any]:
    """What all rows need to know: the machine, the modes whose products its device makes, its usual dtype, and the
    folder of the Distilled checkpoint, written in ``settings["scratch"]`` where the model is another one."""
    import jax

    from benchmarks.cpu import write_models
    from benchmarks.machine import describe
    from helios_jax.convert.folder import read_model_folder, resolve_model
    from helios_jax.models.quantize import NATIVE_PRODUCTS

    found = {"machine": describe(), "dtype": "float32" if jax.default_backend() == "cpu" else "bfloat16"}
    kind = found["machine"]["device"]
    found["native"] = next((modes for pattern, modes in NATIVE_PRODUCTS if re.match(pattern, kind)), ())
    found["model"] = None
    if settings["model"] is not None:
        folder = read_model_folder(resolve_model(settings["model"]))
        if not folder.index.is_distilled:
            _, distilled = write_models(settings["model"], settings["size"], Path(settings["scratch"]))
            folder = read_model_folder(distilled)
        found["model"] = str(Path(folder.root).resolve())
    return found


def reason(error: Exception) -> str:
    """The error in one line; what is no mistake of the user's is printed whole."""
    from helios_jax.errors import UserError

    if isinstance(error, UserError):
        return str(error)
    traceback.print_exc()
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}"[:300]


def main(argv: list[str]) -> None:
    job, file = json.loads(argv[0]), Path(argv[1])
    settings, row = job["settings"], job.get("row")
    settings["size"] = tuple(settings["size"])
    try:
        if row is None:
            found = prepare(settings)
        else:
            found = (measure if row["side"] == "helios_jax" else measure_theirs)(row, settings)
    except Exception as error:  # whatever it is, the other rows go on
        found = {"error": reason(error)}
    file.write_text(json.dumps(found | {"process": os.getpid()}))


if __name__ == "__main__":
    main(sys.argv[1:])
