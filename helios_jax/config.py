"""The configuration of every component, as frozen dataclasses that read the published JSON files.

Field names are those of the published files (spelling mistakes included), so a file maps to a dataclass without a
table. Unknown keys and keys that begin with an underscore are ignored, as the reference does. Every class validates
its fields and names the field and the value in the error.

Sources: diffusers ``HeliosTransformer3DModel``, ``AutoencoderKLWan``, ``HeliosScheduler``, ``HeliosDMDScheduler``;
transformers ``UMT5Config``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from helios_jax.errors import UserError

T = TypeVar("T")

# Wan 2.1 VAE statistics of the 16 latent channels, used where a file does not state its own.
WAN_LATENTS_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
WAN_LATENTS_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
                   3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _tuples(value: Any) -> Any:
    """Lists become tuples, so that a configuration is hashable and can be a static argument of ``jax.jit``."""
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


class _FromJson:
    """Reading and writing the published JSON layout."""

    @classmethod
    def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
        names = {f.name for f in dataclasses.fields(cls)}
        return cls(**{k: _tuples(v) for k, v in values.items() if k in names and not k.startswith("_")})

    @classmethod
    def from_file(cls: type[T], path: str | Path) -> T:
        return cls.from_dict(read_json(path))

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))


def read_json(path: str | Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      UserError: the file is missing, unreadable, not JSON, or not an object.
    """
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    _require(isinstance(values, dict), f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


@dataclasses.dataclass(frozen=True)
class TransformerConfig(_FromJson):
    """``transformer/config.json``; the defaults are the 14B model.

    ``restrict_self_attn``: history tokens attend to history tokens only, so that sampling computes their keys and
    values once per chunk. Only for a model that was trained so; diffusers does not know the option and would sample
    such a model wrongly.
    """

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    qk_norm: str = "rms_norm_across_heads"
    eps: float = 1e-6
    added_kv_proj_dim: int | None = None
    rope_dim: tuple[int, int, int] = (44, 42, 42)
    rope_theta: float = 10000.0
    guidance_cross_attn: bool = True
    zero_history_timestep: bool = True
    has_multi_term_memory_patch: bool = True
    is_amplify_history: bool = False
    history_scale_mode: str = "per_head"
    restrict_self_attn: bool = False

    def __post_init__(self):
        _require(self.patch_size == (1, 2, 2), f"patch_size: only [1, 2, 2] is supported, got {list(self.patch_size)}")
        for name in ("num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim",
                     "ffn_dim", "num_layers"):
            _require(getattr(self, name) > 0, f"{name}: must be positive, got {getattr(self, name)}")
        _require(self.freq_dim > 0 and self.freq_dim % 2 == 0, f"freq_dim: must be even, got {self.freq_dim}")
        _require(all(d % 2 == 0 for d in self.rope_dim) and sum(self.rope_dim) == self.attention_head_dim,
                 f"rope_dim: three even numbers whose sum is attention_head_dim={self.attention_head_dim}, "
                 f"got {list(self.rope_dim)}")
        _require(self.history_scale_mode in ("per_head", "scalar"),
                 f"history_scale_mode: 'per_head' or 'scalar', got {self.history_scale_mode!r}")
        _require(not self.restrict_self_attn or (self.zero_history_timestep and self.guidance_cross_attn),
                 "restrict_self_attn: needs zero_history_timestep and guidance_cross_attn, got "
                 f"{self.zero_history_timestep} and {self.guidance_cross_attn}")

    @property
    def dim(self) -> int:
        """Model width C = heads x head size."""
        return self.num_attention_heads * self.attention_head_dim


@dataclasses.dataclass(frozen=True)
class VAEConfig(_FromJson):
    """``vae/config.json``; the defaults are the Wan 2.1 VAE."""

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    dropout: float = 0.0
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int = 4
    scale_factor_spatial: int = 8
    latents_mean: tuple[float, ...] = WAN_LATENTS_MEAN
    latents_std: tuple[float, ...] = WAN_LATENTS_STD

    def __post_init__(self):
        _require(not self.is_residual and self.patch_size is None,
                 "vae: is_residual and patch_size belong to the Wan 2.2 VAE, which Helios does not use")
        _require(not self.attn_scales, f"attn_scales: must be empty, got {list(self.attn_scales)}")
        _require(len(self.temperal_downsample) == len(self.dim_mult) - 1,
                 f"temperal_downsample: {len(self.dim_mult) - 1} entries expected, got {len(self.temperal_downsample)}")
        for name in ("latents_mean", "latents_std"):
            _require(len(getattr(self, name)) == self.z_dim,
                     f"{name}: z_dim={self.z_dim} entries expected, got {len(getattr(self, name))}")


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig(_FromJson):
    """``text_encoder/config.json``; the defaults are google/umt5-xxl.

    ``tie_word_embeddings`` is ignored on purpose: the encoder embedding is always ``shared.weight``.
    """

    vocab_size: int = 256384
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"

    def __post_init__(self):
        _require(self.feed_forward_proj == "gated-gelu",
                 f"feed_forward_proj: only 'gated-gelu' is supported, got {self.feed_forward_proj!r}")


SCHEDULER_CLASSES = ("HeliosScheduler", "HeliosDMDScheduler")


@dataclasses.dataclass(frozen=True)
class SchedulerConfig(_FromJson):
    """``scheduler/scheduler_config.json`` of either scheduler class, chosen by ``class_name``.

    Read it with :meth:`from_dict` and the class name of ``model_index.json``; the default of ``time_shift_type``
    differs between the classes (exponential for HeliosScheduler, linear for HeliosDMDScheduler).
    """

    class_name: str = "HeliosScheduler"
    num_train_timesteps: int = 1000
    shift: float = 1.0
    stages: int = 3
    stage_range: tuple[float, ...] = (0.0, 1 / 3, 2 / 3, 1.0)
    gamma: float = 1 / 3
    prediction_type: str = "flow_prediction"
    use_flow_sigmas: bool = True
    use_dynamic_shifting: bool = False
    time_shift_type: str | None = None
    scheduler_type: str = "unipc"
    solver_order: int = 2
    solver_type: str = "bh2"
    predict_x0: bool = True
    lower_order_final: bool = True
    disable_corrector: tuple[int, ...] = ()
    thresholding: bool = False
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15

    def __post_init__(self):
        _require(self.class_name in SCHEDULER_CLASSES,
                 f"scheduler class: one of {', '.join(SCHEDULER_CLASSES)}, got {self.class_name!r}")
        if self.time_shift_type is None:
            default = "linear" if self.class_name == "HeliosDMDScheduler" else "exponential"
            object.__setattr__(self, "time_shift_type", default)
        _require(self.time_shift_type in ("linear", "exponential"),
                 f"time_shift_type: 'linear' or 'exponential', got {self.time_shift_type!r}")
        _require(self.prediction_type == "flow_prediction",
                 f"prediction_type: only 'flow_prediction' is supported, got {self.prediction_type!r}")
        if self.class_name == "HeliosScheduler":
            _require(self.scheduler_type in ("unipc", "euler"),
                     f"scheduler_type: 'unipc' or 'euler', got {self.scheduler_type!r}")
            _require(self.solver_type in ("bh1", "bh2"), f"solver_type: 'bh1' or 'bh2', got {self.solver_type!r}")
            _require(self.predict_x0 and not self.thresholding,
                     "scheduler: predict_x0 must be true and thresholding false")
        _require(len(self.stage_range) == self.stages + 1 or self.stages == 1,
                 f"stage_range: stages+1={self.stages + 1} borders expected, got {len(self.stage_range)}")
        _require(not (self.use_dynamic_shifting and self.shift != 1.0),
                 f"shift: must be 1.0 with use_dynamic_shifting, got {self.shift}")

    @property
    def is_dmd(self) -> bool:
        return self.class_name == "HeliosDMDScheduler"


PIPELINE_CLASSES = ("HeliosPipeline", "HeliosPyramidPipeline")


@dataclasses.dataclass(frozen=True)
class ModelIndex(_FromJson):
    """``model_index.json``: which pipeline the checkpoint is for, and its two flags.

    Base is HeliosPipeline; Mid is HeliosPyramidPipeline with ``is_cfg_zero_star``; Distilled is
    HeliosPyramidPipeline with ``is_distilled`` and the DMD scheduler. ``native_size`` (height, width) is this
    project's own key ``_native_size``; diffusers skips keys with an underscore.
    """

    class_name: str = "HeliosPipeline"
    scheduler_class: str = "HeliosScheduler"
    is_cfg_zero_star: bool = False
    is_distilled: bool = False
    native_size: tuple[int, int] = (384, 640)

    def __post_init__(self):
        _require(self.class_name in PIPELINE_CLASSES,
                 f"model_index.json: _class_name must be one of {', '.join(PIPELINE_CLASSES)}, got {self.class_name!r}")
        size = self.native_size
        _require(isinstance(size, tuple) and len(size) == 2 and all(type(n) is int and n > 0 for n in size),
                 f"model_index.json: _native_size: [height, width], two positive whole numbers, expected, got {size!r}")
        dmd = self.scheduler_class == "HeliosDMDScheduler"
        _require(self.is_distilled == dmd, f"model_index.json: is_distilled={self.is_distilled} does not go with "
                 f"the scheduler {self.scheduler_class} (is_distilled needs HeliosDMDScheduler and no other)")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelIndex:
        scheduler = values.get("scheduler", ["diffusers", "HeliosScheduler"])
        return cls(
            class_name=values.get("_class_name", ""),
            scheduler_class=scheduler[1] if isinstance(scheduler, (list, tuple)) and len(scheduler) == 2 else "",
            is_cfg_zero_star=bool(values.get("is_cfg_zero_star", False)),
            is_distilled=bool(values.get("is_distilled", False)),
            native_size=_tuples(values.get("_native_size", cls.native_size)),
        )

    def to_dict(self) -> dict[str, Any]:
        index: dict[str, Any] = {
            "_class_name": self.class_name,
            "_diffusers_version": "0.42.1",
            "scheduler": ["diffusers", self.scheduler_class],
            "text_encoder": ["transformers", "UMT5EncoderModel"],
            "tokenizer": ["transformers", "T5TokenizerFast"],
            "transformer": ["diffusers", "HeliosTransformer3DModel"],
            "vae": ["diffusers", "AutoencoderKLWan"],
        }
        if self.native_size != type(self).native_size:
            index["_native_size"] = list(self.native_size)
        if self.class_name == "HeliosPyramidPipeline":
            index |= {"is_cfg_zero_star": self.is_cfg_zero_star, "is_distilled": self.is_distilled}
        return index

    @property
    def variant(self) -> str:
        """'base', 'mid' or 'distilled'."""
        if self.class_name == "HeliosPipeline":
            return "base"
        return "distilled" if self.is_distilled else "mid"
