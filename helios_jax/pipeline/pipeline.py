"""The pipeline: a checkpoint and a request become a stream of chunks.

One chunk's way: noise -> pyramid stages (``sampler``) -> history and anchor update -> VAE decode -> frames. Memory and
time per chunk do not depend on how many chunks came before.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from helios_jax import text as text_path
from helios_jax.convert.folder import ModelFolder
from helios_jax.convert.load import load_pipeline_params
from helios_jax.diffusion.history import HistoryLayout, replaces_anchor, update_anchor
from helios_jax.diffusion.noise import NoiseSource, SeededNoise
from helios_jax.errors import UserError
from helios_jax.models.transformer import HeliosTransformer, TextContext
from helios_jax.models.umt5 import UMT5Encoder
from helios_jax.models.vae import WanVAE, denormalize_latents
from helios_jax.pipeline import request as check
from helios_jax.pipeline.conditioning import CONDITION_SIGMA, Condition, ConditionEncoder
from helios_jax.pipeline.prompts import PromptChange, PromptTrack, checked_schedule
from helios_jax.pipeline.sampler import ChunkSampler, SamplingPlan

Array = jax.Array
Params = Mapping[str, Any]

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# Above this many bytes for one full-resolution activation the VAE decodes one latent frame at a time.
WHOLE_DECODE_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """Everything about a run but its prompts, image and video. None means the variant's default.

    Attributes:
      height, width: pixels; default: the checkpoint's native size.
      num_frames: exact number of frames returned.
      steps: denoising steps, one number or one per pyramid stage.
      guidance_scale: above 1 runs the model on the negative prompt too.
      seed: one for all prompts or one per prompt.
      use_zero_init, zero_steps: zero init of Mid.
      amplify_first_chunk: twice the steps on the first chunk of Distilled.
      skip_first_chunk: anchor anew on the second chunk.
      condition_sigma: range of the noise on image and video conditions, or None for none.
      allow_distilled_guidance: accept a guidance scale above 1 on a distilled model.
    """

    height: int | None = None
    width: int | None = None
    num_frames: int = check.DEFAULT_FRAMES
    steps: int | Sequence[int] | None = None
    guidance_scale: float | None = None
    seed: int | Sequence[int] = check.DEFAULT_SEED
    use_zero_init: bool = True
    zero_steps: int = 1
    amplify_first_chunk: bool = True
    skip_first_chunk: bool = False
    condition_sigma: tuple[float, float] | None = CONDITION_SIGMA
    allow_distilled_guidance: bool = False


@dataclasses.dataclass(frozen=True)
class Chunk:
    """One finished chunk.

    Attributes:
      index: of the chunk in the video.
      frames: float32 [B, F, H, W, 3] in [0, 1]; F is 33, less in the last chunk where the request ends inside it.
      latents: float32 [B, 9, h, w, 16], normalised, on the device.
    """

    index: int
    frames: np.ndarray
    latents: Array


class HeliosPipeline:
    """Base, Mid and Distilled, chosen by the checkpoint's own files.

    Args:
      folder: configurations and tokenizer.
      params: parameters of "transformer", "vae" and "text_encoder".
      dtype: compute dtype of transformer and text encoder; the VAE runs in ``vae_dtype``.
      lora: adapter tree for the transformer, or None.
      unroll: layers per iteration of the transformer's scan, 0 for all; default: all on a CPU, 1 elsewhere.
    """

    def __init__(self, folder: ModelFolder, params: Mapping[str, Params], *, dtype: Any = jnp.float32,
                 vae_dtype: Any = jnp.float32, lora: Params | None = None, unroll: int | None = None):
        self.folder, self.index, self.scheduler = folder, folder.index, folder.scheduler
        on_cpu = jax.default_backend() == "cpu"
        unroll = (0 if on_cpu else 1) if unroll is None else unroll
        self.transformer = HeliosTransformer(folder.transformer, dtype, unroll)
        self.vae = WanVAE(folder.vae, vae_dtype, "taps" if on_cpu else "3d")
        self.text_encoder = UMT5Encoder(folder.text_encoder, dtype)
        self.params = dict(params)
        self.variables = {"params": params["transformer"]} | ({"lora": lora} if lora else {})
        self._context = jax.jit(self.transformer.text_context, static_argnames="total")
        self._decode = jax.jit(functools.partial(_decode_chunk, self.vae))
        self._samplers: dict[Any, ChunkSampler] = {}

    @classmethod
    def from_pretrained(cls, model: str | Path, *, dtype: str = "float32", vae_dtype: str = "float32",
                        lora: Sequence[tuple[str | Path, float]] = (), merge_lora: bool = True,
                        unroll: int | None = None) -> HeliosPipeline:
        """Loads a checkpoint.

        Args:
          model: hub id or folder, in the published layout or as written by ``python -m helios_jax.convert``.
          dtype: 'float32' or 'bfloat16', of transformer and text encoder.
          lora: (file or folder, weight) pairs.
          merge_lora: add the adapters to the weights; False keeps them apart.

        Raises:
          UserError: the checkpoint or an adapter cannot be used; one line.
        """
        for name, value in (("dtype", dtype), ("vae_dtype", vae_dtype)):
            if value not in DTYPES:
                raise UserError(f"{name}: one of {', '.join(DTYPES)}, got {value!r}")
        compute, vae_compute = DTYPES[dtype], DTYPES[vae_dtype]
        folder, params = load_pipeline_params(
            model, dtype={"transformer": compute, "text_encoder": compute, "vae": vae_compute})
        adapters = None
        if lora:
            from helios_jax.lora import adapter_tree, merge, read_lora

            loaded = [read_lora(path, folder.transformer, weight) for path, weight in lora]
            if merge_lora:
                params["transformer"] = merge(params["transformer"], loaded)
            else:
                adapters = adapter_tree(loaded)
        return cls(folder, params, dtype=compute, vae_dtype=vae_compute, lora=adapters, unroll=unroll)

    def __call__(self, prompt: str | Sequence[str], **request: Any) -> np.ndarray:
        """The whole video, float32 [B, F, H, W, 3] in [0, 1]. Arguments as :meth:`stream`."""
        return np.concatenate([chunk.frames for chunk in self.stream(prompt, **request)], axis=1)

    def stream(
        self,
        prompt: str | Sequence[str] | text_path.PromptEmbedding,
        *,
        negative_prompt: str | Sequence[str] | text_path.PromptEmbedding = "",
        image: np.ndarray | None = None,
        video: np.ndarray | None = None,
        prompt_schedule: Sequence[Any] = (),
        noise: NoiseSource | None = None,
        options: SamplingOptions | None = None,
        **fields: Any,
    ) -> VideoStream:
        """Prepares a run and returns it as an iterator over its chunks.

        All checks of the request happen here, before the first step.

        Args:
          prompt: one or several (a batch of videos), as text or encoded.
          negative_prompt: one for all or one per prompt; read only where guidance is on. Encoded: one per prompt.
          image: [H, W, 3] or [B, H, W, 3] float in [-1, 1] of the asked size: image to video.
          video: [F, H, W, 3] or [B, F, H, W, 3] float in [-1, 1] of the asked size: video to video.
          prompt_schedule: prompt changes, see :func:`helios_jax.pipeline.prompts.checked_schedule`; for one prompt.
          noise: source of all randomness; default: ``SeededNoise`` of the seeds.
          options, fields: :class:`SamplingOptions`, as an object or by keyword.

        Raises:
          UserError: any field out of range.
        """
        names = {field.name for field in dataclasses.fields(SamplingOptions)}
        if unknown := sorted(set(fields) - names):
            raise UserError(f"unknown option {unknown[0]!r}; known: {', '.join(sorted(names))}")
        options = dataclasses.replace(options or SamplingOptions(), **fields)
        embedded = isinstance(prompt, text_path.PromptEmbedding)
        prompts = prompt if embedded else check.checked_prompts("prompt", prompt)
        batch = len(prompts)
        changes = checked_schedule(prompt_schedule) if prompt_schedule else ()
        if changes and batch > 1:
            raise UserError(f"prompt_schedule: goes with one prompt, got {batch}")
        steps = check.checked_steps(options.steps, self.index, self.scheduler)
        size = self.checked_size(options)
        check.checked_count("num_frames", options.num_frames)
        check.checked_count("zero_steps", options.zero_steps, 0)
        guidance_scale = check.checked_guidance(options.guidance_scale, self.index, options.allow_distilled_guidance)
        seeds = (options.seed,) if isinstance(options.seed, int) else tuple(options.seed)
        source = noise or SeededNoise(check.broadcast("seed", seeds, batch))
        if image is not None and video is not None:
            raise UserError("image and video: give one of them, not both")
        plan = SamplingPlan.for_model(self.index, steps=steps, guidance_scale=guidance_scale,
                                      use_zero_init=options.use_zero_init, zero_steps=options.zero_steps,
                                      amplify_first_chunk=options.amplify_first_chunk)
        encoder = ConditionEncoder(self.vae, self.params["vae"], self.folder.vae, plan.layout, options.condition_sigma)
        pixels = _checked_pixels("image" if video is None else "video", image if video is None else video, batch, size)
        negatives = negative_prompt
        if not isinstance(negatives, text_path.PromptEmbedding):
            texts = check.checked_prompts("negative_prompt", negative_prompt)
            negatives = check.broadcast("negative_prompt", texts, batch)
        return VideoStream(self, prompts, negatives, changes, plan, encoder, pixels, video is not None, source, size,
                           options)

    def checked_size(self, options: SamplingOptions) -> check.Size:
        """The pixel size of a run.

        Raises:
          UserError: a size the pyramid cannot halve; names the nearest allowed ones.
        """
        stages = len(check.checked_steps(options.steps, self.index, self.scheduler))
        height, width = (native if asked is None else asked for native, asked in
                         zip(self.index.native_size, (options.height, options.width), strict=True))
        return check.Size.checked(height, width, stages)

    # -- pieces the stream runs ---------------------------------------------------------------------------------

    def sampler(self, plan: SamplingPlan, size: check.Size) -> ChunkSampler:
        """The compiled sampler of a plan and size; kept, so that a second video compiles nothing."""
        key = (plan, size)
        if key not in self._samplers:
            self._samplers[key] = ChunkSampler(self.transformer, self.scheduler, plan, size.height, size.width,
                                               self.folder.vae.z_dim)
        return self._samplers[key]

    @functools.cached_property
    def _prompt_encoder(self) -> text_path.PromptEncoder:
        tokenizer = text_path.Tokenizer.from_folder(self.folder.tokenizer)
        return text_path.PromptEncoder(self.text_encoder, self.params["text_encoder"], tokenizer)

    def embed(self, prompts: Sequence[str] | text_path.PromptEmbedding) -> text_path.PromptEmbedding:
        """Encoded prompts; embeddings pass through."""
        return prompts if isinstance(prompts, text_path.PromptEmbedding) else self._prompt_encoder(prompts)

    def context(self, embedding: text_path.PromptEmbedding) -> TextContext:
        """Cross-attention keys and values of every layer for a batch of prompt embeddings."""
        return self._context(self.variables, embedding.rows, embedding.lengths, total=embedding.total_rows)

    def decode(self, latents: Array) -> Array:
        """Normalised latents [B, T, h, w, 16] -> frames [B, 1 + 4(T-1), H, W, 3] float32 in [0, 1]."""
        return self._decode(self.params["vae"], latents)


class VideoStream(Iterator[Chunk]):
    """A run in progress: iterate for its chunks, change the prompt in between.

    Attributes:
      num_chunks, num_frames, size: of the whole run.
      position: index of the chunk that comes next.
    """

    def __init__(self, pipeline: HeliosPipeline, prompts: Sequence[str] | text_path.PromptEmbedding,
                 negatives: Sequence[str] | text_path.PromptEmbedding, changes: Sequence[PromptChange],
                 plan: SamplingPlan, encoder: ConditionEncoder, pixels: np.ndarray | None, is_video: bool,
                 source: NoiseSource, size: check.Size, options: SamplingOptions):
        self.num_frames, self.size = options.num_frames, size
        self.window = encoder.window
        self.num_chunks = -(-options.num_frames // self.window)
        self.position = 0
        self._pipeline, self._plan, self._source = pipeline, plan, source
        self._skip_first_chunk = options.skip_first_chunk
        self._sampler = pipeline.sampler(plan, size)
        self._batch = len(prompts)
        self._track = PromptTrack(pipeline.embed(prompts))
        for change in changes:
            self._track.change(change.chunk, pipeline.embed((change.prompt,)), change.blend)
        self._negative = pipeline.embed(negatives) if plan.guided else None
        self._context: tuple[Any, TextContext] | None = None
        self._condition = self._conditions(encoder, pixels, is_video)
        self._layout: HistoryLayout = plan.layout

    def _conditions(self, encoder: ConditionEncoder, pixels: np.ndarray | None, is_video: bool) -> Condition:
        if pixels is None:
            return encoder.empty(self._batch, self.size.height, self.size.width)
        return (encoder.video if is_video else encoder.image)(self._source, jnp.asarray(pixels))

    def set_prompt(self, prompt: str | Sequence[str] | text_path.PromptEmbedding, blend: int = 0) -> None:
        """Changes the prompt from the next chunk on, at once or blended over ``blend`` chunks.

        Raises:
          UserError: the number of prompts differs from the run's batch.
        """
        if isinstance(prompt, text_path.PromptEmbedding):
            if len(prompt) != self._batch:
                raise UserError(f"prompt: {self._batch} expected, got {len(prompt)}")
        else:
            prompt = check.broadcast("prompt", check.checked_prompts("prompt", prompt), self._batch)
        self._track.change(self.position, self._pipeline.embed(prompt), blend)

    def __iter__(self) -> VideoStream:
        return self

    def __next__(self) -> Chunk:
        if self.position >= self.num_chunks:
            raise StopIteration
        k, history, anchor = self.position, self._condition.history, self._condition.anchor
        latents = self._sampler.denoise(self._pipeline.variables, self._source, k, self._batch, self._text(k), history,
                                        anchor)
        replace = replaces_anchor(k, self._condition.has_anchor, self._skip_first_chunk)
        self._condition = Condition(self._layout.append(history, latents), update_anchor(anchor, latents, replace),
                                    self._condition.has_anchor)
        frames = np.asarray(self._pipeline.decode(latents))
        self.position += 1
        return Chunk(k, frames[:, : self.num_frames - k * self.window], latents)

    def _text(self, chunk: int) -> TextContext:
        """The chunk's text context; computed anew only where the prompt changed."""
        old, new, weight = self._track.at(chunk)
        key = (id(old), id(new), weight)
        if self._context is None or self._context[0] != key:
            embedding = new if weight == 1.0 else text_path.blend(old, new, weight)
            if self._negative is not None:
                embedding = text_path.concatenate([embedding, self._negative])
            self._context = (key, self._pipeline.context(embedding))
        return self._context[1]


