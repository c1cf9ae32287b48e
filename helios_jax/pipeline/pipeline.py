"""The pipeline: a checkpoint and a request become a stream of chunks.

One chunk's way: noise -> pyramid stages (``sampler``) -> history and anchor update -> VAE decode -> frames. Memory and
time per chunk do not depend on how many chunks came before.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from helios_jax import sharding
from helios_jax import text as text_path
from helios_jax.convert.folder import ModelFolder, read_model_folder, resolve_model
from helios_jax.convert.load import load_pipeline_params
from helios_jax.diffusion.history import replaces_anchor, update_anchor
from helios_jax.diffusion.noise import NoiseSource, SeededNoise
from helios_jax.errors import NOT_FINITE, UserError
from helios_jax.lora import MERGE_REFUSED, adapter_tree, merge, read_lora
from helios_jax.models.quantize import check_precision
from helios_jax.models.streaming import COPIES_FROM_STACKS, split_layers
from helios_jax.models.transformer import HeliosTransformer, TextContext
from helios_jax.models.umt5 import UMT5Encoder
from helios_jax.models.vae import (
    WanVAE,
    decode_in_steps,
    denormalize_latents,
    encode_in_steps,
    normalize_latents,
    posterior_sample,
)
from helios_jax.pipeline import memory
from helios_jax.pipeline import request as check
from helios_jax.pipeline.conditioning import Condition, ConditionEncoder
from helios_jax.pipeline.placement import Placement, plain_path_offered
from helios_jax.pipeline.prompts import PromptChange, PromptTrack, checked_schedule, rows_needed, with_rows
from helios_jax.pipeline.request import SamplingOptions
from helios_jax.pipeline.sampler import ChunkSampler, SamplingPlan
from helios_jax.sharding import MeshConfig, Partition

Array = jax.Array
Params = Mapping[str, Any]

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
FRAMES_DTYPES = ("float32", "uint8")
# Above this many bytes for one full-resolution activation the VAE works one latent frame at a time, which takes less
# memory and, where fresh memory is slow, less time (a CPU, base width 32, 192x320: 12 s in place of 17).
WHOLE_CHUNK_BYTES = 32 * 2**20


@dataclasses.dataclass(frozen=True)
class Chunk:
    """One finished chunk.

    Attributes:
      index: of the chunk in the video.
      frames: [B, F, H, W, 3], float32 in [0, 1] or uint8, as the run was asked for; F is 33, less in the last chunk
        where the request ends inside it.
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
      unroll: layers per iteration of the transformer's scan, 0 for all; default: all on a CPU, and on a GPU unless
        streamed; else 1.
      tokenizer: default: that of the folder, read at the first prompt.
      partition: the mesh on which the parameters lie (see :mod:`helios_jax.pipeline.placement`) and videos are made;
        None for one device. Of several processes all must ask for the same videos; each gets them whole.
      streamed: the weights of transformer and text encoder lie in the host's memory (see
        :mod:`helios_jax.models.streaming`).
    """

    def __init__(self, folder: ModelFolder, params: Mapping[str, Params], *, dtype: Any = jnp.float32,
                 vae_dtype: Any = jnp.float32, lora: Params | None = None, unroll: int | None = None,
                 tokenizer: text_path.TokenEncoder | None = None, partition: Partition | None = None,
                 streamed: bool = False):
        self.folder, self.index, self.scheduler = folder, folder.index, folder.scheduler
        platform = jax.default_backend()
        on_cpu, copies = platform == "cpu", platform in COPIES_FROM_STACKS and not streamed
        unroll = (0 if on_cpu or copies else 1) if unroll is None else unroll
        self.transformer = HeliosTransformer(folder.transformer, dtype, unroll, for_sampling=True, streamed=streamed)
        self.vae = WanVAE(folder.vae, vae_dtype, "taps" if on_cpu else "3d")
        self.text_encoder = UMT5Encoder(folder.text_encoder, dtype, streamed=streamed)
        self._partition = partition
        self._layers_apart = copies and unroll == 0
        self.variables = {}
        self._bind(params)
        if lora:
            self.variables["lora"] = jax.tree.map(jnp.asarray, lora) if partition is None else sharding.place(
                lora, sharding.param_shardings(partition, lora))
        self._tokenizer = tokenizer
        self.budget: memory.Budget | None = None  # of :meth:`from_pretrained`
        # Compiled here and not per run, so that a second video of the same size compiles nothing.
        self._context = sharding.jit(partition, self.transformer.text_context, static_argnames="total")
        self._encode = sharding.jit(partition, functools.partial(_encode_window, self.vae))
        self._decode = sharding.jit(partition, functools.partial(decode_chunk, self.vae))
        self._decode_uint8 = sharding.jit(partition, functools.partial(decode_chunk_uint8, self.vae))
        self._samplers: dict[Any, ChunkSampler] = {}

    def _bind(self, params: Mapping[str, Params], in_place: bool = False) -> None:
        """in_place: nobody else has these parameters, so stacks are given up when their layers are taken apart."""
        self.params = dict(params)
        transformer = params["transformer"]
        if self._layers_apart and not isinstance(transformer["blocks"], tuple):
            self.params["transformer"] = {**transformer, "blocks": split_layers(transformer["blocks"], in_place)}
        self.variables["params"] = self.params["transformer"]

    @classmethod
    def from_pretrained(cls, model: str | Path, *, dtype: str | None = None, vae_dtype: str | None = None,
                        lora: Sequence[tuple[str | Path, float]] = (), merge_lora: bool = True,
                        unroll: int | None = None, mesh: MeshConfig | None = None, precision: str | None = None,
                        stream_weights: bool = False, compile_for: Mapping[str, Any] | None = None,
                        read_weights: bool = True) -> HeliosPipeline:
        """Loads a checkpoint.

        Args:
          model: hub id or folder, in the published layout or as written by ``python -m helios_jax.convert``.
          dtype: 'float32' or 'bfloat16', of transformer and text encoder; None: float32 on a CPU, bfloat16 elsewhere.
          vae_dtype: of the VAE; None: as ``dtype``.
          lora: (file or folder, weight) pairs.
          merge_lora: add the adapters to the weights; False keeps them apart.
          mesh: divide the model over several devices (docs/pods.md); None takes the first one.
          precision: of the linear layers, 'none' or a mode of docs/low_precision.md, into which they are quantised
            while the weights are read; None takes the checkpoint as it is, quantised or not. A warning tells where
            the device multiplies in a wider type.
          stream_weights: keep the weights of transformer and text encoder in the host's memory and copy them to the
            device layer by layer, for devices that the model does not fit. Adapters then stay apart.
          compile_for: arguments of :meth:`compile`: its programs are compiled while the weights are read.
          read_weights: False only compiles, to fill a cache of programs; the pipeline cannot sample. Not with
            ``stream_weights``.

        Raises:
          UserError: the checkpoint or an adapter cannot be used, the mesh does not fit, or the model, or with
            ``compile_for`` the run, needs more memory than there is; one line.
        """
        dtype = ("float32" if jax.default_backend() == "cpu" else "bfloat16") if dtype is None else dtype
        vae_dtype = dtype if vae_dtype is None else vae_dtype
        for name, value in (("dtype", dtype), ("vae_dtype", vae_dtype)):
            check.checked_choice(name, value, tuple(DTYPES))
        compute, vae_compute = DTYPES[dtype], DTYPES[vae_dtype]
        folder = read_model_folder(resolve_model(model))
        check.checked_history_patches(folder.transformer)
        dtypes = {"transformer": compute, "text_encoder": compute, "vae": vae_compute}
        precision = folder.precision("transformer") if precision is None else precision
        if note := check_precision(precision, jax.devices()[0].device_kind):
            warnings.warn(note, stacklevel=2)
        with plain_path_offered():
            partition = None if mesh is None else Partition.create(mesh)
            if partition is not None:
                partition.attention.check(2, folder.transformer.num_attention_heads)  # two: with guidance
        if partition is not None and stream_weights:
            raise UserError("stream_weights: goes with one device, not with a mesh")
        if stream_weights and not read_weights:
            raise UserError("stream_weights: programs are compiled when the weights are there; read_weights=False "
                            "(--compile_only) goes without")
        placement = Placement(folder, dtypes, precision, partition, stream_weights)
        # The small files first: a mistake in them shows before gigabytes are read.
        loaded = [read_lora(path, folder.transformer, weight) for path, weight in lora]
        merge_lora = merge_lora and not stream_weights
        if loaded and merge_lora and precision != "none":
            raise UserError(MERGE_REFUSED)
        pipeline = cls(folder, placement.abstract(), dtype=compute, vae_dtype=vae_compute,
                       lora=None if merge_lora or not loaded else adapter_tree(loaded), unroll=unroll,
                       partition=partition, streamed=stream_weights)
        pipeline.budget = memory.Budget(placement, merges=bool(loaded) and merge_lora)
        pipeline.budget.check()
        lowerings = [] if compile_for is None else pipeline._lowerings(**compile_for)
        # Not waited for where the weights turn out to be damaged.
        pool = ThreadPoolExecutor(os.cpu_count())
        try:
            with memory.explained(pipeline.budget, "reading the weights and compiling"):
                # Abstract arrays of one device do not tell the compiler in which of its memories they lie.
                compiling = [] if stream_weights else [pool.submit(_compiled, lower) for lower in lowerings]
                params = pipeline.params
                if read_weights:
                    _, params = load_pipeline_params(folder.root, dtype=dtypes, sharding=placement.shardings(),
                                                     precision=precision)
                if loaded and merge_lora and read_weights:
                    params["transformer"] = merge(params["transformer"], loaded, in_place=True)
                programs = [each.result() for each in compiling]
                pipeline._bind(params, in_place=True)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        pipeline.budget = dataclasses.replace(pipeline.budget, loaded=True)
        if compile_for is not None and stream_weights:
            pipeline.compile(**compile_for)
        elif compile_for is not None:
            pipeline._check_memory(programs)
        return pipeline

    def compile(self, prompts: str | Sequence[str] = "", *, negative_prompt: str | Sequence[str] = "",
                frames_dtype: str = "float32", options: SamplingOptions | None = None, **fields: Any) -> None:
        """Compiles, several at a time, what :meth:`stream` with these arguments will run; nothing is computed.

        The programs of an image or a video that begins a run are left out, and on a mesh those of the text.

        Args:
          prompts, negative_prompt: of which only the numbers of tokens count; prompts that come later included.
          frames_dtype, options, fields: as for :meth:`stream`.

        Raises:
          UserError: any field out of range, or more memory is needed than there is.
        """
        lowerings = self._lowerings(prompts, negative_prompt=negative_prompt, frames_dtype=frames_dtype,
                                    options=options, **fields)
        with memory.explained(self.budget, "compiling"), ThreadPoolExecutor(os.cpu_count()) as pool:
            self._check_memory(list(pool.map(_compiled, lowerings)))

    def _check_memory(self, programs: Sequence[jax.stages.Compiled]) -> None:
        if self.budget is not None:
            self.budget.check(memory.compiled_bytes(programs))

    def _lowerings(self, prompts: str | Sequence[str] = "", *, negative_prompt: str | Sequence[str] = "",
                   frames_dtype: str = "float32", options: SamplingOptions | None = None, **fields: Any
                   ) -> list[Callable[[], jax.stages.Lowered]]:
        """Functions that trace the programs of :meth:`compile`, whose arguments these are."""
        check.checked_choice("frames_dtype", frames_dtype, FRAMES_DTYPES)
        options = self._checked_options(options, fields)
        plan, videos, place = self._plan(options), options.videos_at_once, self._place
        self._expect(plan, options, videos)
        texts = [*check.checked_prompts("prompt", prompts)]
        texts += check.checked_prompts("negative_prompt", negative_prompt) if plan.guided else ()
        lengths = np.array([len(ids) for ids in text_path.token_ids(self._tokens, texts)])
        rows = rows_needed([text_path.PromptEmbedding(None, lengths)], options.text_rows)
        rows = jax.ShapeDtypeStruct((videos * (2 if plan.guided else 1), rows, self.folder.transformer.text_dim),
                                    self.text_encoder.dtype, sharding=place)
        counts = jax.ShapeDtypeStruct(rows.shape[:1], jnp.int32)
        context = functools.partial(self._context, total=text_path.MAX_TOKENS)
        text = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
                            jax.eval_shape(context, self.variables, rows, counts))
        sampler = self.sampler(plan, options.height, options.width)
        latents = jax.ShapeDtypeStruct((videos, plan.layout.chunk, *sampler.size, sampler.channels), jnp.float32,
                                       sharding=place)
        decode = self._decode_uint8 if frames_dtype == "uint8" else self._decode
        lowerings = [*sampler.lowerings(self.variables, text, videos, place),
                     lambda: decode.lower(self.params["vae"], latents)]
        if self._partition is None:
            lowerings.append(lambda: self._context.lower(self.variables, rows, counts, total=text_path.MAX_TOKENS))
            lowerings += [functools.partial(text_path.lower_encoder, self.text_encoder, self.params["text_encoder"], n)
                          for n in sorted({text_path.stored_rows(n) for n in lengths})]
        return lowerings

    def _expect(self, plan: SamplingPlan, options: SamplingOptions, videos: int) -> None:
        """Refuses a run of so many videos in one program that does not fit the devices. Its weights may be there."""
        if self.budget is not None:
            request = memory.Request(options.height, options.width, videos, plan.guided)
            step = check.size_step(len(plan.steps))
            self.budget = dataclasses.replace(self.budget, request=request, step=step)
            self.budget.check()

    @property
    def _place(self) -> jax.sharding.Sharding | None:
        """Where the programs' results lie; None where the parameters are bound to no device."""
        if self._partition is not None:
            return self._partition.replicated
        leaf = jax.tree.leaves(self.params["vae"])[0]
        place = getattr(leaf, "sharding", None) if getattr(leaf, "committed", True) else None
        return place if isinstance(place, jax.sharding.SingleDeviceSharding) else None

    def placed(self, x: Array) -> Array:
        """An array where the programs leave theirs: they are compiled anew for one that lies elsewhere or nowhere."""
        if self._partition is not None:
            return sharding.place(x, self._partition.replicated)
        return x if self._place is None else jax.device_put(x, self._place)

    def _checked_options(self, options: SamplingOptions | None, fields: Mapping[str, Any], batch: int = 1
                         ) -> SamplingOptions:
        names = {field.name for field in dataclasses.fields(SamplingOptions)}
        if unknown := sorted(set(fields) - names):
            raise UserError(f"unknown option {unknown[0]!r}; known: {', '.join(sorted(names))}")
        return dataclasses.replace(options or SamplingOptions(), **fields).checked(self.index, self.scheduler, batch)

    def _plan(self, options: SamplingOptions) -> SamplingPlan:
        return SamplingPlan.for_model(self.index, steps=options.steps, guidance_scale=options.guidance_scale,
                                      use_zero_init=options.use_zero_init, zero_steps=options.zero_steps,
                                      amplify_first_chunk=options.amplify_first_chunk)

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
        lookahead: bool = False,
        frames_dtype: str = "float32",
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
          lookahead: the devices begin the next chunk before this one's frames are copied to the host, so they work on
            while the caller does something with them. Chunks are then begun in a thread of the stream's own, where
            context managers of ``jax.config`` do not reach. A change of prompt makes that chunk anew, which asks the
            noise source again: one that remembers what it gave (``TorchGeneratorNoise``) goes on elsewhere.
          frames_dtype: of the chunks' frames: 'float32', or 'uint8', rounded on the device as
            ``helios_jax.video.to_uint8`` does and a quarter of the bytes to copy.
          options, fields: :class:`SamplingOptions`, as an object or by keyword.

        Raises:
          UserError: any field out of range.
        """
        prompts = self._checked_prompts("prompt", prompt)
        negatives = self._checked_prompts("negative_prompt", negative_prompt, len(prompts))
        options = self._checked_options(options, fields, len(prompts))
        check.checked_choice("frames_dtype", frames_dtype, FRAMES_DTYPES)
        if image is not None and video is not None:
            raise UserError("image and video: give one of them, not both")
        pixels = check.checked_pixels("image" if video is None else "video", image if video is None else video,
                                      len(prompts), options.height, options.width)
        plan = self._plan(options)
        if self._partition is not None:
            with plain_path_offered():
                self._partition.attention.check(options.videos_at_once * (2 if plan.guided else 1),
                                                self.folder.transformer.num_attention_heads)
        self._expect(plan, options, min(options.videos_at_once, len(prompts)))
        encoder = ConditionEncoder(functools.partial(self._encode, self.params["vae"]), self.folder.vae, plan.layout,
                                   options.condition_sigma)
        changes = ()
        if prompt_schedule:
            changes = checked_schedule(prompt_schedule, -(-options.num_frames // encoder.window))
            if len(prompts) > 1:
                raise UserError(f"prompt_schedule: goes with one prompt, got {len(prompts)}")
        with memory.explained(self.budget, "encoding text, image or video"):
            return VideoStream(self, prompts, negatives, changes, plan, encoder, pixels, video is not None,
                               noise or SeededNoise(options.seed), options, lookahead, frames_dtype)

    def _checked_prompts(self, name: str, prompts: Any, batch: int | None = None
                         ) -> tuple[str, ...] | text_path.PromptEmbedding:
        """Texts or embeddings, one per video where ``batch`` says how many those are."""
        if not isinstance(prompts, text_path.PromptEmbedding):
            texts = check.checked_prompts(name, prompts)
            return texts if batch is None else check.broadcast(name, texts, batch)
        width = self.folder.transformer.text_dim
        if prompts.rows.ndim != 3 or prompts.rows.shape[-1] != width:
            raise UserError(f"{name}: embeddings [batch, rows, {width}] expected, got {list(prompts.rows.shape)}")
        if batch is not None and len(prompts) not in (1, batch):
            raise UserError(f"{name}: 1 or {batch} embeddings expected (one per prompt), got {len(prompts)}")
        return prompts if batch in (None, len(prompts)) else text_path.concatenate([prompts] * batch)

    # -- pieces the stream runs ---------------------------------------------------------------------------------

    def sampler(self, plan: SamplingPlan, height: int, width: int) -> ChunkSampler:
        """The compiled sampler of a plan and size; kept, so that a second video compiles nothing."""
        key = (plan, height, width)
        if key not in self._samplers:
            self._samplers[key] = ChunkSampler(self.transformer, self.scheduler, plan, height, width,
                                               self.folder.vae.z_dim, partition=self._partition)
        return self._samplers[key]

    def compiled_programs(self) -> int:
        """How many programs have been compiled for text context, VAE and denoising."""
        programs = (self._context, self._encode, self._decode, self._decode_uint8)
        return (sum(program._cache_size() for program in programs)
                + sum(sampler.compiled_programs() for sampler in self._samplers.values()))

    @functools.cached_property
    def _prompt_encoder(self) -> text_path.PromptEncoder:
        return text_path.PromptEncoder(self.text_encoder, self.params["text_encoder"], self._tokens)

    @functools.cached_property
    def _tokens(self) -> text_path.TokenEncoder:
        return self._tokenizer or text_path.Tokenizer.from_folder(self.folder.tokenizer)

    def embed(self, prompts: Sequence[str] | text_path.PromptEmbedding) -> text_path.PromptEmbedding:
        """Encoded prompts; embeddings pass through."""
        return prompts if isinstance(prompts, text_path.PromptEmbedding) else self._prompt_encoder(prompts)

    def context(self, embedding: text_path.PromptEmbedding) -> TextContext:
        """Cross-attention keys and values of every layer for a batch of prompt embeddings."""
        return self._context(self.variables, embedding.rows, embedding.lengths, total=embedding.total_rows)

    def decode(self, latents: Array) -> Array:
        """Normalised latents [B, T, h, w, 16] -> frames [B, 1 + 4(T-1), H, W, 3] float32 in [0, 1]."""
        return self._decode(self.params["vae"], latents)

    def decode_uint8(self, latents: Array) -> tuple[Array, Array]:
        """As :meth:`decode`, but uint8 frames, and bool []: whether all numbers were finite before the rounding."""
        return self._decode_uint8(self.params["vae"], latents)


class _Work(NamedTuple):
    """One chunk that the devices are making.

    frames, finite: of :meth:`HeliosPipeline.decode` or :meth:`HeliosPipeline.decode_uint8`, one array per group of
      videos (``finite`` is empty for float frames); latents: [B, 9, h, w, C]; condition: what the next chunk sees.
    """

    frames: list[Array]
    finite: list[Array]
    latents: Array
    condition: Condition


class VideoStream(Iterator[Chunk]):
    """A run in progress: iterate for its chunks, change the prompt in between.

    Attributes:
      num_chunks, num_frames: of the whole run.
      position: index of the chunk that comes next.
    """

    def __init__(self, pipeline: HeliosPipeline, prompts: Sequence[str] | text_path.PromptEmbedding,
                 negatives: Sequence[str] | text_path.PromptEmbedding, changes: Sequence[PromptChange],
                 plan: SamplingPlan, encoder: ConditionEncoder, pixels: np.ndarray | None, is_video: bool,
                 source: NoiseSource, options: SamplingOptions, lookahead: bool, frames_dtype: str):
        self.num_frames, self.window = options.num_frames, encoder.window
        self.num_chunks = -(-options.num_frames // self.window)
        self.position = 0
        self._as_uint8 = frames_dtype == "uint8"
        # A chunk is thousands of kernels to start, and where the device's queue is full the host waits for it.
        self._beside = ThreadPoolExecutor(1) if lookahead else None
        self._begun: dict[int, Callable[[], _Work]] = {}  # chunks from ``position`` on
        self._pipeline, self._source, self._layout, self._options = pipeline, source, plan.layout, options
        self._sampler = pipeline.sampler(plan, options.height, options.width)
        self._batch = len(prompts)
        # The videos that share a program.
        self._groups = [slice(i, i + options.videos_at_once) for i in range(0, self._batch, options.videos_at_once)]
        self._track = PromptTrack(pipeline.embed(prompts))
        for change in changes:
            self._track.change(change.chunk, pipeline.embed((change.prompt,)), change.blend)
        self._negative = pipeline.embed(negatives) if plan.guided else None
        self._text_rows = [0] * len(self._groups)
        self._make_room()
        self._contexts: tuple[text_path.PromptEmbedding, list[TextContext]] | None = None
        if pixels is None:
            condition = encoder.empty(self._batch, options.height, options.width)
        else:
            condition = (encoder.video if is_video else encoder.image)(source, pixels)
        if not options.keep_first_frame:
            condition = condition._replace(anchor=jnp.zeros_like(condition.anchor))
        self._condition = condition._replace(history=pipeline.placed(condition.history),
                                             anchor=pipeline.placed(condition.anchor))

    def set_prompt(self, prompt: str | Sequence[str] | text_path.PromptEmbedding, blend: int = 0) -> None:
        """Changes the prompt from the next chunk on, at once or blended over ``blend`` chunks.

        Nothing is compiled again, unless the prompt is longer than ``text_rows`` and all before it.

        Raises:
          UserError: the number of prompts is neither 1 nor the run's batch, or ``blend`` is negative.
        """
        check.checked_count("blend", blend, 0)
        prompt = self._pipeline._checked_prompts("prompt", prompt, self._batch)
        if self._beside:  # what it is at work on reads what changes here
            self._beside.submit(lambda: None).result()
        self._track.change(self.position, self._pipeline.embed(prompt), blend)
        self._make_room()
        self._begun.clear()

    def __iter__(self) -> VideoStream:
        return self

    @memory.explains
    def __next__(self) -> Chunk:
        if self.position >= self.num_chunks:
            raise StopIteration
        k = self.position
        try:
            work = self._work(k, self._condition)()
        except Exception:
            self._begun.pop(k, None)
            raise
        if self._beside and k + 1 < self.num_chunks:
            self._work(k + 1, work.condition)
        frames = np.concatenate([np.asarray(part) for part in work.frames])
        if not all(map(bool, work.finite)):
            raise UserError(NOT_FINITE)
        # Last, so that an interrupted chunk can be asked for again.
        del self._begun[k]
        self._condition = work.condition
        self.position += 1
        return Chunk(k, frames[:, : self.num_frames - k * self.window], work.latents)

    def _work(self, k: int, condition: Condition) -> Callable[[], _Work]:
        """Has a chunk made, unless that was begun before; returns what waits until it is begun."""
        if k not in self._begun:
            if self._beside:
                self._begun[k] = self._beside.submit(self._begin, k, condition).result
            else:
                made = self._begin(k, condition)
                self._begun[k] = lambda: made
        return self._begun[k]

    def _begin(self, k: int, condition: Condition) -> _Work:
        """Gives the devices one chunk to make. Waits for none of its results."""
        history, anchor, has_anchor = condition
        drawn = self._sampler.draw(self._source, k, self._batch)
        latents, frames, finite = [], [], []
        for group, text in zip(self._groups, self._text(k), strict=True):
            latents.append(self._sampler.denoise(self._pipeline.variables, [x[group] for x in drawn], k, text,
                                                 history[group], anchor[group]))
            if self._as_uint8:
                decoded, is_finite = self._pipeline.decode_uint8(latents[-1])
                finite.append(is_finite)
            else:
                decoded = self._pipeline.decode(latents[-1])
            frames.append(decoded)
        jax.copy_to_host_async((frames, finite))
        new = jnp.concatenate(latents)
        replace = self._options.keep_first_frame and replaces_anchor(k, has_anchor, self._options.skip_first_chunk)
        return _Work(frames, finite, new,
                     Condition(self._layout.append(history, new), update_anchor(anchor, new, replace), has_anchor))

    def _make_room(self) -> None:
        """Chooses the number of text rows per group; it only grows."""
        known = self._track.known() + ([] if self._negative is None else [self._negative])
        self._text_rows = [rows_needed([e[group] for e in known], max(least, self._options.text_rows))
                           for group, least in zip(self._groups, self._text_rows, strict=True)]

    def _text(self, chunk: int) -> list[TextContext]:
        """The chunk's text context per group; computed anew only where the prompt changed."""
        prompts = self._track.at(chunk)
        if self._contexts is None or self._contexts[0] is not prompts:
            contexts = []
            for group, rows in zip(self._groups, self._text_rows, strict=True):
                parts = [e[group] for e in (prompts, self._negative) if e is not None]
                contexts.append(self._pipeline.context(text_path.concatenate([with_rows(e, rows) for e in parts])))
            self._contexts = (prompts, contexts)
        return self._contexts[1]


