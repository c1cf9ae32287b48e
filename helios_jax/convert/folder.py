"""The published folder layout: finding a model, its configurations, and the weight files of a component."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

from helios_jax.config import (
    ModelIndex,
    SchedulerConfig,
    TextEncoderConfig,
    TransformerConfig,
    VAEConfig,
    read_json,
)
from helios_jax.convert.rules import COMPONENTS, CONFIG_CLASSES, Config, listing
from helios_jax.convert.safetensors_io import SafetensorsFile, TensorEntry
from helios_jax.errors import UserError
from helios_jax.models.quantize import PRECISIONS

# Component -> stem of its weight files in the published layout.
WEIGHT_STEMS = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
# Folder of a component's Orbax checkpoint, beside its config.json.
ORBAX_FOLDER = "params"
# Beside it where the kernels are quantised: the precision's name.
PRECISION_FILE = "precision.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
# What sampling reads; sibling folders such as transformer_init stay on the hub.
_HUB_PATTERNS = ["model_index.json", "tokenizer/*", "scheduler/*", *(f"{c}/*.json" for c in COMPONENTS),
                 *(f"{c}/*.safetensors" for c in COMPONENTS)]


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """A model on disk: the configurations of all components and where the rest lies.

    Attributes:
      root: the folder.
      format: 'diffusers' (published safetensors layout) or 'orbax' (written by this project).
      index: pipeline class and flags.
      transformer, vae, text_encoder, scheduler: configurations.
    """

    root: Path
    format: str
    index: ModelIndex
    transformer: TransformerConfig
    vae: VAEConfig
    text_encoder: TextEncoderConfig
    scheduler: SchedulerConfig

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer"

    def config(self, component: str) -> Config:
        return getattr(self, component)

    def precision(self, component: str) -> str:
        """In which a component's kernels are stored."""
        return stored_precision(self.root / component)


def resolve_model(model: str | Path, revision: str | None = None) -> Path:
    """The local folder of a model.

    Args:
      model: an existing folder, or the id of a model on the Hugging Face hub ('owner/name').
      revision: branch, tag or commit on the hub.

    Returns: the folder; a hub model is downloaded to (or found in) the hub's cache.

    Raises:
      UserError: neither, or the download failed.
    """
    path = Path(model)
    if path.is_dir():
        if revision is not None:
            raise UserError(f"revision: goes with a hub id, got {revision!r} for the folder {path}")
        return path
    if path.exists():
        hint = " (pickle files are refused)" if path.suffix in _PICKLES else ""
        raise UserError(f"model {str(model)!r}: is a file; the folder that holds model_index.json is expected{hint}")
    if not _HUB_ID.match(str(model)):
        raise UserError(f"model {str(model)!r}: no such folder, and not a hub id of the form owner/name")
    return download(str(model), _HUB_PATTERNS, revision)


def download(hub_id: str, patterns: list[str], revision: str | None = None) -> Path:
    """Downloads files of a hub repository to the cache.

    Raises:
      UserError: one line for whatever kept the download from succeeding.
    """
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client's errors share no base class across its versions
        cause = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        raise UserError(f"model {hub_id!r}: no such folder, and the hub download failed ({cause[:300]})") from None


def read_model_folder(root: str | Path) -> ModelFolder:
    """Reads the configurations of a model folder, published or Orbax.

    Raises:
      UserError: a file is missing or its values are not supported; the line names the file.
    """
    root = Path(root)
    if not (root / "model_index.json").is_file():
        if not root.is_dir():
            raise UserError(f"{root}: no such folder")
        raise UserError(f"{root}: holds no model_index.json, so it is not the folder of a model")
    name = read_json(root / "model_index.json").get("_class_name")
    if isinstance(name, str) and name.startswith("Wan"):
        raise UserError(f"{root}: is a Wan model ({name!r}); make a Helios model of it with "
                        "python -m helios_jax.convert --from-wan")
    index = read_index(root)
    configs = {c: _read(cls.from_dict, root / c / "config.json") for c, cls in CONFIG_CLASSES.items()}
    scheduler = _read(lambda values: SchedulerConfig.from_dict(values | {"class_name": index.scheduler_class}),
                      root / "scheduler" / "scheduler_config.json")
    kind = "orbax" if (root / "transformer" / ORBAX_FOLDER).is_dir() else "diffusers"
    return ModelFolder(root=root, format=kind, index=index, scheduler=scheduler, **configs)


def read_index(root: str | Path) -> ModelIndex:
    """What ``model_index.json`` says.

    Raises:
      UserError: the file is missing or its values are not supported.
    """
    return _read(ModelIndex.from_dict, Path(root) / "model_index.json")


