"""The configuration of a training run as frozen dataclasses.

Files in ``configs/`` return an ``ml_collections.ConfigDict``, because its command-line flags
(``--config.optimizer.learning_rate=3e-4``) are convenient. :func:`run_config` turns it at once into
:class:`RunConfig`; nothing else in the library sees a ConfigDict. Unknown keys, wrong types and wrong values raise a
:class:`~helios_jax.errors.UserError` that names the key, the value received and what is allowed.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from helios_jax.errors import UserError
from helios_jax.sharding import MeshConfig

T = TypeVar("T")


def require(condition: bool, message: str) -> None:
    """Raises UserError(message) unless ``condition`` holds; for the checks in ``__post_init__``."""
    if not condition:
        raise UserError(message)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule; see :mod:`helios_jax.training.optim`.

    ``weight_decay_on``: 'matrices' decays only kernels, embeddings and LoRA factors; 'all' decays every trained
    parameter, as the original does. ``final_fraction`` is the learning rate at the end of the cosine, relative to
    the peak. ``clip_norm`` 0 switches clipping off.
    """

    USUAL_PLACE: ClassVar[str] = "optimizer"

    name: str = "adamw"
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int = 0
    final_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-4
    weight_decay_on: str = "matrices"
    clip_norm: float = 1.0
    muon_momentum: float = 0.95
    muon_newton_schulz_steps: int = 5

    def __post_init__(self):
        require(self.name in ("adamw", "muon"), f"optimizer.name: 'adamw' or 'muon', got {self.name!r}")
        require(self.schedule in ("cosine", "constant"),
                f"optimizer.schedule: 'cosine' or 'constant', got {self.schedule!r}")
        require(self.learning_rate > 0, f"optimizer.learning_rate: must be positive, got {self.learning_rate}")
        require(self.warmup_steps >= 0, f"optimizer.warmup_steps: must be 0 or more, got {self.warmup_steps}")
        require(0 <= self.final_fraction <= 1, f"optimizer.final_fraction: in [0, 1], got {self.final_fraction}")
        require(self.weight_decay_on in ("matrices", "all"),
                f"optimizer.weight_decay_on: 'matrices' or 'all', got {self.weight_decay_on!r}")
        for field in ("weight_decay", "clip_norm"):
            require(getattr(self, field) >= 0, f"optimizer.{field}: must be 0 or more, got {getattr(self, field)}")
        for field in ("b1", "b2", "muon_momentum"):
            require(0 <= getattr(self, field) < 1, f"optimizer.{field}: in [0, 1), got {getattr(self, field)}")
        require(self.muon_newton_schulz_steps > 0,
                f"optimizer.muon_newton_schulz_steps: must be positive, got {self.muon_newton_schulz_steps}")


