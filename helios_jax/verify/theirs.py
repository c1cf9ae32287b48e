"""The side of PyTorch: diffusers and transformers, imported when a function runs.

Each function loads what it needs, computes small results in one or several precisions, and lets go of the rest. The
weights are the same in every precision: those that are kept in a half type are widened for float32 and float64, layer
by layer, just while a layer runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from helios_jax.config import read_json
from helios_jax.errors import UserError
from helios_jax.models.inputs import FrameIndices
from helios_jax.pipeline.request import DEFAULT_GUIDANCE
from helios_jax.text import MAX_TOKENS
from helios_jax.verify.inputs import Case, Settings
from helios_jax.verify.memory import kept_dtype

Rows = tuple[np.ndarray, np.ndarray]
Results = dict[str, np.ndarray]
ByPrecision = dict[str, Results]

NEEDS = "the comparison needs PyTorch and the original: pip install torch 'diffusers>=0.42' transformers accelerate"


def import_all() -> dict[str, str]:
    """Imports PyTorch and the original, quietly.

    Returns: their versions.
    Raises:
      UserError: one of them is missing or too old; the line says how to install them.
    """
    try:
        import accelerate
        import diffusers
        import torch
        import transformers

        pipelines = (diffusers.HeliosPipeline, diffusers.HeliosPyramidPipeline)
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed; {NEEDS}") from None
    except AttributeError:
        raise UserError(f"diffusers {diffusers.__version__} has no Helios pipelines; {NEEDS}") from None
    del pipelines
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return {module.__name__: module.__version__ for module in (torch, diffusers, transformers, accelerate)}


def token_ids(settings: Settings, texts: Sequence[str]) -> list[list[int]]:
    """Ids of the cleaned texts, without padding."""
    from diffusers.pipelines.helios.pipeline_helios import prompt_clean

    with _loading("tokenizer"):
        tokenizer = _tokenizer(settings)
        encoded = tokenizer([prompt_clean(text) for text in texts], padding="max_length", max_length=MAX_TOKENS,
                            truncation=True, add_special_tokens=True, return_attention_mask=True)
    return [[i for i, real in zip(ids, mask, strict=True) if real]
            for ids, mask in zip(encoded.input_ids, encoded.attention_mask, strict=True)]


def text_encoder(settings: Settings, prompts: Mapping[str, str], precisions: Sequence[str]) -> ByPrecision:
    """Embeddings [real rows, D] of prompts, from the pipeline's own ``encode_prompt``."""
    import diffusers
    import torch
    import transformers

    with _loading("text_encoder"):
        module = transformers.UMT5EncoderModel.from_pretrained(
            settings.against.root / "text_encoder", dtype=_kept(settings, "text_encoder"), use_safetensors=True,
            local_files_only=True).eval()
        pipeline = diffusers.HeliosPipeline(tokenizer=_tokenizer(settings), text_encoder=module, vae=None,
                                            scheduler=None, transformer=None)

    def run(precision: str) -> Results:
        rows, dtype = {}, getattr(torch, precision)
        for name, prompt in prompts.items():
            padded, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, dtype=dtype,
                                               max_sequence_length=MAX_TOKENS)
            embedding = _array(padded[0])  # [512, D]
            rows[name] = embedding[:1 + np.flatnonzero(np.any(embedding != 0, axis=1))[-1]]
        return rows

    return _in_every_precision(precisions, module, module.encoder.block, run)


def vae(settings: Settings, video: np.ndarray, latents: np.ndarray | None, precision: str) -> Results:
    """Posterior of a video [1, 33, H, W, 3], and frames of latents [1, 9, h, w, C] (None: of the posterior's mean)."""
    import torch

    dtype = getattr(torch, precision)
    module = _vae(settings).to(dtype)
    with torch.no_grad():
        posterior = module.encode(_to_torch(video).to(dtype)).latent_dist
        z = posterior.mean if latents is None else _to_torch(latents).to(dtype)
        decoded = module.decode(z, return_dict=False)[0]
    return {"encode: mean": _to_numpy(posterior.mean), "encode: log-variance": _to_numpy(posterior.logvar),
            "decode": _to_numpy(decoded)}