def read_component_config(folder: str | Path, component: str) -> Config:
    """The configuration in a component's folder.

    Raises:
      UserError: the file is missing or its values are not supported.
    """
    if component not in CONFIG_CLASSES:
        raise UserError(f"component: one of {', '.join(COMPONENTS)}, got {component!r}")
    return _read(CONFIG_CLASSES[component].from_dict, Path(folder) / "config.json")


def stored_precision(folder: str | Path) -> str:
    """The precision of the kernels in a component's folder, 'none' where they are plain.

    Raises:
      UserError: its file names none that there is.
    """
    path = Path(folder) / PRECISION_FILE
    if not path.is_file():
        return "none"
    precision = read_json(path).get("precision")
    if precision not in PRECISIONS:
        raise UserError(f"{path}: precision: one of {', '.join(PRECISIONS)}, got {precision!r}")
    return precision


def _read(parse, path: Path):
    values = read_json(path)
    try:
        return parse(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: a value has the wrong type ({error})") from None


class CheckpointFiles:
    """The safetensors files of one component, opened and checked against their index.

    Attributes:
      folder: where they lie.
      entries: tensor name -> where it lies (shape, dtype, offset).

    Raises:
      UserError: no weights, only pickles, a damaged file, or an index that does not agree with the files.
    """

    def __init__(self, folder: str | Path, component: str):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: no such folder")
        self._files: list[SafetensorsFile] = []
        self._file_of: dict[str, SafetensorsFile] = {}
        try:
            self._open(WEIGHT_STEMS[component])
        except BaseException:
            self.close()
            raise

    def _open(self, stem: str) -> None:
        index = self._find_index(stem)
        weight_map = None if index is None else _read_weight_map(index)
        if weight_map is None:
            names = self._unindexed_files(stem)
        else:
            names = sorted(set(weight_map.values()))
            absent = [name for name in names if not (self.folder / name).is_file()]
            if absent:
                raise UserError(f"{index}: names shards that are not there: {listing('missing', absent)}")
        for name in names:
            file = SafetensorsFile(self.folder / name)
            self._files.append(file)
            for tensor in file.entries:
                if tensor in self._file_of:
                    raise UserError(f"{self.folder}: tensor {tensor!r} is in both {self._file_of[tensor].path.name} "
                                    f"and {name}; keep one set of weight files")
                self._file_of[tensor] = file
        if weight_map is not None:
            wrong = [f"{t} (in {s})" for t, s in weight_map.items()
                     if t not in self._file_of or self._file_of[t].path.name != s]
            unlisted = [t for t in self._file_of if t not in weight_map]
            problems = [listing(kind, names) for kind, names in
                        (("not where it says", wrong), ("not listed in it", unlisted)) if names]
            if problems:
                raise UserError(f"{index}: does not agree with its shards: {'; '.join(problems)}")

    def _find_index(self, stem: str) -> Path | None:
        standard = self.folder / f"{stem}.safetensors.index.json"
        if standard.is_file():
            return standard
        if (self.folder / f"{stem}.safetensors").is_file():
            return None
        others = sorted(self.folder.glob("*.safetensors.index*.json"))
        if len(others) > 1:
            raise UserError(f"{self.folder}: several weight indices ({', '.join(p.name for p in others)}); keep one")
        return others[0] if others else None

    def _unindexed_files(self, stem: str) -> list[str]:
        if (self.folder / f"{stem}.safetensors").is_file():
            return [f"{stem}.safetensors"]
        names = sorted(p.name for p in self.folder.glob("*.safetensors"))
        if names:
            return names
        pickles = sorted(p.name for p in self.folder.iterdir() if p.suffix in _PICKLES)
        if pickles:
            raise UserError(refuse_pickles(self.folder, pickles))
        raise UserError(f"{self.folder}: holds no *.safetensors weights")

    @property
    def entries(self) -> dict[str, TensorEntry]:
        return {name: file.entries[name] for name, file in self._file_of.items()}

    def read(self, name: str, rows: slice | None = None):
        """One tensor, or rows of it; see :meth:`SafetensorsFile.read`."""
        return self._file_of[name].read(name, rows)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> CheckpointFiles:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def refuse_pickles(folder: Path, names: list[str]) -> str:
    """The error for weights that are only there as pickle files."""
    return (f"{folder}: only pickle weights ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}), which can run "
            "code when read and are refused; convert them where PyTorch is installed and the file is trusted: load "
            "the model with from_pretrained(..., use_safetensors=False) and call "
            "save_pretrained(folder, safe_serialization=True)")


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError(f"{index}: holds no 'weight_map' from tensor names to shard files")
    outside = [v for v in weight_map.values() if os.path.basename(v) != v]
    if outside:
        raise UserError(f"{index}: shard names must be plain file names, got {outside[0]!r}")
    return weight_map


def write_json(path: Path, values: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
