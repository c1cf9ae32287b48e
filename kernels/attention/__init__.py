"""Attention over the compacted sequence of one chunk, and cross-attention over the prompt."""

from kernels.attention.api import compacted_attention, cross_attention

__all__ = ["compacted_attention", "cross_attention"]
