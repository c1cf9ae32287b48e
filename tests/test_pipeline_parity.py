"""Whole runs equal diffusers' pipelines: same weights, same noise, Base, Mid and Distilled, T2V, I2V and V2V.

The noise is the stream of a PyTorch CPU generator, re-created in NumPy. The recorded numbers were made with the
original pipelines, which cannot draw block noise on a CPU unless its covariance is factorised in float64.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from helios_jax.config import ModelIndex, SchedulerConfig
from helios_jax.convert.folder import ModelFolder
from helios_jax.diffusion.noise import TorchGeneratorNoise
from helios_jax.pipeline.pipeline import HeliosPipeline
from helios_jax.text import PromptEmbedding
from helios_jax.video import preprocess_image, preprocess_video
from tests.golden import check, data, rs
from tests.oracles import (
    TINY_TEXT,
    TINY_TRANSFORMER,
    TINY_VAE,
    channel_first,
    converted,
    relative_error,
    torch_transformer,
    torch_vae,
    with_block_noise,
)

torch = pytest.importorskip("torch")

INDEX = {
    "base": ModelIndex(),
    "mid": ModelIndex("HeliosPyramidPipeline", is_cfg_zero_star=True),
    "distilled": ModelIndex("HeliosPyramidPipeline", "HeliosDMDScheduler", is_distilled=True),
}
SCHEDULER = {
    "base": SchedulerConfig(stages=1, use_dynamic_shifting=True, time_shift_type="exponential"),
    "mid": SchedulerConfig(use_dynamic_shifting=True, time_shift_type="exponential"),
    "distilled": SchedulerConfig("HeliosDMDScheduler", use_dynamic_shifting=True, time_shift_type="linear"),
}


def embedding(tag: str, batch: int = 1) -> PromptEmbedding:
    """Six rows that are all real, as the recorded runs had them."""
    rows = data(tag, batch, 6, 24)
    return PromptEmbedding(jnp.asarray(rows), jnp.full(batch, 6, jnp.int32), 6)


@functools.lru_cache(maxsize=8)  # compiled programs live in the pipeline
def pipeline(variant: str, transformer=TINY_TRANSFORMER, scheduler=None) -> HeliosPipeline:
    folder = ModelFolder(Path("."), "diffusers", INDEX[variant], transformer, TINY_VAE, TINY_TEXT,
                         scheduler or SCHEDULER[variant])
    params = {"transformer": converted("transformer", transformer, torch_transformer(transformer)),
              "vae": converted("vae", TINY_VAE, torch_vae()), "text_encoder": {}}
    return HeliosPipeline(folder, params)


def picture() -> PIL.Image.Image:
    return PIL.Image.fromarray((rs("img").rand(64, 128, 3) * 255).astype(np.uint8))


def clip(frames: int = 35) -> list[PIL.Image.Image]:
    return [PIL.Image.fromarray((rs(f"vid{i}").rand(64, 128, 3) * 255).astype(np.uint8)) for i in range(frames)]


def run(variant: str, task: str = "t2v", *, pipe=None, seed: int = 0, **options):
    """Returns frames [B, F, H, W, 3] and the latents in torch order, condition latents in front as diffusers'."""
    pipe = pipe or pipeline(variant)
    inputs = {}
    if task == "i2v":
        inputs["image"] = preprocess_image(picture(), 64, 128)
    if task == "v2v":
        inputs["video"] = preprocess_video(clip(), 64, 128)
    stream = pipe.stream(embedding("prompt"), negative_prompt=embedding("negative"), noise=TorchGeneratorNoise(seed),
                         height=64, width=128, **inputs, **options)
    conditions = {"t2v": 0, "i2v": 1, "v2v": 9}[task]
    history = np.asarray(stream._condition.history)[:, 19 - conditions:]
    chunks = list(stream)
    latents = np.concatenate([history, *(np.asarray(chunk.latents) for chunk in chunks)], axis=1)
    return np.concatenate([chunk.frames for chunk in chunks], axis=1), channel_first(latents)


