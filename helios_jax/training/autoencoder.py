"""Training of the Wan video VAE on procedural clips, as an objective of the general loop.

The loss is a reconstruction (absolute and squared error, and the absolute error of spatial and temporal differences,
which keeps edges sharp and still) plus a small Kullback-Leibler term. A network this small needs neither a pretrained
perceptual network nor a discriminator. Two things make the latents easy for a diffusion model: the decoder also
sees latents with extra noise, relative to each channel's spread, so that it forgives small errors; and the exported
configuration holds each channel's measured mean and standard deviation.

Clips are rendered small (64x64) and short for speed: the network is convolutional in space and causal in time. A
second, short run from the first one's export (``init_from``) on longer clips closes the gap to whole sections.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from helios_jax.config import VAEConfig, read_json
from helios_jax.convert.export import atomic_folder, config_json, write_safetensors_component
from helios_jax.convert.folder import write_json
from helios_jax.convert.load import load_component
from helios_jax.convert.sources import TreeSource
from helios_jax.data import reader, shapes
from helios_jax.data.pipeline import clip_dataset
from helios_jax.errors import UserError
from helios_jax.models.vae import WanVAE, posterior_sample
from helios_jax.training.config import RunConfig, require
from helios_jax.training.objective import Objective

PyTree = Any
Array = jax.Array

# Clips for statistics and evaluation are numbered from here, far from those of any training run's seed.
_MEASURE_SEED, _EVALUATION_SEED = 2**63, 2**63 + 2**32
# Posterior standard deviation exp(-4 / 2) at the start: with the usual 1 the decoder would first learn to ignore z.
_START_LOGVAR = -4.0


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the objective.

    Attributes:
      vae: sizes of the network; its latent statistics are replaced at export.
      frames, height, width: of the training clips. Frames are 1 + 4k, height and width multiples of 8 (but at least
        32: the shape must fit).
      l1_weight, l2_weight, gradient_weight: of the parts of the reconstruction, pixels in [-1, 1], each a mean.
      kl_weight: of the divergence from the standard normal, a mean over latent elements.
      latent_noise: largest extra noise on the latents that the decoder sees, relative to each channel's standard
        deviation; each clip draws its level evenly between 0 and this.
      invert_channels: probability with which each colour channel of a clip is inverted. The backgrounds are nearly grey
        and cover most of a frame, so that without it colour is learned late.
      init_from: folder of an exported VAE to start from; empty starts from random values.
      trained_part: 'all', or 'decoder' to leave the latents of ``init_from`` (and their statistics) as they are: data
        and transformers that were made with them stay valid.
      section_frames: length of the clips for evaluation and statistics; the pipelines work in sections of 33.
      eval_clips: held-out clips of one evaluation.
      stat_clips: clips over which the latent statistics are measured at export.
      export_dtype: of the exported weights.
    """

    vae: VAEConfig = VAEConfig(base_dim=8)
    frames: int = 9
    height: int = 64
    width: int = 64
    l1_weight: float = 1.0
    l2_weight: float = 1.0
    gradient_weight: float = 0.5
    kl_weight: float = 1e-5
    latent_noise: float = 0.1
    invert_channels: float = 0.0
    init_from: str = ""
    trained_part: str = "all"
    section_frames: int = 33
    eval_clips: int = 8
    stat_clips: int = 64
    export_dtype: str = "float16"

    def __post_init__(self):
        for field in ("frames", "section_frames"):
            value = getattr(self, field)
            require(value > 0 and value % 4 == 1, f"objective.{field}: 1 + 4k allowed, got {value}")
        for field in ("height", "width"):
            value = getattr(self, field)
            require(value >= 32 and value % 8 == 0,
                    f"objective.{field}: a multiple of 8 from 32 on allowed, got {value}")
        for field in ("l1_weight", "l2_weight", "gradient_weight", "kl_weight", "latent_noise", "invert_channels"):
            require(getattr(self, field) >= 0, f"objective.{field}: must be 0 or more, got {getattr(self, field)}")
        require(self.l1_weight + self.l2_weight > 0, "objective.l1_weight, objective.l2_weight: one must be positive")
        require(self.invert_channels <= 1, f"objective.invert_channels: in [0, 1], got {self.invert_channels}")
        for field in ("eval_clips", "stat_clips"):
            require(getattr(self, field) > 0, f"objective.{field}: must be positive, got {getattr(self, field)}")
        require(self.trained_part in ("all", "decoder"),
                f"objective.trained_part: 'all' or 'decoder', got {self.trained_part!r}")
        require(self.trained_part == "all" or self.init_from,
                "objective.trained_part: 'decoder' needs objective.init_from, the VAE whose latents are kept; got ''")
        require(self.export_dtype in ("float32", "float16", "bfloat16"),
                f"objective.export_dtype: 'float32', 'float16' or 'bfloat16', got {self.export_dtype!r}")


