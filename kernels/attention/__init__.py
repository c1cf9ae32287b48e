"""Attention over the compacted sequence of one chunk, and cross-attention over the prompt."""

from kernels.attention.api import HistoryKeysValues, compacted_attention, cross_attention, prepare_history
from kernels.attention.context_parallel import context_parallel
from kernels.attention.dispatch import attend, explain
from kernels.attention.prologue import rms_norm_heads
from kernels.attention.reference import precision_of
from kernels.attention.segments import Packing, Segments, pack

__all__ = [
    "HistoryKeysValues",
    "Packing",
    "Segments",
    "attend",
    "compacted_attention",
    "context_parallel",
    "cross_attention",
    "explain",
    "pack",
    "precision_of",
    "prepare_history",
    "rms_norm_heads",
]