RECORDED = {
    "P1": (("base",), dict(num_frames=66, steps=4), dict(mean=+0.1817462, std=2.0070178, probe=+1.548526,
           first=[-2.999938, -2.286144, -3.336643, -2.698539], last=[-0.147879, +0.199857])),
    "P1b": (("base",), dict(num_frames=33, steps=4, guidance_scale=1.0), dict(mean=+0.1626446, std=1.5427700,
            probe=+0.286964, first=[-1.535410, +0.007512, -0.118324, +0.332456], last=[-0.521022, +1.825613])),
    "P2": (("base", "i2v"), dict(num_frames=66, steps=3), dict(mean=+0.1366982, std=1.9793135, probe=+2.432466,
           first=[-0.634059, +0.317919, -0.061471, +0.150857], last=[+1.265998, +0.323077])),
    "P3": (("base", "v2v"), dict(num_frames=33, steps=3), dict(mean=+0.1158955, std=1.5290972, probe=-0.723374,
           first=[+0.190832, +0.512057, +0.547823, +0.180552], last=[-2.189138, -0.733618])),
    "P4": (("base",), dict(num_frames=99, steps=2, guidance_scale=1.0, skip_first_chunk=True),
           dict(mean=+0.1815924, std=1.5778161, probe=+0.195673, first=[-1.744625, -0.557242, +0.096616, +0.512796],
                last=[+1.268091, -1.971115])),
    "P4b": (("base",), dict(num_frames=99, steps=2, guidance_scale=1.0), dict(mean=+0.1806017, std=1.5767834,
            probe=+0.206021, first=[-1.744625, -0.557242, +0.096616, +0.512796], last=[+1.310053, -1.989763])),
    "P5": (("mid",), dict(num_frames=66, steps=3), dict(mean=+0.2480041, std=2.5208894, probe=+1.653946,
           first=[-1.955098, +1.764266, -1.412930, -0.998902], last=[-4.250047, -3.921367])),
    "P5b": (("mid",), dict(num_frames=33, steps=3, use_zero_init=False), dict(mean=+0.3071675, std=2.6043201,
            probe=-9.464901, first=[-5.007360, -2.647742, -3.062986, -2.113442], last=[+1.157032, +3.542920])),
    "P6": (("distilled",), dict(num_frames=66), dict(mean=+0.2432570, std=1.9389758, probe=+2.990298,
           first=[-3.354778, -0.941724, -1.750208, -1.568174], last=[-1.746898, -0.765815])),
    "P6b": (("distilled",), dict(num_frames=33, amplify_first_chunk=False), dict(mean=+0.2854717, std=1.8900270,
            probe=-3.493810, first=[-2.805756, -0.873609, -0.918254, -1.461992], last=[-0.128223, +0.040542])),
    "P6c": (("distilled",), dict(num_frames=33, steps=1, amplify_first_chunk=False), dict(mean=+0.3333675,
            std=1.9532441, probe=-4.165802, first=[-2.904593, -0.929365, -0.632233, -1.439644],
            last=[-0.140725, +0.176168])),
    "P7": (("distilled", "i2v"), dict(num_frames=33, steps=1, amplify_first_chunk=False), dict(mean=+0.2436189,
           std=1.8398514, probe=-1.625634, first=[-0.634059, +0.317919, -0.061471, +0.150857],
           last=[-2.193361, -0.373751])),
    "P8": (("distilled", "v2v"), dict(num_frames=33, steps=1, amplify_first_chunk=False), dict(mean=+0.1997203,
           std=1.4885692, probe=+4.824830, first=[+0.190832, +0.512057, +0.547823, +0.180552],
           last=[+0.651683, +0.904793])),
}


@pytest.mark.parametrize("case", RECORDED)
def test_latents_equal_the_recorded_runs_of_the_original(case):
    variant, options, want = RECORDED[case]
    _, latents = run(*variant, **options)
    check(latents, atol=2e-4, **want)


def test_euler_and_amplified_history_equal_the_recorded_runs():
    euler = dataclasses.replace(SCHEDULER["base"], scheduler_type="euler")
    _, latents = run("base", pipe=pipeline("base", scheduler=euler), num_frames=33, steps=4, guidance_scale=1.0)
    check(latents, atol=2e-4, mean=+0.1661024, std=1.5192510, probe=+0.241953,
          first=[-1.416104, +0.008438, -0.005823, +0.167070], last=[-0.058189, +1.620561])
    amplified = dataclasses.replace(TINY_TRANSFORMER, is_amplify_history=True)
    _, latents = run("base", pipe=pipeline("base", amplified), num_frames=33, steps=2, guidance_scale=1.0)
    check(latents, atol=2e-4, mean=+0.1349319, std=1.5890471, probe=+0.364959,
          first=[-1.906097, -0.139667, +0.282199, +0.769433], last=[-0.597672, +2.160269])