# --- Loss ------------------------------------------------------------------------------------------------------------


def to_video(frames: Array) -> Array:
    """uint8 -> float32 in [-1, 1], same shape."""
    return frames.astype(jnp.float32) / 127.5 - 1.0


def to_frames(video: Array | np.ndarray) -> np.ndarray:
    """float in [-1, 1] -> uint8, same shape."""
    return np.rint((np.clip(np.asarray(video, np.float32), -1, 1) + 1) * 127.5).astype(np.uint8)


def difference_loss(error: Array) -> Array:
    """Mean absolute difference of neighbours in time, height and width, averaged over the three; error [B,F,H,W,3]."""
    axes = [axis for axis in (1, 2, 3) if error.shape[axis] > 1]
    return sum(jnp.abs(jnp.diff(error, axis=axis)).mean() for axis in axes) / max(len(axes), 1)


def kl_divergence(mean: Array, logvar: Array) -> Array:
    """Divergence of the posterior from the standard normal in nats, a mean over all elements."""
    return 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar).mean()


def psnr(squared_error: Array | float) -> Array:
    """Peak signal-to-noise ratio in dB from a mean squared error of pixels in [-1, 1]."""
    return 10.0 * jnp.log10(4.0 / jnp.maximum(squared_error, 1e-12))


def vae_loss(params: PyTree, video: Array, key: Array, config: Config) -> tuple[Array, dict[str, Array]]:
    """The whole training loss.

    Args:
      params: of ``WanVAE(config.vae)``.
      video: [B, F, H, W, 3] in [-1, 1].
      key: for the posterior sample and the extra noise.
    Returns: float32 scalar and its parts.
    """
    model = WanVAE(config.vae)
    mean, logvar = model.apply({"params": params}, video, method=WanVAE.encode)  # 2 x [B, T, h, w, C]
    if config.trained_part == "decoder":
        mean, logvar = jax.lax.stop_gradient((mean, logvar))
    logvar = jnp.clip(logvar, -30.0, 20.0)
    posterior_key, noise_key, level_key = jax.random.split(key, 3)
    z = posterior_sample(mean, logvar, jax.random.normal(posterior_key, mean.shape))
    if config.latent_noise:
        # Relative to the spread: with an absolute level the encoder could escape by making the latents large.
        spread = jax.lax.stop_gradient(mean.std((0, 1, 2, 3)))  # [C]
        level = config.latent_noise * jax.random.uniform(level_key, (len(mean), 1, 1, 1, 1))
        z = z + level * spread * jax.random.normal(noise_key, mean.shape)
    decoded = model.apply({"params": params}, z, clamp=False, method=WanVAE.decode)
    error = decoded - video
    parts = {"l1": jnp.abs(error).mean(), "l2": jnp.square(error).mean(), "gradient": difference_loss(error),
             "kl": kl_divergence(mean, logvar)}
    loss = (config.l1_weight * parts["l1"] + config.l2_weight * parts["l2"]
            + config.gradient_weight * parts["gradient"] + config.kl_weight * parts["kl"])
    return loss, {**parts, "psnr": psnr(parts["l2"]), "posterior_std": jnp.exp(0.5 * logvar).mean(),
                  "latent_std": mean.std((0, 1, 2, 3)).mean()}


# --- Measuring -------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="config")
def _encode(params: PyTree, video: Array, config: VAEConfig) -> tuple[Array, Array]:
    return WanVAE(config).apply({"params": params}, video, method=WanVAE.encode)


