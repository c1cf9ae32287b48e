"""Deterministic test inputs and the comparison with recorded golden numbers.

Everything here is NumPy only and independent of the framework under test. Arrays are in PyTorch axis order
([B, C, T, h, w], Linear [out, in], ConvNd [out, in, k...]); transpose before comparing with this library's
channel-last arrays.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np

_ONE_CENTRED = ("norm_q.weight", "norm_k.weight", "norm2.weight", "layer_norm.weight", "gamma")
_UNSCALED = ("relative_attention_bias.weight", "shared.weight", "embed_tokens.weight", "history_key_scale")


def rs(tag: str) -> np.random.RandomState:
    """The legacy NumPy stream (frozen by NumPy) that belongs to a tag."""
    return np.random.RandomState(zlib.crc32(tag.encode("utf-8")) & 0xFFFFFFFF)


def data(tag: str, *shape: int) -> np.ndarray:
    """Standard-normal float32 input of the given shape."""
    return rs(tag).standard_normal(shape).astype(np.float32)


def fill(name: str, shape: Sequence[int]) -> np.ndarray:
    """Parameter value for the PyTorch state-dict key ``name``, float32, in the PyTorch shape.

    A tied UMT5 embedding has the value of ``fill("encoder.embed_tokens.weight", shape)``.
    """
    shape = tuple(shape)
    x = rs(name).standard_normal(shape)
    if name.endswith(_ONE_CENTRED):
        x = 1 + 0.1 * x
    elif name.endswith(_UNSCALED):
        pass
    elif name.endswith("bias"):
        x = 0.1 * x
    elif name.endswith("scale_shift_table"):
        x = 0.3 * x
    else:
        x = x / math.sqrt(math.prod(shape[1:]))
    return x.astype(np.float32)


def probe(array: np.ndarray) -> float:
    """Order-sensitive checksum: sum of x_i sin(0.1 i) over the C-order flattening, divided by sqrt(n)."""
    x = np.asarray(array, np.float64).reshape(-1)
    return float(np.dot(x, np.sin(0.1 * np.arange(x.size))) / math.sqrt(x.size))


def check(array, *, mean: float, std: float, first: Sequence[float], last: Sequence[float], probe: float,
          atol: float) -> None:
    """Asserts that an array in PyTorch axis order has the recorded statistics and corner values.

    Args:
      array: anything ``numpy.asarray`` accepts.
      mean, std: over all elements in float64 (population standard deviation).
      first, last: leading and trailing values of the C-order flattening.
      probe: the value of :func:`probe`.
      atol: absolute tolerance of every number. The recorded numbers have six or seven decimals.
    """
    x = np.asarray(array, np.float64)
    flat = x.reshape(-1)
    got = [x.mean(), x.std(), *flat[: len(first)], *flat[flat.size - len(last):], _probe(x)]
    want = [mean, std, *first, *last, probe]
    names = ["mean", "std", *(f"first[{i}]" for i in range(len(first))), *(f"last[{i}]" for i in range(len(last))),
             "probe"]
    # "not <=" instead of ">": a NaN must count as wrong.
    wrong = [f"{n}: got {g:+.7f}, want {w:+.7f}, difference {abs(g - w):.2e}"
             for n, g, w in zip(names, got, want, strict=True) if not abs(g - w) <= atol]
    assert not wrong, f"shape {x.shape}, atol {atol:g}: " + "; ".join(wrong)


_probe = probe  # ``check`` has a parameter of the same name