def transformer(settings: Settings, cases: Sequence[Case], case_rows: np.ndarray,
                sample_rows: Mapping[str, Rows] | None, precisions: Sequence[str]) -> ByPrecision:
    """Forward passes, history tokens and, with ``sample_rows``, a short sample; the model is loaded once.

    Args:
      cases: may be empty.
      case_rows: prompt embedding of the cases, [rows, D].
      sample_rows: embeddings of prompt and negative prompt for every precision, or None for no sample.
      precisions: 'bfloat16', 'float32', 'float64', in this order.
    """
    import diffusers

    with _loading("transformer"):
        module = diffusers.HeliosTransformer3DModel.from_pretrained(
            settings.against.root / "transformer", torch_dtype=_kept(settings, "transformer"), use_safetensors=True,
            local_files_only=True, low_cpu_mem_usage=True)
    decoder = None if sample_rows is None else _vae(settings)

    def run(precision: str) -> Results:
        results = _forward(module, precision, cases, case_rows) if cases else {}
        if sample_rows is not None:
            if precision == "float64":
                decoder.double()
            results |= _sample(settings, module, decoder, precision, sample_rows[precision])
        return results

    return _in_every_precision(precisions, module, module.blocks, run)


def _forward(module: Any, precision: str, cases: Sequence[Case], rows: np.ndarray) -> Results:
    import torch

    dtype = getattr(torch, precision)
    line = FrameIndices.for_history()
    tokens: Results = {}

    def record(name: str) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:  # [1, C, t, y, x] -> [1, S, C]
            tokens.setdefault(f"history tokens, {name}", _array(output.flatten(2).transpose(1, 2)))
        return hook

    results: Results = {}
    with contextlib.ExitStack() as stack:
        if cases[0].history is not None:
            for name in ("long", "mid", "short"):
                handle = getattr(module, f"patch_{name}").register_forward_hook(record(name))
                stack.callback(handle.remove)
        for case in cases:
            inputs = {"hidden_states": _to_torch(case.latents).to(dtype),
                      "encoder_hidden_states": _padded(rows, dtype),
                      "timestep": torch.tensor([case.timestep], dtype=torch.float32)}
            if case.history is not None:
                inputs["indices_hidden_states"] = torch.tensor([line.current])
                for name in ("short", "mid", "long"):
                    inputs[f"latents_history_{name}"] = _to_torch(getattr(case.history, name)).to(dtype)
                    inputs[f"indices_latents_history_{name}"] = torch.tensor([getattr(line, name)])
            results[case.name] = _to_numpy(module(**inputs, return_dict=False)[0])
            if case is cases[0]:
                results |= tokens
    return results


def _sample(settings: Settings, module: Any, decoder: Any, precision: str, rows: Rows) -> Results:
    """The original's pipeline on given embeddings; its frames are noted down where it decodes them."""
    import diffusers
    import torch

    index = settings.against.index
    with _loading("scheduler"):
        scheduler = getattr(diffusers, index.scheduler_class).from_pretrained(settings.against.root / "scheduler")
    parts = dict(tokenizer=None, text_encoder=None, vae=decoder, transformer=module, scheduler=scheduler)
    dtype = getattr(torch, precision)
    prompt, negative = (_padded(part, dtype) for part in rows)
    call = dict(prompt_embeds=prompt, negative_prompt_embeds=negative, height=settings.size.height,
                width=settings.size.width, num_frames=settings.frames, guidance_scale=DEFAULT_GUIDANCE[index.variant],
                generator=torch.Generator().manual_seed(settings.seed), output_type="latent")
    if index.variant == "base":
        pipeline = diffusers.HeliosPipeline(**parts)
        call["num_inference_steps"] = settings.steps[0]
    else:
        pipeline = diffusers.HeliosPyramidPipeline(**parts, is_cfg_zero_star=index.is_cfg_zero_star,
                                                   is_distilled=index.is_distilled)
        pipeline.sample_block_noise = _block_noise(scheduler.config.gamma)
        call |= dict(pyramid_num_inference_steps_list=list(settings.steps), is_amplify_first_chunk=index.is_distilled)
    pipeline.set_progress_bar_config(disable=True)

    frames: list[np.ndarray] = []

    def decode(*args: Any, **kwargs: Any) -> Any:
        output = type(decoder).decode(decoder, *args, **kwargs)
        frames.append(np.clip(_to_numpy(output[0]) / 2 + 0.5, 0, 1))
        return output

    decoder.decode = decode
    # The pyramid pipeline views the output as rows, which PyTorch refuses where a stage is a single patch in size.
    contiguous = module.register_forward_hook(lambda _module, _inputs, output: tuple(x.contiguous() for x in output))
    try:
        latents = pipeline(**call).frames
    finally:
        del decoder.decode
        contiguous.remove()
    return {"latents": _to_numpy(latents), "frames": np.concatenate(frames, axis=1)[:, :settings.frames]}


