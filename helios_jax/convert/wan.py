"""Starting Helios from Wan 2.1: the same transformer without history patches.

The three history convolutions start as averaging versions of Wan's patch embedding: every tap of its kernel is
repeated k times along time, rows and columns and divided by k^3, with k = 1, 2, 4 for short, mid and long, and the
bias is copied. So ``patch_long(x)`` equals ``patch_short`` of the 4x4x4 mean of x, and likewise mid with 2x2x2.

This is what the Helios training code intends. As released, its copy runs before the checkpoint is loaded, so that the
convolutions start from a random embedding instead; that is not reproduced here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from helios_jax.config import TransformerConfig
from helios_jax.convert.rules import HISTORY_PATCHES
from helios_jax.errors import UserError


def history_kernel(kernel: np.ndarray, factor: int) -> np.ndarray:
    """The kernel of a history patch from that of the patch embedding.

    Args:
      kernel: [kt, kh, kw, in, out], the patch embedding.
      factor: 1 (short), 2 (mid) or 4 (long).

    Returns: [factor kt, factor kh, factor kw, in, out] in the same dtype; the division is by a power of two and
      therefore exact.
    """
    for axis in range(3):
        kernel = np.repeat(kernel, factor, axis=axis)
    return (kernel.astype(np.float32) / factor**3).astype(kernel.dtype)


def init_history_patches(params: Mapping[str, Any]) -> dict[str, Any]:
    """A transformer tree whose history patches are (re)made from its own patch embedding; other leaves are shared."""
    embedding = params["patch_embedding"]
    kernel = np.asarray(embedding["kernel"])
    return dict(params) | {tier: {"kernel": history_kernel(kernel, factor), "bias": np.array(embedding["bias"])}
                           for tier, factor in HISTORY_PATCHES.items()}


def transformer_config_from_wan(values: Mapping[str, Any]) -> TransformerConfig:
    """The Helios configuration for the weights of a Wan 2.1 text-to-video transformer.

    Args:
      values: its ``config.json`` (diffusers ``WanTransformer3DModel``).

    Raises:
      UserError: it is not a text-to-video Wan transformer.
    """
    if values.get("_class_name", "WanTransformer3DModel") != "WanTransformer3DModel":
        raise UserError(f"Wan config: _class_name must be WanTransformer3DModel, got {values['_class_name']!r}")
    for field in ("image_dim", "added_kv_proj_dim"):
        if values.get(field) is not None:
            raise UserError(f"Wan config: {field} must be null (a text-to-video model), got {values[field]!r}")
    head = values.get("attention_head_dim", 128)
    # Wan derives its rotary split from the head size: rows and columns get a third each, rounded down to even.
    spatial = 2 * (head // 6)
    return TransformerConfig.from_dict(dict(values) | {"rope_dim": (head - 2 * spatial, spatial, spatial)})
