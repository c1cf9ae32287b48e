"""The frozen models that turn pixels and captions into what is stored: the VAE's encoder and UMT5."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from helios_jax.errors import UserError

# [b, 33, H, W, 3] uint8, or float32 in [-1, 1] -> mean and std of the normalised posterior, each [b, 9, h, w, C] float.
EncodeVideo = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
# Captions -> one [n, D] float array each, n being its own number of rows.
EncodeText = Callable[[Sequence[str]], list[np.ndarray]]


def encode_sections(sections: Iterable[np.ndarray], encode_video: EncodeVideo, per_call: int, what: str
                    ) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of every section's posterior, each section encoded by itself.

    Args:
      sections: [33, H, W, 3] each; only ``per_call`` of them are in memory at a time.
      encode_video: the VAE; always called with exactly ``per_call`` sections, for one compiled program.
      per_call: b of ``encode_video``.
      what: name of the clip for the message.

    Returns: two float16 arrays [S, 9, h, w, C].

    Raises:
      UserError: latents that are not finite in float16.
    """
    means, stds, waiting = [], [], []

    def encode() -> None:
        batch = np.stack([waiting[i % len(waiting)] for i in range(per_call)])  # full batches only
        mean, std = encode_video(batch)
        means.append(np.asarray(mean[: len(waiting)], np.float16))
        stds.append(np.asarray(std[: len(waiting)], np.float16))
        waiting.clear()

    for section in sections:
        waiting.append(section)
        if len(waiting) == per_call:
            encode()
    if waiting:
        encode()
    mean, std = np.concatenate(means), np.concatenate(stds)
    if not (np.isfinite(mean).all() and np.isfinite(std).all()):
        raise UserError(f"{what}: its latents are not finite in float16; the VAE is broken or its statistics "
                        "latents_mean and latents_std do not belong to it")
    return mean, std


def encode_captions(captions: Sequence[str], encode_text: EncodeText) -> dict[str, np.ndarray]:
    """Embedding of every distinct caption, float16 [n, D] each.

    Raises:
      UserError: embeddings that are not finite in float16.
    """
    distinct = sorted(set(captions))
    rows = dict(zip(distinct, (np.asarray(r, np.float16) for r in encode_text(distinct)), strict=True))
    for caption, embedding in rows.items():
        if not np.isfinite(embedding).all():
            raise UserError(f"caption {caption!r:.60}: its embedding is not finite in float16; the text encoder is "
                            "broken")
    return rows


def fingerprint(params) -> str:
    """A short hash of the weights, so that a data set never mixes the latents of two models."""
    import jax

    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def video_encoder(folder: str | Path) -> tuple[EncodeVideo, str]:
    """``encode_video`` and the fingerprint of the VAE in a model folder, computing in float32."""
    import jax
    import jax.numpy as jnp

    from helios_jax.convert.folder import read_component_config
    from helios_jax.convert.load import load_component
    from helios_jax.models.vae import WanVAE, normalize_latents

    config = read_component_config(Path(folder) / "vae", "vae")
    params = load_component(Path(folder) / "vae", "vae", config, dtype=jnp.float32)
    vae = WanVAE(config)

    @jax.jit
    def posterior(params, video):
        if video.dtype == jnp.uint8:
            video = video.astype(jnp.float32) / 127.5 - 1
        mean, logvar = vae.apply({"params": params}, video, method=WanVAE.encode)
        std = jnp.exp(0.5 * jnp.clip(logvar, -30.0, 20.0)) / jnp.asarray(config.latents_std)
        return normalize_latents(mean, config), std

    def encode(video: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean, std = posterior(params, video)
        return np.asarray(mean), np.asarray(std)

    return encode, fingerprint(params)


def text_encoder(folder: str | Path) -> tuple[EncodeText, str]:
    """``encode_text`` and the fingerprint of the text encoder in a model folder, computing in float32."""
    import jax.numpy as jnp

    from helios_jax.convert.folder import read_component_config
    from helios_jax.convert.load import load_component
    from helios_jax.models.umt5 import UMT5Encoder
    from helios_jax.text import PromptEncoder, Tokenizer

    folder = Path(folder)
    config = read_component_config(folder / "text_encoder", "text_encoder")
    params = load_component(folder / "text_encoder", "text_encoder", config, dtype=jnp.float32)
    encoder = PromptEncoder(UMT5Encoder(config), params, Tokenizer.from_folder(folder / "tokenizer"), batch_size=64,
                            cache_size=0)

    def encode(captions: Sequence[str]) -> list[np.ndarray]:
        embedding = encoder(captions)
        rows = np.asarray(embedding.rows)
        return [row[:length] for row, length in zip(rows, np.asarray(embedding.lengths), strict=True)]

    return encode, fingerprint(params)


def encoders(folder: str | Path) -> tuple[EncodeVideo, EncodeText, str]:
    """Both encoders of a model folder, and the name that tells them from those of another model."""
    encode_video, vae_identity = video_encoder(folder)
    encode_text, text_identity = text_encoder(folder)
    return encode_video, encode_text, f"vae {vae_identity} text {text_identity}"
