"""Writing model folders: the published diffusers layout, or the same folder with Orbax parameters.

A folder appears under its name only when it is complete: it is built beside it under a temporary name and renamed.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from helios_jax.config import ModelIndex, SchedulerConfig, read_json
from helios_jax.convert.folder import (
    ORBAX_FOLDER,
    PRECISION_FILE,
    WEIGHT_STEMS,
    ModelFolder,
    read_model_folder,
    write_json,
)
from helios_jax.convert.rules import CONFIG_CLASSES, Config, leaves, tensor_rules
from helios_jax.convert.safetensors_io import SafetensorsWriter
from helios_jax.convert.sources import LeafSource, QuantisedSource, SafetensorsSource, TreeSource
from helios_jax.convert.wan import transformer_config_from_wan
from helios_jax.errors import UserError
from helios_jax.models.streaming import STACKS

FORMATS = ("orbax", "diffusers")
# The shard size of diffusers' save_pretrained.
MAX_SHARD_BYTES = 10_000_000_000


def export_pipeline(out: str | Path, params: Mapping[str, Mapping[str, Any]], configs: Mapping[str, Config], *,
                    index: ModelIndex, scheduler: SchedulerConfig, tokenizer: str | Path | None = None,
                    format: str = "diffusers", dtype: Any = None, max_shard_bytes: int = MAX_SHARD_BYTES,
                    overwrite: bool = False) -> None:
    """Writes parameters in memory as a model folder that diffusers loads and samples from.

    Args:
      out: the folder to create.
      params: component -> parameter tree; a component that is absent gets no folder.
      configs: component -> configuration.
      index: pipeline class and flags, for ``model_index.json``.
      scheduler: for ``scheduler_config.json``.
      tokenizer: folder to copy, None writes none.
      format: 'diffusers' (safetensors) or 'orbax'.
      dtype: the dtype the components will compute in; None keeps the dtype of every array.
      max_shard_bytes: files are split so that none is larger (a single larger tensor gets its own file).
      overwrite: replace an existing model folder.

    Raises:
      UserError: the parameters do not fit their configurations, ``out`` exists and is not empty, or cannot be written.
    """
    sources = {c: TreeSource(c, configs[c], tree, dtype) for c, tree in params.items()}
    _write_folder(Path(out), format, sources, {c: config_json(c, configs[c]) for c in sources}, index.to_dict(),
                  scheduler_json(scheduler), tokenizer, max_shard_bytes, overwrite)


def convert_model(model: Path, out: str | Path, format: str = "orbax", dtype: Any = None,
                  max_shard_bytes: int = MAX_SHARD_BYTES, overwrite: bool = False, from_wan: bool = False,
                  report: Callable[[str], None] = lambda line: None, precision: str = "none") -> None:
    """Converts a model folder, a block of a parameter at a time.

    Args:
      model: a published or an Orbax model folder.
      out: the folder to create.
      format: 'orbax' or 'diffusers'.
      dtype: the dtype the components will compute in; None keeps the stored dtypes, so that a round trip is exact.
      max_shard_bytes, overwrite: see :func:`export_pipeline`.
      from_wan: ``model`` is a Wan 2.1 text-to-video model; ``out`` becomes a Helios-Base model to be trained, with
        history patches made from the patch embedding.
      report: receives one line per component.
      precision: a mode of ``helios_jax.models.quantize``, into which kernels are quantised; only to 'orbax'.

    Raises:
      UserError: see :func:`export_pipeline` and :func:`~helios_jax.convert.load.load_component`.
    """
    model, out = Path(model), Path(out)
    if out.resolve() == model.resolve() or out.resolve() in model.resolve().parents:
        raise UserError(f"{out}: would replace the model that is converted; choose another folder")
    folder = _wan_folder(model) if from_wan else read_model_folder(model)
    for component in STACKS:
        if (stored := folder.precision(component)) != "none":
            raise UserError(f"{model}: its {component} is stored in {stored}, which cannot be converted; convert the "
                            "original model")
    if precision != "none" and format != "orbax":
        raise UserError(f"precision: {precision} can only be written with format 'orbax', got {format!r}")
    with contextlib.ExitStack() as stack:
        sources: dict[str, LeafSource] = {}
        for component in CONFIG_CLASSES:
            part, config = model / component, folder.config(component)
            if (part / ORBAX_FOLDER).is_dir():
                from helios_jax.convert.orbax_io import OrbaxSource

                sources[component] = OrbaxSource(part / ORBAX_FOLDER, component, config, dtype)
            else:
                sources[component] = stack.enter_context(SafetensorsSource(
                    part, component, config, dtype, from_wan=from_wan and component == "transformer"))
            if precision != "none" and component in STACKS:
                sources[component] = QuantisedSource(sources[component], precision)
        if from_wan:
            configs = {"transformer": config_json("transformer", folder.transformer)}
            index, scheduler = folder.index.to_dict(), scheduler_json(folder.scheduler)
        else:
            configs, index = {}, read_json(model / "model_index.json")
            scheduler = read_json(model / "scheduler" / "scheduler_config.json")
        configs = {c: read_json(model / c / "config.json") for c in sources} | configs
        if configs["transformer"].get("added_kv_proj_dim") is not None:
            configs["transformer"]["added_kv_proj_dim"] = None  # its unused projections were left out
        _write_folder(out, format, sources, configs, index, scheduler, folder.tokenizer, max_shard_bytes, overwrite,
                      report)


def _wan_folder(model: Path) -> ModelFolder:
    """The configurations under which a Wan 2.1 model becomes Helios-Base."""
    read = {c: CONFIG_CLASSES[c].from_file(model / c / "config.json") for c in ("vae", "text_encoder")}
    transformer = transformer_config_from_wan(read_json(model / "transformer" / "config.json"))
    return ModelFolder(
        root=model, format="diffusers", index=ModelIndex(), transformer=transformer,
        # The one-stage schedule of Base with the dynamic shift of its training settings.
        scheduler=SchedulerConfig(stages=1, use_dynamic_shifting=True, time_shift_type="exponential"), **read)


def config_json(component: str, config: Config) -> dict[str, Any]:
    """``config.json`` of a component as diffusers and transformers read it."""
    if component == "text_encoder":
        return {"architectures": ["UMT5EncoderModel"], "model_type": "umt5", "is_encoder_decoder": True,
                "dense_act_fn": "gelu_new", "is_gated_act": True, "pad_token_id": 0, "eos_token_id": 1,
                "decoder_start_token_id": 0, "dropout_rate": 0.1, "tokenizer_class": "T5Tokenizer"} | config.to_dict()
    name = {"transformer": "HeliosTransformer3DModel", "vae": "AutoencoderKLWan"}[component]
    values = {"_class_name": name, "_diffusers_version": "0.42.1"} | config.to_dict()
    if component == "transformer":
        values["added_kv_proj_dim"] = None  # its projections are never used and no parameters of ours
        if not values["restrict_self_attn"]:  # which diffusers does not know
            del values["restrict_self_attn"]
    return values


def scheduler_json(config: SchedulerConfig) -> dict[str, Any]:
    """``scheduler_config.json`` with the fields that the scheduler's class knows."""
    values = config.to_dict()
    del values["class_name"]
    if config.is_dmd:
        for field in ("scheduler_type", "solver_order", "solver_type", "predict_x0", "lower_order_final",
                      "disable_corrector", "thresholding"):
            del values[field]
    defaults = SchedulerConfig()
    for field in ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift"):  # read by the pipelines only
        if values[field] == getattr(defaults, field):
            del values[field]
    return {"_class_name": config.class_name, "_diffusers_version": "0.42.1"} | values


