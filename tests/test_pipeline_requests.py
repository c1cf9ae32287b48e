"""Requests of every kind: recorded runs of the original that need no PyTorch, sizes, and what is refused."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.convert.folder import ModelFolder
from helios_jax.convert.rules import leaves
from helios_jax.convert.safetensors_io import write_safetensors
from helios_jax.diffusion.noise import TorchGeneratorNoise
from helios_jax.errors import UserError
from helios_jax.pipeline.pipeline import HeliosPipeline
from helios_jax.text import PromptEmbedding
from tests.golden import check, data
from tests.tiny_checkpoint import CONFIGS, INDEX, SCHEDULER, TEXT_OF_RECORDED_RUNS, tiny_params

# --- Recorded runs of the original -----------------------------------------------------------------------------


def embedded(rows) -> PromptEmbedding:
    """All rows are real, as the recorded runs had them."""
    return PromptEmbedding(jnp.asarray(rows), jnp.full(len(rows), rows.shape[1], jnp.int32), rows.shape[1])


def torch_order(chunks) -> np.ndarray:
    return np.moveaxis(np.concatenate([np.asarray(c.latents) for c in chunks], axis=1), -1, 1)


@pytest.fixture
def recorded(base, monkeypatch):
    """Base at 64x128 with one step and no guidance; only latents matter."""
    monkeypatch.setattr(base, "decode", lambda z: np.zeros((len(z), 33, 1, 1, 3), np.float32))

    def run(prompt, pipe=base, **options):
        return pipe.stream(prompt, noise=TorchGeneratorNoise(0), **{
            "height": 64, "width": 128, "num_frames": 33, "steps": 1, "guidance_scale": 1.0, **options})

    return run


def test_interactive_prompts_equal_the_recorded_run(recorded):
    """Two prompts of four chunks each, three steps of interpolation; the original then returns to the first prompt,
    where this library holds the last one, so the return is asked for."""
    first, second = (embedded(data("iprompts", 2, 6, 24)[i:i + 1]) for i in range(2))
    stream = recorded(first, num_frames=330)
    chunks = []
    for k in range(10):
        if k == 4:
            stream.set_prompt(second, blend=3)
        if k == 8:
            stream.set_prompt(first)
        chunks.append(next(stream))
    check(torch_order(chunks), atol=2e-4, mean=+0.2611243, std=1.6036075, probe=-0.596439,
          first=[-1.730877, -0.387194, +0.306804, +0.165475], last=[-1.131006, -1.504003])


L1 = dict(atol=2e-4, mean=+0.1507425, std=1.8097351, probe=-0.382368,
          first=[-4.052272, -1.342800, -0.299403, -1.084668], last=[+0.867496, -1.046978])


@pytest.fixture(scope="module")
def lora_file(tmp_path_factory):
    """The adapter of the recorded run."""
    modules = ("blocks.0.attn1.to_q", "blocks.0.attn1.to_out.0", "blocks.1.attn2.to_v", "blocks.1.ffn.net.0.proj",
               "blocks.0.ffn.net.2", "proj_out", "condition_embedder.time_proj",
               "condition_embedder.text_embedder.linear_1")
    shapes = {rule.name.removesuffix(".weight"): rule.shape
              for leaf in leaves("transformer", CONFIGS["transformer"]) for rule in leaf.tensors}
    tensors = {}
    for module in modules:
        out, features = shapes[module]
        tensors[f"transformer.{module}.lora_A.weight"] = data(module + "A", 4, features) / np.float32(features) ** 0.5
        tensors[f"transformer.{module}.lora_B.weight"] = np.float32(0.3) * data(module + "B", out, 4)
    path = tmp_path_factory.mktemp("lora") / "adapter.safetensors"
    write_safetensors(path, tensors)
    return path


def test_merged_lora_equals_the_recorded_run(base, recorded, folders, lora_file, monkeypatch):
    merged = HeliosPipeline.from_pretrained(folders["base"], lora=[(lora_file, 1.0)])
    monkeypatch.setattr(base, "variables", merged.variables)  # saves compiling the programs again
    check(torch_order(recorded(embedded(data("prompt", 1, 6, 24)))), **L1)


def test_several_lora_kept_apart_add_up_to_the_recorded_run(recorded, folders, lora_file, monkeypatch):
    apart = HeliosPipeline.from_pretrained(folders["base"], lora=[(lora_file, 1.5), (lora_file, -0.5)],
                                           merge_lora=False)
    assert "lora" in apart.variables
    monkeypatch.setattr(apart, "decode", lambda z: np.zeros((len(z), 33, 1, 1, 3), np.float32))
    check(torch_order(recorded(embedded(data("prompt", 1, 6, 24)), apart)), **L1)


class ToyTokenizer:
    """Per character 2 + codepoint mod 60, then </s>."""

    vocab_size, eos_id = 64, 1

    def encode(self, texts, max_tokens=512):
        return [[2 + ord(c) % 60 for c in text][:max_tokens - 1] + [1] for text in texts]


def test_a_video_from_text_equals_the_recorded_run(base, recorded, monkeypatch):
    folder = ModelFolder(Path("."), "diffusers", INDEX["base"], CONFIGS["transformer"], CONFIGS["vae"],
                         TEXT_OF_RECORDED_RUNS, SCHEDULER["base"])
    params = base.params | {"text_encoder": tiny_params("text_encoder", TEXT_OF_RECORDED_RUNS)}
    pipe = HeliosPipeline(folder, params, tokenizer=ToyTokenizer())
    monkeypatch.setattr(pipe, "decode", lambda z: np.zeros((len(z), 33, 1, 1, 3), np.float32))
    check(torch_order(recorded("a cat", pipe, steps=2, guidance_scale=5.0)), atol=2e-4, mean=+0.1194157,
          std=1.6387082, probe=+0.444497, first=[-1.984423, -0.707862, +0.561030, +0.921809],
          last=[-1.216989, +2.116689])


# --- Sizes and other requests ----------------------------------------------------------------------------------


def test_base_takes_multiples_of_16(base):
    chunk, = base.stream("x", height=16, width=48, num_frames=33, steps=1, guidance_scale=1.0)
    assert chunk.frames.shape == (1, 33, 16, 48, 3) and np.isfinite(chunk.frames).all()


def test_the_pyramid_takes_multiples_of_64(distilled):
    chunk, = distilled.stream("x", height=64, width=192, steps=1, num_frames=33, amplify_first_chunk=False)
    assert chunk.frames.shape == (1, 33, 64, 192, 3) and np.isfinite(chunk.frames).all()


def test_mid_with_guidance_works_at_width_64(folders):
    """The original fails there."""
    pipe = HeliosPipeline.from_pretrained(folders["mid"])
    chunk, = pipe.stream("x", height=64, width=64, steps=(3, 1, 1), num_frames=2)
    assert chunk.frames.shape == (1, 2, 64, 64, 3) and np.isfinite(chunk.latents).all()


@pytest.mark.parametrize("variant, size, nearest", [
    ("base", (24, 16), "32x16, 16x16"), ("base", (15, 17), "16x16, 16x32"), ("base", (1, 640), "16x640"),
    ("distilled", (480, 832), "512x832, 448x832"), ("distilled", (720, 1280), "704x1280, 768x1280"),
    ("distilled", (80, 64), "64x64, 128x64"), ("distilled", (32, 32), "64x64"),
    ("distilled", (65, 64), "64x64, 128x64")])
def test_other_sizes_are_refused_with_the_nearest_allowed(base, distilled, variant, size, nearest):
    pipe = base if variant == "base" else distilled
    with pytest.raises(UserError) as caught:
        pipe.stream("x", height=size[0], width=size[1])
    message = str(caught.value)
    assert message.startswith(f"size {size[0]}x{size[1]} ") and message.endswith(f"nearest allowed: {nearest}")


IMAGE, VIDEO = np.zeros((64, 64, 3), np.float32), np.zeros((33, 64, 64, 3), np.float32)


@pytest.mark.parametrize("prompt, request_, named", [
    (5, {}, "prompt: text expected, got int"), ([], {}, "prompt: at least one"), (["a", None], {}, "prompt: text"),
    ("a", dict(num_frames=0), "num_frames: must be"), ("a", dict(num_frames=2.0), "num_frames: must be"),
    ("a", dict(num_frames=True), "num_frames: must be"), ("a", dict(height=64.0), "height: must be"),
    ("a", dict(width=-64), "width: must be"), ("a", dict(steps=0), "steps: positive"),
    ("a", dict(steps=2.5), "steps: positive"), ("a", dict(steps=[1, 2]), "steps: 3 numbers expected"),
    ("a", dict(steps=[1, "2", 3]), "steps: positive"), ("a", dict(steps="222"), "steps: positive"),
    ("a", dict(guidance_scale=float("nan")), "guidance_scale: must be"),
    ("a", dict(guidance_scale="5"), "guidance_scale: must be"), ("a", dict(guidance_scale=-1), "guidance_scale: must"),
    ("a", dict(guidance_scale=5.0), "guidance_scale: the distilled model needs 1"),
    ("a", dict(seed=-1), "seed: must be"), ("a", dict(seed=2**64), "seed: must be"), ("a", dict(seed=1.5), "seed: "),
    ("a", dict(seed="12"), "seed: must be"), ("a", dict(seed=[1, 2]), "seed: 1 or 1 values expected"),
    (["a", "b", "c"], dict(seed=[1, 2]), "seed: 1 or 3 values"),
    (["a", "b", "c"], dict(negative_prompt=["x", "y"]), "negative_prompt: 1 or 3 values"),
    ("a", dict(negative_prompt=None), "negative_prompt: text expected"),
    ("a", dict(colour=1), "unknown option 'colour'"),
    ("a", dict(condition_sigma=(0.2, 0.1)), "condition_sigma: "), ("a", dict(condition_sigma=0.1), "condition_sigma: "),
    ("a", dict(videos_at_once=0), "videos_at_once: "), ("a", dict(text_rows=-1), "text_rows: "),
    ("a", dict(image=IMAGE, video=VIDEO), "image and video: give one"),
    ("a", dict(image=VIDEO[:2]), "image: shape [1, 64, 64, 3] expected, got [2, 64, 64, 3]"),
    ("a", dict(image=IMAGE[:32]), "image: shape"), ("a", dict(video=VIDEO[:32]), "video: at least 33 frames"),
    ("a", dict(video=VIDEO[:0]), "video: at least 33 frames"),
    ("a", dict(image=IMAGE + 2), "image: floats from -1 to 1"), ("a", dict(image=IMAGE * np.nan), "image: floats from"),
    ("a", dict(image=IMAGE.astype(np.uint8)), "image: floats from -1 to 1"),
    ("a", dict(prompt_schedule=[(3, "b")]), "prompt_schedule: a change at chunk 3, but the video has 3 chunks"),
    (["a", "b"], dict(prompt_schedule=[(1, "b")]), "prompt_schedule: goes with one prompt"),
    ("a", dict(prompt_schedule="b"), "prompt_schedule: a list"),
    (embedded(data("x", 1, 6, 20)), {}, "prompt: embeddings [batch, rows, 24] expected"),
    (embedded(data("x", 3, 6, 24)), dict(negative_prompt=embedded(data("x", 2, 6, 24))), "negative_prompt: 1 or 3"),
])
def test_bad_requests_are_refused_before_the_first_step(distilled, prompt, request_, named):
    with pytest.raises(UserError) as caught:
        distilled.stream(prompt, **request_)
    assert str(caught.value).startswith(named) and "\n" not in str(caught.value)


def test_live_changes_are_checked(distilled):
    stream = distilled.stream(["a red circle moving right", "a blue square"], steps=1)
    for prompt, blend, named in ((["a", "b", "c"], 0, "prompt: 1 or 2 values"), ("a", -1, "blend: "),
                                 (5, 0, "prompt: "), (embedded(data("x", 3, 6, 24)), 0, "prompt: 1 or 2 embeddings")):
        with pytest.raises(UserError, match=named):
            stream.set_prompt(prompt, blend)