@pytest.mark.parametrize("case, frames, want", [
    ("P1", 65, dict(mean=+0.6039695, std=0.2751144, probe=-0.110121, first=[+0.383547, +0.653012, +0.635220, +0.614257],
                    last=[+0.386261, +0.642576])),
    ("P6", 65, dict(mean=+0.5835762, std=0.2721117, probe=+0.369346, first=[+0.561783, +0.765569, +0.573311, +0.512296],
                    last=[+0.336738, +0.524563])),
    ("P8", 33, dict(mean=+0.5730347, std=0.2717813, probe=-0.082430, first=[+0.636924, +0.748474, +0.535720, +0.539577],
                    last=[+0.242471, +0.927142])),
])
def test_frames_equal_the_recorded_runs_of_the_original(case, frames, want):
    """The original returns 65 frames where 66 were asked."""
    variant, options, _ = RECORDED[case]
    video, _ = run(*variant, **options)
    assert video.shape == (1, options["num_frames"], 64, 128, 3)
    check(video[:, :frames], atol=1e-4, **want)


def diffusers_pipeline(variant: str):
    """The original pipeline around the same modules, its block noise factorised in float64."""
    import diffusers

    scheduler_class = diffusers.HeliosDMDScheduler if variant == "distilled" else diffusers.HeliosScheduler
    config = {k: v for k, v in dataclasses.asdict(SCHEDULER[variant]).items() if k in
              ("stages", "use_dynamic_shifting", "time_shift_type", "shift", "gamma")}
    parts = dict(tokenizer=None, text_encoder=None, vae=torch_vae(), transformer=torch_transformer(),
                 scheduler=scheduler_class(**config))
    if variant == "base":
        return diffusers.HeliosPipeline(**parts)
    pipe = diffusers.HeliosPyramidPipeline(**parts, is_cfg_zero_star=variant == "mid",
                                           is_distilled=variant == "distilled")
    return with_block_noise(pipe)


LIVE = [("base", dict(steps=2)), ("mid", dict(steps=(3, 2, 1))),
        ("distilled", dict(steps=1, amplify_first_chunk=False)), ("distilled", dict(steps=2))]


@pytest.mark.parametrize("task", ["t2v", "i2v", "v2v"])
@pytest.mark.parametrize("variant, options", LIVE, ids=["base", "mid", "distilled_111", "distilled_222_amplified"])
def test_three_chunks_equal_a_live_run_of_diffusers(variant, options, task, monkeypatch):
    steps = options["steps"]
    theirs = diffusers_pipeline(variant)
    theirs.set_progress_bar_config(disable=True)
    call = dict(prompt_embeds=torch.from_numpy(data("prompt", 1, 6, 24)),
                negative_prompt_embeds=torch.from_numpy(data("negative", 1, 6, 24)), height=64, width=128,
                num_frames=99, guidance_scale=1.0 if variant == "distilled" else 5.0,
                generator=torch.Generator().manual_seed(7))
    if variant == "base":
        call["num_inference_steps"] = steps
    else:
        call["pyramid_num_inference_steps_list"] = [steps] * 3 if isinstance(steps, int) else list(steps)
    if variant == "distilled":
        call["is_amplify_first_chunk"] = options.get("amplify_first_chunk", True)
    if task == "i2v":
        call["image"] = picture()
    if task == "v2v":
        call["video"] = clip()
    # One run for both: it decodes every chunk, though it returns latents. Its own frames would be two fewer.
    decode, decoded = theirs.vae.decode, []
    monkeypatch.setattr(theirs.vae, "decode", lambda *a, **k: decoded.append(decode(*a, **k)) or decoded[-1])
    want = theirs(**call, output_type="latent").frames
    want_video = theirs.video_processor.postprocess_video(torch.cat([chunk for chunk, in decoded], dim=2), "np")
    video, latents = run(variant, task, seed=7, num_frames=99, **options)
    assert relative_error(latents, want.numpy()) < 1e-4
    assert video.shape == want_video.shape == (1, 99, 64, 128, 3)
    assert np.abs(video - want_video).max() < 1 / 255


def test_asked_for_99_frames_diffusers_returns_97_and_we_99():
    call = dict(prompt_embeds=torch.from_numpy(data("prompt", 1, 6, 24)), height=64, width=64, num_frames=99,
                guidance_scale=1.0, pyramid_num_inference_steps_list=[1, 1, 1])
    theirs = diffusers_pipeline("distilled")
    theirs.set_progress_bar_config(disable=True)
    assert theirs(**call, output_type="np").frames.shape == (1, 97, 64, 64, 3)
    video, _ = run("distilled", steps=1, num_frames=99, amplify_first_chunk=False)
    assert video.shape == (1, 99, 64, 128, 3)