@functools.partial(jax.jit, static_argnames="config")
def _decode(params: PyTree, z: Array, config: VAEConfig) -> Array:
    return WanVAE(config).apply({"params": params}, z, method=WanVAE.decode)


def latent_statistics(params: PyTree, config: VAEConfig, clips: int, frames: int = 33
                      ) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each latent channel over training clips of native size, posterior included.

    Returns: two tuples of ``z_dim`` numbers, for ``latents_mean`` and ``latents_std`` of the configuration.
    """
    totals = np.zeros((2, config.z_dim))
    for number in range(clips):
        clip = shapes.sample_clip(_MEASURE_SEED + number, "train", frames)
        mean, logvar = _encode(params, to_video(clip.frames)[None], config)
        mean = np.asarray(mean, np.float64)
        square = mean**2 + np.exp(np.asarray(logvar, np.float64))  # E[z^2] of the sampled latents
        totals += [mean.mean((0, 1, 2, 3)), square.mean((0, 1, 2, 3))]
    mean, square = totals / clips
    return (tuple(float(f"{m:.6g}") for m in mean),
            tuple(float(f"{s:.6g}") for s in np.sqrt(np.maximum(square - mean**2, 1e-12))))


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """One clip and what the VAE makes of it: uint8 [F, H, W, 3] both."""

    clip: shapes.Clip
    frames: np.ndarray

    @property
    def psnr(self) -> float:
        error = (self.frames.astype(np.float64) - self.clip.frames) / 127.5
        return float(psnr(np.square(error).mean()))


def reconstruct(params: PyTree, config: VAEConfig, clips: int, frames: int = 33, split: str = "held_out",
                noise: float = 0.0) -> list[Reconstruction]:
    """Sends clips of native size through the VAE, posterior sampled as the pipelines do.

    Args:
      noise: standard deviation of extra noise relative to ``config.latents_std``, to see what the decoder forgives.
    """
    results = []
    spread = jnp.asarray(config.latents_std, jnp.float32)
    for number in range(clips):
        clip = shapes.sample_clip(_EVALUATION_SEED + number, split, frames)
        mean, logvar = _encode(params, to_video(clip.frames)[None], config)
        posterior_key, noise_key = jax.random.split(jax.random.key(number))
        z = posterior_sample(mean, logvar, jax.random.normal(posterior_key, mean.shape))
        z = z + noise * spread * jax.random.normal(noise_key, mean.shape)
        results.append(Reconstruction(clip, to_frames(_decode(params, z, config)[0])))
    return results


# --- Reading and writing ---------------------------------------------------------------------------------------------


def export_vae(params: PyTree, config: Config, folder: str | Path) -> VAEConfig:
    """Writes ``config.json`` and the weights as diffusers reads them.

    The latent statistics are measured now, over ``config.stat_clips`` training clips; where only the decoder was
    trained they are those of ``config.init_from``.

    Returns: the configuration as written.
    """
    folder = Path(folder)
    dtype = jnp.dtype(config.export_dtype)
    params = jax.tree.map(lambda p: np.asarray(p).astype(dtype), params)
    if config.trained_part == "decoder":
        vae = load_vae(config.init_from)[0]
    else:
        rounded = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)  # the statistics are those of the file
        mean, std = latent_statistics(rounded, config.vae, config.stat_clips, config.section_frames)
        vae = dataclasses.replace(config.vae, latents_mean=mean, latents_std=std)
    if (folder / "config.json").is_file():  # an earlier export of this run
        shutil.rmtree(folder)
    with atomic_folder(folder) as building:
        write_json(building / "config.json", config_json("vae", vae))
        write_safetensors_component(building, TreeSource("vae", vae, params, None))
    return vae


def load_vae(folder: str | Path, dtype: Any = jnp.float32) -> tuple[VAEConfig, PyTree]:
    """Configuration and parameters of an exported VAE (or of any Wan 2.1 VAE in the published layout)."""
    config = VAEConfig.from_dict(read_json(Path(folder) / "config.json"))
    return config, load_component(folder, "vae", config, dtype)


# --- The objective ---------------------------------------------------------------------------------------------------


def image_start(params: PyTree) -> PyTree:
    """The past taps of the 3x3x3 convolutions become zero and the newest tap takes over their scale.

    A network that starts without a past learns from single frames (the cheapest batches of many different clips) what
    it then needs for videos, and nothing untrained disturbs it when the first videos come.
    """
    def newest_only(kernel: Array) -> Array:
        if kernel.ndim != 5 or kernel.shape[:3] != (3, 3, 3):
            return kernel
        return jnp.zeros_like(kernel).at[-1].set(math.sqrt(3) * kernel[-1])

    return jax.tree.map(newest_only, params)


def build(run: RunConfig) -> Objective:
    """The objective of a run, see :class:`~helios_jax.training.objective.Objective`.

    Raises:
      UserError: ``init_from`` is no VAE of the configured sizes.
    """
    config: Config = run.objective

    def init_params(key: Array) -> PyTree:
        video = jnp.zeros((1, 5, 32, 32, 3))  # 5 frames touch every parameter
        params = WanVAE(config.vae).init(key, video)["params"]
        bias = params["quant_conv"]["bias"].at[config.vae.z_dim:].set(_START_LOGVAR)  # [2 z_dim]: means, log-variances
        params = image_start(params)
        return {**params, "quant_conv": {**params["quant_conv"], "bias": bias}}

    def load_params(abstract: PyTree) -> PyTree:
        loaded, params = load_vae(config.init_from)
        same = [dataclasses.replace(c, latents_mean=(0.0,) * c.z_dim, latents_std=(1.0,) * c.z_dim)
                for c in (loaded, config.vae)]
        if same[0] != same[1]:
            raise UserError(f"objective.init_from: {config.init_from} holds a VAE of other sizes than objective.vae")
        return jax.tree.map(lambda a, p: jnp.asarray(p, a.dtype), abstract, params)

    def trainable(params: PyTree) -> PyTree:
        chosen = ("decoder", "post_quant_conv")
        return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key in chosen, params)

    def loss(params: PyTree, frozen: PyTree, batch: dict[str, Array], key: Array) -> tuple[Array, dict[str, Array]]:
        del frozen
        video = to_video(batch["video"])
        if config.invert_channels:
            key, invert_key = jax.random.split(key)
            inverted = jax.random.bernoulli(invert_key, config.invert_channels, (len(video), 1, 1, 1, 3))
            video = jnp.where(inverted, -video, video)
        return vae_loss(params, video, key, config)

    def evaluate(params: PyTree, step: int) -> dict[str, float]:
        del step
        # Rough statistics are enough for the noise level.
        mean, std = latent_statistics(params, config.vae, 4, config.section_frames)
        vae = dataclasses.replace(config.vae, latents_mean=mean, latents_std=std)
        results = reconstruct(params, vae, config.eval_clips, config.section_frames)
        noisy = reconstruct(params, vae, config.eval_clips, config.section_frames, noise=0.1)
        right = reader.score([reader.read(r.frames) for r in results], [r.clip.attributes for r in results])
        values = [r.psnr for r in results]
        return {"psnr": float(np.mean(values)), "psnr_worst": min(values), "reader": right.all_fields,
                "psnr_noise_0.1": float(np.mean([r.psnr for r in noisy])),
                "latent_std_smallest": min(std), "latent_std_largest": max(std)}

    def sample(params: PyTree, step: int) -> dict[str, np.ndarray]:
        del step
        results = reconstruct(params, config.vae, min(config.eval_clips, 4), config.section_frames)
        rows = [np.concatenate([r.clip.frames, r.frames], axis=2) for r in results]  # original | reconstruction
        return {"reconstruction": np.concatenate(rows, axis=1)}  # clips below each other

    dataset = clip_dataset(run.batch_size, run.seed, frames=config.frames, height=config.height, width=config.width)
    return Objective(init_params, loss, dataset, load_params=load_params if config.init_from else None,
                     trainable=trainable if config.trained_part == "decoder" else None,
                     sample=sample, fps=shapes.FPS, evaluate=evaluate,
                     export=lambda params, folder: export_vae(params, config, folder) and None)
