"""How much one step of the flow-matching objectives computes: tokens and operations, from sizes alone.

Counted are the matrix products of the transformer, 2 per multiply-add, as model FLOPs are usually counted: without what
rematerialisation repeats and without a kernel's second pass over its logits. The backward pass costs the forward pass
twice; where the weights are fixed (LoRA), once, but for attention, which has none.
"""

from __future__ import annotations

from typing import NamedTuple

from helios_jax.config import TransformerConfig
from helios_jax.diffusion.history import HistoryLayout


class Work(NamedTuple):
    """Of one step over all devices. tokens: that pass through the blocks, history included; flops: model FLOPs."""

    tokens: float
    flops: float


class Forward(NamedTuple):
    """One sequence through the model. tokens: of history and current frames; products: operations of activations with
    weights; attention: of activations with each other."""

    tokens: int
    products: float
    attention: float


def forward(config: TransformerConfig, layout: HistoryLayout, size: tuple[int, int], text_rows: int, factor: int = 1
            ) -> Forward:
    """The forward pass of one sequence.

    Args:
      config: of the transformer.
      layout: frames of history and chunk.
      size: rows and columns of the full-resolution latents.
      text_rows: of the prompt, without the one that stands for the padding.
      factor: by which the current frames are smaller than ``size``.
    """
    dim, height, width = config.dim, *size
    tiers = layout.tokens(height, width)
    current = layout.chunk * (height // factor // 2) * (width // factor // 2)
    tokens, rows = sum(tiers) + current, text_rows + 1
    readers = current if config.guidance_cross_attn else tokens
    block = (4 * tokens + 2 * readers + 2 * rows) * dim**2 + 2 * tokens * dim * config.ffn_dim
    patches = config.in_channels * dim * (4 * current + sum(n * 4 * k**3 for n, k in zip(tiers, (4, 2, 1))))
    levels_of_noise = 2 if config.zero_history_timestep else 1
    conditions = rows * (config.text_dim + dim) * dim + levels_of_noise * (config.freq_dim + 7 * dim) * dim
    products = config.num_layers * block + patches + conditions + 4 * current * dim * config.out_channels
    attention = config.num_layers * 2 * (tokens**2 + readers * rows) * dim
    return Forward(tokens, 2.0 * products, 2.0 * attention)