def _write_folder(out: Path, format: str, sources: Mapping[str, LeafSource], configs: Mapping[str, dict],
                  index: dict, scheduler: dict, tokenizer: str | Path | None, max_shard_bytes: int, overwrite: bool,
                  report: Callable[[str], None] = lambda line: None) -> None:
    if format not in FORMATS:
        raise UserError(f"format: one of {', '.join(FORMATS)}, got {format!r}")
    if tokenizer is not None and not Path(tokenizer).is_dir():
        raise UserError(f"{tokenizer}: no such folder (the tokenizer)")
    sizes = {c: sum(math.prod(leaf.shape) * s.dtype(leaf).itemsize for leaf in leaves(c, s.config, s.precision))
             for c, s in sources.items()}
    with atomic_folder(out, overwrite) as building:
        # Orbax compresses; half the size is the least it can be expected to need.
        needed = sum(sizes.values()) // (2 if format == "orbax" else 1)
        free = shutil.disk_usage(building).free
        if needed > free:
            raise UserError(f"{out}: needs {readable_bytes(needed)}, the disk has {readable_bytes(free)} left")
        write_json(building / "model_index.json", index)
        write_json(building / "scheduler" / "scheduler_config.json", scheduler)
        if tokenizer is not None:
            shutil.copytree(tokenizer, building / "tokenizer")
        for component, source in sources.items():
            tensors = len(tensor_rules(component, source.config))
            report(f"{component}: {tensors} tensors, {readable_bytes(sizes[component])}")
            folder = building / component
            write_json(folder / "config.json", configs[component])
            if source.precision != "none":
                write_json(folder / PRECISION_FILE, {"precision": source.precision})
            if format == "orbax":
                from helios_jax.convert.orbax_io import save_leaves

                save_leaves(folder / ORBAX_FOLDER, source)
            else:
                write_safetensors_component(folder, source, max_shard_bytes)


