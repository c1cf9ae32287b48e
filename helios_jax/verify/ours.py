"""The side of this library: each function loads what it needs, computes small results and lets go of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from helios_jax.convert.load import load_component
from helios_jax.diffusion.noise import TorchGeneratorNoise
from helios_jax.models.inputs import History
from helios_jax.models.transformer import HeliosTransformer
from helios_jax.models.umt5 import UMT5Encoder
from helios_jax.models.vae import WanVAE
from helios_jax.pipeline.pipeline import DTYPES, HeliosPipeline
from helios_jax.text import MAX_TOKENS, PromptEmbedding, PromptEncoder, Tokenizer, prompt_clean
from helios_jax.verify.inputs import Case, Settings

Rows = tuple[np.ndarray, np.ndarray]
Results = dict[str, np.ndarray]


def load(settings: Settings, component: str) -> dict[str, Any]:
    """The parameters of a component; for float32 as they are stored, to be widened where they are used."""
    dtype = None if settings.dtype == "float32" or component == "vae" else DTYPES[settings.dtype]
    return load_component(settings.folder.root / component, component, settings.folder.config(component), dtype)


def token_ids(settings: Settings, texts: Sequence[str]) -> list[list[int]]:
    """Ids of the cleaned texts, without padding."""
    tokenizer = Tokenizer.from_folder(settings.folder.tokenizer)
    return tokenizer.encode([prompt_clean(text) for text in texts], MAX_TOKENS)


def text_encoder(settings: Settings, prompts: dict[str, str]) -> Results:
    """Embeddings [real rows, D] of prompts, each encoded alone."""
    network = UMT5Encoder(settings.folder.text_encoder, DTYPES[settings.dtype])
    tokenizer = Tokenizer.from_folder(settings.folder.tokenizer)
    encode = PromptEncoder(network, load(settings, "text_encoder"), tokenizer)
    results = {}
    for name, prompt in prompts.items():
        embedding = encode(prompt)
        results[name] = np.asarray(embedding.rows[0, :int(embedding.lengths[0])], np.float32)
    return results


def vae(settings: Settings, video: np.ndarray, latents: np.ndarray) -> Results:
    """Posterior of a video [1, 33, H, W, 3] and frames of latents [1, 9, h, w, C] (not normalised)."""
    network = WanVAE(settings.folder.vae, jnp.float32)
    variables = {"params": load(settings, "vae")}
    mean, logvar = jax.jit(lambda v, x: network.apply(v, x, method=WanVAE.encode))(variables, video)
    frames = jax.jit(lambda v, z: network.apply(v, z, method=WanVAE.decode))(variables, latents)
    return {"encode: mean": np.asarray(mean), "encode: log-variance": np.clip(np.asarray(logvar), -30, 20),
            "decode": np.asarray(frames)}


def transformer(settings: Settings, cases: Sequence[Case], case_rows: np.ndarray, sample_rows: Rows | None) -> Results:
    """Forward passes, history tokens and, with ``sample_rows``, a short sample; the model is loaded once.

    Args:
      cases: may be empty.
      case_rows: prompt embedding of the cases, [rows, D].
      sample_rows: embeddings of prompt and negative prompt, or None for no sample.
    """
    params = load(settings, "transformer")
    results = _forward(settings, {"params": params}, cases, case_rows) if cases else {}
    if sample_rows is not None:
        results |= _sample(settings, params, sample_rows)
    return results


def _forward(settings: Settings, variables: dict[str, Any], cases: Sequence[Case], rows: np.ndarray) -> Results:
    dtype = DTYPES[settings.dtype]
    # One layer per iteration: with more, more layers are widened at the same time.
    model = HeliosTransformer(settings.folder.transformer, dtype, unroll=1)
    prompt = _embedding(rows, dtype)
    text = jax.jit(model.text_context, static_argnames="total")(variables, prompt.rows, prompt.lengths,
                                                                 total=prompt.total_rows)
    forward, embed = jax.jit(model.apply), jax.jit(model.embed_history)
    results: Results = {}
    for case in cases:
        past = None if case.history is None else History(*(jnp.asarray(part, dtype) for part in case.history))
        velocity = forward(variables, jnp.asarray(case.latents, dtype), jnp.full(1, case.timestep, jnp.float32), text,
                           past)
        results[case.name] = np.asarray(velocity, np.float32)
        if case is cases[0] and past is not None:
            results |= _tiers(np.asarray(embed(variables, past), np.float32), past)
    return results


def _tiers(tokens: np.ndarray, past: History) -> Results:
    """The history tokens [1, S, C], which stand in the order long, mid, short, by tier."""
    height, width = past.short.shape[2:4]
    counts = [-(-frames // k) * -(-height // (2 * k)) * -(-width // (2 * k))
              for frames, k in ((past.long.shape[1], 4), (past.mid.shape[1], 2))]
    parts = np.split(tokens, np.cumsum(counts), axis=1)
    return {f"history tokens, {name}": part for name, part in zip(("long", "mid", "short"), parts, strict=True)}


def _sample(settings: Settings, params: dict[str, Any], rows: Rows) -> Results:
    dtype = DTYPES[settings.dtype]
    pipeline = HeliosPipeline(settings.folder, {"transformer": params, "vae": load(settings, "vae"),
                                                "text_encoder": {}}, dtype=dtype, unroll=1)
    prompt, negative = (_embedding(part, dtype) for part in rows)
    chunks = list(pipeline.stream(
        prompt, negative_prompt=negative, noise=TorchGeneratorNoise(settings.seed), height=settings.size.height,
        width=settings.size.width, num_frames=settings.frames, steps=settings.steps))
    return {"latents": np.concatenate([np.asarray(chunk.latents) for chunk in chunks], axis=1),
            "frames": np.concatenate([chunk.frames for chunk in chunks], axis=1)}


def _embedding(rows: np.ndarray, dtype: Any) -> PromptEmbedding:
    return PromptEmbedding(jnp.asarray(rows[None], dtype), jnp.array([len(rows)], jnp.int32), MAX_TOKENS)