def _block_noise(gamma: float) -> Callable[..., Any]:
    """The pipeline's ``sample_block_noise`` with its covariance factorised in float64.

    For the published gamma of 1/3 the covariance is singular in float32, and the original fails on a CPU.
    """
    import torch

    def sample(batch_size: int, channel: int, num_frames: int, height: int, width: int,
               patch_size: Sequence[int] = (1, 2, 2), device: Any = None, generator: Any = None) -> Any:
        size = patch_size[1] * patch_size[2]
        eye = torch.eye(size, dtype=torch.float64)
        factor = torch.linalg.cholesky(eye * (1 + gamma) - gamma + 1e-8 * eye).float()
        rows, columns = height // patch_size[1], width // patch_size[2]
        z = torch.randn(batch_size * channel * num_frames * rows * columns, size, generator=generator)
        noise = (z @ factor.T).view(batch_size, channel, num_frames, rows, columns, *patch_size[1:])
        return noise.permute(0, 1, 2, 3, 5, 4, 6).reshape(batch_size, channel, num_frames, height, width)

    return sample


# --- Loading and precision --------------------------------------------------------------------------------------------


def _tokenizer(settings: Settings) -> Any:
    """Through the class that the checkpoint names, as ``DiffusionPipeline.from_pretrained`` does."""
    import transformers

    named = read_json(settings.against.root / "model_index.json").get("tokenizer", ())
    tokenizer_class = getattr(transformers, str(named[1]) if len(named) == 2 else "AutoTokenizer",
                              transformers.AutoTokenizer)
    return tokenizer_class.from_pretrained(settings.against.tokenizer, local_files_only=True)


def _vae(settings: Settings) -> Any:
    import diffusers
    import torch

    with _loading("vae"):
        return diffusers.AutoencoderKLWan.from_pretrained(
            settings.against.root / "vae", torch_dtype=torch.float32, use_safetensors=True, local_files_only=True,
            low_cpu_mem_usage=True)


def _kept(settings: Settings, component: str) -> Any:
    import torch

    return getattr(torch, kept_dtype(settings.against, component, settings.dtype))


@contextlib.contextmanager
def _loading(what: str) -> Iterator[None]:
    """Errors of the original's loaders as one line."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        lines = str(error).strip().splitlines() or [""]
        raise UserError(f"PyTorch cannot load the {what}: {type(error).__name__}: {lines[0][:300]}") from None


def _in_every_precision(precisions: Sequence[str], module: Any, layers: Any, run: Callable[[str], Results]
                        ) -> ByPrecision:
    """Runs in the half type first: widening the module cannot be undone."""
    import torch

    results = {}
    with torch.no_grad():
        for precision in precisions:
            if precision in ("float32", "float64"):
                compute_in(getattr(torch, precision), module, layers)
            results[precision] = run(precision)
    return results


def compute_in(dtype: Any, module: Any, layers: Any) -> None:
    """Makes a module compute in a wider type than its weights have, without a wide copy of all of them.

    Args:
      dtype: the wider type.
      module: is changed in place.
      layers: its list of layers, nearly all of its parameters. A layer's are widened while it runs; what lies outside
        is widened for good, but for embedding tables, whose rows are widened when read.
    """
    import torch

    in_layers = {id(parameter) for parameter in layers.parameters()}
    for part in module.modules():
        if isinstance(part, torch.nn.Embedding) and id(part.weight) not in in_layers:
            part.register_forward_hook(lambda _module, _inputs, rows: rows.to(dtype))
            continue
        for parameter in part.parameters(recurse=False):
            if id(parameter) not in in_layers:
                parameter.data = parameter.data.to(dtype)
    for layer in layers:
        stored: list[tuple[Any, Any]] = []

        def widen(layer: Any, _inputs: Any, stored: list[tuple[Any, Any]] = stored) -> None:
            for parameter in layer.parameters():
                stored.append((parameter, parameter.data))
                parameter.data = parameter.data.to(dtype)

        def restore(_layer: Any, _inputs: Any, _output: Any, stored: list[tuple[Any, Any]] = stored) -> None:
            while stored:
                parameter, data = stored.pop()
                parameter.data = data

        layer.register_forward_pre_hook(widen)
        layer.register_forward_hook(restore)


# --- Arrays -----------------------------------------------------------------------------------------------------------


def _to_torch(array: np.ndarray) -> Any:
    """[B, T, h, w, C] -> [B, C, T, h, w]."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1)))


def _array(tensor: Any) -> np.ndarray:
    """float32, or float64 of float64."""
    import torch

    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)).numpy()


def _to_numpy(tensor: Any) -> np.ndarray:
    """[B, C, T, h, w] -> [B, T, h, w, C]."""
    return np.moveaxis(_array(tensor), 1, -1)


def _padded(rows: np.ndarray, dtype: Any) -> Any:
    """[rows, D] -> [1, 512, D], zeros behind the real rows."""
    import torch

    return torch.from_numpy(np.pad(rows, ((0, MAX_TOKENS - len(rows)), (0, 0)))[None]).to(dtype)