def readable_bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def write_safetensors_component(folder: Path, source: LeafSource, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Writes the weight files of one component, and their index if there are several.

    Shards are filled in the order of the PyTorch module, each up to ``max_shard_bytes``.
    """
    if max_shard_bytes <= 0:
        raise UserError(f"max_shard_bytes: must be positive, got {max_shard_bytes}")
    dtypes = {rule.name: source.dtype(leaf) for leaf in leaves(source.component, source.config)
              for rule in leaf.tensors}
    shards: list[dict[str, tuple[np.dtype, tuple[int, ...]]]] = [{}]
    filled = total = 0
    for rule in tensor_rules(source.component, source.config):
        size = math.prod(rule.shape) * dtypes[rule.name].itemsize
        if filled and filled + size > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][rule.name] = (dtypes[rule.name], rule.shape)
        filled += size
        total += size
    stem = WEIGHT_STEMS[source.component]
    names = [f"{stem}.safetensors"] if len(shards) == 1 else [
        f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    folder.mkdir(parents=True, exist_ok=True)
    writers = [SafetensorsWriter(folder / name, shard) for name, shard in zip(names, shards, strict=True)]
    writer_of = {tensor: writer for shard, writer in zip(shards, writers, strict=True) for tensor in shard}
    try:
        for leaf in leaves(source.component, source.config):
            for block_index, block in source.blocks(leaf):
                first = block_index[0].start
                if leaf.stacked:
                    rule, tensor, row = leaf.tensors[first], block[0], 0
                else:
                    rule, tensor, row = leaf.tensors[0], block, first
                shape = rule.shape if block.shape == leaf.shape or leaf.stacked else block.shape
                writer_of[rule.name].write(rule.name, rule.layout.to_torch(tensor, shape), row)
        for writer in writers:
            writer.close()
    except BaseException:
        for writer in writers:
            writer.abort()
        raise
    if len(shards) > 1:
        write_json(folder / f"{stem}.safetensors.index.json", {
            "metadata": {"total_size": total},
            "weight_map": {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}})


@contextlib.contextmanager
def atomic_folder(out: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to build in, which becomes ``out`` when the body succeeds and vanishes when it fails.

    An existing ``out`` that is not empty is replaced only with ``overwrite``, and only if it is a model folder (so
    that a mistyped path costs nothing); it stays in place until the new one is complete.

    Raises:
      UserError: ``out`` exists, cannot be written, or the disk is full.
    """
    out = Path(out).absolute()
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: exists and is not a folder")
    occupied = out.is_dir() and any(out.iterdir())
    if occupied and not overwrite:
        raise UserError(f"{out}: exists and is not empty; choose another folder or pass --overwrite")
    if occupied and not (out / "model_index.json").is_file():
        raise UserError(f"{out}: is not empty and holds no model, so it is not overwritten")
    building: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".incomplete", dir=out.parent))
        # mkdtemp makes private folders; the result gets the permissions a plain mkdir would give.
        umask = os.umask(0)
        os.umask(umask)
        building.chmod(0o777 & ~umask)
        yield building
        if occupied:
            old = building.with_suffix(".replaced")
            out.rename(old)
            building.rename(out)
            shutil.rmtree(old)
        else:
            if out.is_dir():
                out.rmdir()
            building.rename(out)
    except BaseException as error:
        if building is not None:
            shutil.rmtree(building, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"{out}: cannot be written ({error.strerror or error})") from error
        raise