# Fields that do not change what is computed, or by rounding only: a resumed run may have other values of these.
HARMLESS_ON_RESUME = ("log_every", "checkpoint_every", "keep_last", "keep_every", "sample_every", "tensorboard",
                      "mesh", "accumulate")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One training run.

    Attributes:
      objective: configuration of the objective (its class belongs to the objective's module).
      objective_name: a name of :data:`helios_jax.training.objective.OBJECTIVES` or an importable module.
      batch_size: samples of one step, over all devices and processes.
      accumulate: parts that a batch is computed in, one after the other; the gradient is their mean. It saves memory
        and costs time. Where the objective draws per sample, the result is that of the whole batch up to rounding.
      num_steps: optimizer steps of the whole run.
      log_every, checkpoint_every, sample_every: in steps; 0 switches samples off.
      keep_last, keep_every: the newest ``keep_last`` checkpoints stay, and besides them every checkpoint whose step is
        a multiple of ``keep_every`` (0: none).
      ema_decay: decay of the moving average, reached after a warm-up; 0 switches it off.
      ema_start_step: up to this step the average is a plain copy, and the warm-up begins there; 0: no plain copies.
      mesh: over how many devices what is divided; one device by default.
    """

    objective: Any
    objective_name: str
    seed: int = 0
    batch_size: int = 16
    num_steps: int = 1000
    log_every: int = 50
    checkpoint_every: int = 1000
    keep_last: int = 2
    keep_every: int = 0
    sample_every: int = 0
    ema_decay: float = 0.999
    ema_start_step: int = 0
    tensorboard: bool = True
    optimizer: OptimizerConfig = OptimizerConfig()
    accumulate: int = 1
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        for field in ("batch_size", "num_steps", "log_every", "checkpoint_every", "keep_last", "accumulate"):
            require(getattr(self, field) > 0, f"{field}: must be positive, got {getattr(self, field)}")
        for field in ("seed", "keep_every", "sample_every", "ema_start_step"):
            require(getattr(self, field) >= 0, f"{field}: must be 0 or more, got {getattr(self, field)}")
        require(self.seed < 2**32, f"seed: below 2^32, got {self.seed}")
        require(0 <= self.ema_decay < 1, f"ema_decay: in [0, 1), got {self.ema_decay}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; written beside the checkpoints to recognise a changed configuration."""
        return dataclasses.asdict(self)


def _describe(annotation: Any) -> str:
    return getattr(annotation, "__name__", None) or str(annotation)


def _convert(annotation: Any, value: Any, key: str) -> Any:
    """``value`` as ``annotation``: ints pass as floats, lists as tuples, mappings as dataclasses; else UserError."""
    origin = typing.get_origin(annotation)
    if annotation is Any:
        return value
    if dataclasses.is_dataclass(annotation):
        require(isinstance(value, Mapping), f"{key}: a group of keys expected, got {value!r}")
        return from_mapping(annotation, value, key)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in typing.get_args(annotation):
            return None
        inner = next(a for a in typing.get_args(annotation) if a is not type(None))
        return _convert(inner, value, key)
    if origin is tuple or annotation is tuple:
        require(isinstance(value, (list, tuple)), f"{key}: a list expected, got {value!r}")
        inner = typing.get_args(annotation)
        if inner and inner[-1] is not Ellipsis:
            require(len(value) == len(inner), f"{key}: {len(inner)} values expected, got {list(value)}")
        kinds = [inner[0] if inner[-1] is Ellipsis else inner[i] for i in range(len(value))] if inner else [Any] * len(
            value)
        return tuple(_convert(kind, v, f"{key}[{i}]") for i, (kind, v) in enumerate(zip(kinds, value, strict=True)))
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if annotation is float and isinstance(value, float):
        require(math.isfinite(value), f"{key}: a finite number expected, got {value!r}")
    # bool is a subclass of int: `batch_size = True` must not pass.
    if not isinstance(value, annotation) or (annotation is not bool and isinstance(value, bool)):
        raise UserError(f"{key}: {_describe(annotation)} expected, got {value!r}")
    return value


def from_mapping(cls: type[T], values: Mapping[str, Any], prefix: str = "config") -> T:
    """A frozen dataclass from a mapping with exactly its field names (missing ones take their defaults).

    Raises:
      UserError: an unknown key (with the nearest known one), a missing required key, a wrong type or value.
    """
    annotations = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(fields)}"
            raise UserError(f"{prefix}.{key}: unknown key; {hint}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        require(not required or name in values, f"{prefix}.{name}: required key is missing")
    converted = {key: _convert(annotations[key], value, f"{prefix}.{key}") for key, value in values.items()}
    try:
        return cls(**converted)
    except UserError as error:  # a kind of group that stands in several places names the usual one
        usual = getattr(cls, "USUAL_PLACE", None)
        if usual is None or not str(error).startswith(usual):
            raise
        raise UserError(prefix.removeprefix("config.") + str(error).removeprefix(usual)) from None


def run_config(values: Mapping[str, Any]) -> RunConfig:
    """The validated configuration from the ConfigDict (or any nested mapping) of a config file.

    The group ``objective`` holds ``name`` and the fields of that objective's own ``Config`` dataclass.

    Raises:
      UserError: see :func:`from_mapping`; also an unknown objective.
    """
    from helios_jax.training.objective import objective_module  # its module imports this one for `Config` classes

    values = values.to_dict() if hasattr(values, "to_dict") else dict(values)
    require(isinstance(values.get("objective"), Mapping) and "name" in values["objective"],
            "config.objective.name: required key is missing")
    objective_values = dict(values.pop("objective"))
    name = objective_values.pop("name")
    objective = from_mapping(objective_module(name).Config, objective_values, "config.objective")
    require("objective_name" not in values, "config.objective_name: unknown key; did you mean 'objective.name'?")
    return from_mapping(RunConfig, {**values, "objective": objective, "objective_name": name})