def _compiled(lower: Callable[[], jax.stages.Lowered]) -> jax.stages.Compiled:
    return lower().compile()


def _encode_window(vae: WanVAE, params: Params, video: Array, eps: Array) -> Array:
    """Frames [B, F, H, W, 3] in [-1, 1] and posterior normals -> normalised latents [B, T, h, w, 16] float32."""
    video = video.astype(vae.dtype)
    if video.shape[1] == 1 or _is_small(vae, *video.shape[:4]):
        mean, logvar = vae.apply({"params": params}, video, method=WanVAE.encode)
    else:
        mean, logvar = encode_in_steps(vae, params, video)
    z = normalize_latents(posterior_sample(mean, logvar, eps.astype(mean.dtype)), vae.config)
    return z.astype(jnp.float32)


def _is_small(vae: WanVAE, batch: int, frames: int, height: int, width: int) -> bool:
    size = batch * frames * height * width * vae.config.base_dim * jnp.dtype(vae.dtype).itemsize
    return size <= WHOLE_CHUNK_BYTES


def decode_chunk(vae: WanVAE, params: Params, latents: Array) -> Array:
    """Decodes one chunk on its own, whole where it is small, else latent frame by latent frame."""
    z = denormalize_latents(latents.astype(vae.dtype), vae.config)
    b, t, h, w, _ = z.shape
    if t == 1 or _is_small(vae, b, 1 + (t - 1) * vae.config.scale_factor_temporal, 8 * h, 8 * w):
        video = vae.apply({"params": params}, z, method=WanVAE.decode)
    else:
        video = decode_in_steps(vae, params, z)
    return jnp.clip(video.astype(jnp.float32) * 0.5 + 0.5, 0.0, 1.0)


def decode_chunk_uint8(vae: WanVAE, params: Params, latents: Array) -> tuple[Array, Array]:
    frames = decode_chunk(vae, params, latents)
    return jnp.rint(frames * 255).astype(jnp.uint8), jnp.isfinite(frames).all()
