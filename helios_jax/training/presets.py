"""What the configurations of the original's runs have in common: the sizes of the model and one run's settings.

The files ``configs/stage1_init.py`` to ``stage3_dmd.py`` add what differs from run to run. They take the size as the
argument of the configuration file: ``--config configs/stage1_init.py:1.3b``.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from helios_jax.errors import UserError

# Parameters of TransformerConfig. 14B and 1.3B are the sizes of Wan 2.1; no weights of 3B are published.
SIZES: dict[str, dict[str, Any]] = {
    "14b": {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
    "3b": {"num_attention_heads": 20, "ffn_dim": 8960, "num_layers": 30},
    "1.3b": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
}


def transformer(size: str) -> dict[str, Any]:
    """The transformer's settings of one size.

    Raises:
      UserError: no such size.
    """
    if size not in SIZES:
        raise UserError(f"--config: the size behind the colon is one of {', '.join(SIZES)}, got {size!r}")
    return SIZES[size] | {"attention_head_dim": 128, "rope_dim": (44, 42, 42), "text_dim": 4096, "freq_dim": 256}


def _completed(common: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """``common`` with the keys of ``own`` set, group by group."""
    return common | {key: _completed(common[key], value) if isinstance(value, dict) and key in common else value
                     for key, value in own.items()}


def original_run(size: str, own: dict[str, Any]) -> ConfigDict:
    """A run with the settings that all of the original's runs share, completed by its own.

    Args:
      size: of :data:`SIZES`.
      own: the run's own keys; they override common ones.
    """
    common = {
        "objective": {
            "data": "data/latents",
            "model": f"models/start-{size}",
            "transformer": transformer(size),
            "init_from": "",
            "lora": {"rank": 0, "alpha": 0.0, "targets": ("all-linear",), "full": (), "base_dtype": "bfloat16"},
            "dtype": "bfloat16",
            "unroll": 1,
            "remat": "nothing_saveable",
            "task_mix": {"t2v": 0.4, "i2v": 0.0, "v2v": 0.4},
            "corruption": {
                "mode": "noise", "clean_probability": 0.1, "frame_independent": True,
                "ratio_long": 1 / 3, "ratio_mid": 1 / 3, "ratio_short": 1 / 3,
            },
            "caption_dropout": 0.0,
            "threads": 16,
            "sample": {
                "prompts": ("a sailing boat leaves a small harbour at sunrise, seen from the pier",),
                "negative_prompt": "", "num_frames": 99, "steps": 50, "guidance": 5.0,
            },
            "validation": {"data": "", "items": 64, "batch_size": 8},
            "export_dtype": "bfloat16",
        },
        "seed": 0,
        "batch_size": 128,
        "accumulate": 1,
        "mesh": {"data": 1, "fsdp": -1, "context": 1, "tensor": 1, "rules": ()},
        "num_steps": 1_000_000,
        "log_every": 10,
        "checkpoint_every": 500,
        "keep_last": 2,
        "keep_every": 500,
        "sample_every": 500,
        "tensorboard": True,
        "ema_decay": 0.0,
        "optimizer": {
            "name": "adamw", "learning_rate": 5e-5, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 1e-4,
            "weight_decay_on": "all", "clip_norm": 1.0, "schedule": "constant", "warmup_steps": 0,
        },
    }
    return ConfigDict(_completed(common, own))