def _decode_chunk(vae: WanVAE, params: Params, latents: Array) -> Array:
    """Decodes one chunk on its own, whole where it is small, else latent frame by latent frame."""
    z = denormalize_latents(latents.astype(vae.dtype), vae.config)
    b, t, h, w, _ = z.shape
    frames = 1 + (t - 1) * vae.config.scale_factor_temporal
    if b * frames * 64 * h * w * vae.config.base_dim * z.dtype.itemsize <= WHOLE_DECODE_BYTES or t == 1:
        video = vae.apply({"params": params}, z, method=WanVAE.decode)
    else:
        def one_frame(cache, frame):
            rgb, cache = vae.apply({"params": params}, frame[:, None], cache, method=WanVAE.decode_step)
            return cache, rgb

        first, cache = vae.apply({"params": params}, z[:, :1], None, method=WanVAE.decode_step)
        _, rest = jax.lax.scan(one_frame, cache, z[:, 1:].swapaxes(0, 1))  # [T-1, B, 4, H, W, 3]
        rest = rest.swapaxes(0, 1).reshape(b, -1, *rest.shape[3:])  # [B, 4 (T-1), H, W, 3]
        video = jnp.concatenate([first, rest], axis=1)
    return jnp.clip(video.astype(jnp.float32) * 0.5 + 0.5, 0.0, 1.0)


def _checked_pixels(name: str, pixels: np.ndarray | None, batch: int, size: check.Size) -> np.ndarray | None:
    """Image [B, H, W, 3] or video [B, F, H, W, 3], repeated for the batch where one was given for all."""
    if pixels is None:
        return None
    rank = 4 if name == "image" else 5
    pixels = np.asarray(pixels, np.float32)
    pixels = pixels[None] if pixels.ndim == rank - 1 else pixels
    if pixels.ndim != rank or pixels.shape[-3:] != (size.height, size.width, 3) or len(pixels) not in (1, batch):
        raise UserError(f"{name}: shape [1 or {batch}, {'frames, ' if rank == 5 else ''}{size.height}, {size.width}, 3]"
                        f" expected, got {list(pixels.shape)}")
    return np.repeat(pixels, batch, axis=0) if len(pixels) != batch else pixels
