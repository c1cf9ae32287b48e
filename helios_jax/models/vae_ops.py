"""Convolutions and norms of the video VAE as plain functions of arrays, in the forms that are fast on a CPU.

XLA's CPU compiler runs a 2-D convolution at the speed of a matrix product if both channel counts reach a vector's
length, and a 3-D convolution, or one with few channels, many times slower. So, with ``form`` "taps":

* a 3-D convolution becomes one 2-D convolution whose input channels are the frames that a window of time covers.
  One window makes ``p`` output frames at once from p + 2 input frames where there are few channels: the extra
  multiplications by zero (a factor (p + 2) / 3) cost less than half-empty vectors, and each input is gathered fewer
  times. Measured at 8 channels, 64x128x17 frames: 3-D form 265 ms, p = 1 67 ms, p = 3 39 ms;
* "nearest x2, then 3x3" becomes its four phases on the small image, which halves the time;
* "3x3, stride 2" of few channels becomes 2x2 over blocks of pixels, whose gradient is three times as fast.

With ``form`` "3d" the compiler gets the plain convolutions, which accelerators prefer. Both give the same numbers up
to rounding; tests compare them. Inputs are channel-last, kernels [..., in, out].
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels.attention import precision_of

Array = jax.Array
Dtype = Any

CONV_FORMS = ("taps", "3d")
_IMAGE_LAYOUT = ("NHWC", "HWIO", "NHWC")
_VIDEO_LAYOUT = ("NDHWC", "DHWIO", "NDHWC")
# Channels at which a convolution reaches full speed (two AVX-512 registers of float32).
_FULL_CHANNELS = 32


def fold_frames(x: Array) -> Array:
    return x.reshape(-1, *x.shape[2:])  # [B, T, h, w, C] -> [B*T, h, w, C]


def unfold_frames(x: Array, batch: int) -> Array:
    return x.reshape(batch, -1, *x.shape[1:])  # [B*T, h, w, C] -> [B, T, h, w, C]


def rms_norm(x: Array, gamma: Array, dtype: Dtype) -> Array:
    """x / max(|x|, 1e-12) * sqrt(C) * gamma over the last axis (diffusers ``WanRMS_norm``).

    The division is float32; gamma is multiplied after the cast to ``dtype``.
    Args:
      x: [..., C]; gamma: [C].
    """
    y = x.astype(jnp.float32)
    # max inside the root: the gradient stays finite where a whole pixel is zero.
    y = y * lax.rsqrt(jnp.maximum(jnp.square(y).sum(-1, keepdims=True), 1e-24))
    return y.astype(dtype) * (gamma.astype(jnp.float32) * x.shape[-1] ** 0.5).astype(dtype)


def extend(x: Array, past: Array | None, frames: int) -> Array:
    """Puts ``frames`` earlier frames before x [B, T, h, w, C]: ``past``, or zeros at the start of a video."""
    if past is None:
        return jnp.pad(x, ((0, 0), (frames, 0), (0, 0), (0, 0), (0, 0)))  # T -> frames + T
    return jnp.concatenate([past.astype(x.dtype), x], axis=1)  # T -> frames + T


def _convolve(x: Array, kernel: Array, strides: tuple[int, ...], pads: list[tuple[int, int]], layout: Any) -> Array:
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=layout, precision=precision_of(x.dtype))


def same_conv2d(x: Array, kernel: Array) -> Array:
    """Stride-1 convolution of images [N, h, w, I] with [kh, kw, I, O], zero padding (k-1)/2 on each side."""
    if kernel.shape[:2] == (1, 1):
        return jnp.matmul(x, kernel[0, 0], precision=precision_of(x.dtype))  # I -> O
    pads = [((k - 1) // 2, (k - 1) // 2) for k in kernel.shape[:2]]
    return _convolve(x, kernel, (1, 1), pads, _IMAGE_LAYOUT)  # I -> O


def time_valid_conv(x: Array, kernel: Array, form: str, stride: int = 1) -> Array:
    """Convolution without temporal padding, with zero padding (k-1)/2 in space.

    Args:
      x: [B, T, h, w, I]; kernel: [kt, kh, kw, I, O]; stride: in time.
    Returns: [B, (T - kt) // stride + 1, h, w, O].
    """
    taps, *window = kernel.shape[:3]
    if form == "3d":
        pads = [(0, 0)] + [((k - 1) // 2, (k - 1) // 2) for k in window]
        return _convolve(x, kernel, (stride, 1, 1), pads, _VIDEO_LAYOUT)
    batch, frames = x.shape[:2]
    length = (frames - taps) // stride + 1
    together = 1
    if stride == 1 and window != [1, 1]:
        together = _frames_together(length, taps, kernel.shape[-1])
    return _windowed_conv(x, kernel, length, stride, together)


def _frames_together(length: int, taps: int, channels: int) -> int:
    """How many output frames one window makes: the cheapest by a model fitted to the measurements above."""

    def cost(p: int) -> float:
        multiplications = -(-length // p) * p * (p + taps - 1)
        return multiplications / min(1.0, p * channels / _FULL_CHANNELS)

    return min(range(1, max(1, _FULL_CHANNELS // channels) + 1), key=cost)


def _windowed_conv(x: Array, kernel: Array, length: int, stride: int, p: int) -> Array:
    """One 2-D convolution for all ``length`` output frames, p of them from each window of time (p > 1: stride 1)."""
    taps, kh, kw, inputs, outputs = kernel.shape
    batch, frames = x.shape[:2]
    windows = -(-length // p)
    missing = windows * p + taps - 1 - frames
    if p > 1 and missing > 0:
        x = jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0), (0, 0)))  # whole windows
    span, step = p + taps - 1, p * stride
    parts = [x[:, k : k + step * (windows - 1) + 1 : step] for k in range(span)]
    x = fold_frames(jnp.concatenate(parts, axis=-1))  # span x [B, windows, h, w, I] -> [B*windows, h, w, span*I]
    # Output frame j of a window sees its frames j ... j + taps - 1; zeros elsewhere.
    shifted = [jnp.pad(kernel, ((j, p - 1 - j), (0, 0), (0, 0), (0, 0), (0, 0))) for j in range(p)]
    kernel = jnp.stack(shifted, axis=-2)  # [kt, kh, kw, I, O] -> [span, kh, kw, I, p, O]
    kernel = kernel.transpose(1, 2, 0, 3, 4, 5).reshape(kh, kw, span * inputs, p * outputs)
    y = unfold_frames(same_conv2d(x, kernel), batch)  # [B, windows, h, w, p*O]
    if p == 1:
        return y
    h, w = y.shape[2:4]
    y = y.reshape(batch, windows, h, w, p, outputs).transpose(0, 1, 4, 2, 3, 5)  # -> [B, windows, p, h, w, O]
    return y.reshape(batch, windows * p, h, w, outputs)[:, :length]  # [B, length, h, w, O]


def doubling_conv(x: Array, kernel: Array, form: str) -> Array:
    """Repeats every pixel 2x2, then a 3x3 convolution with padding 1: [N, h, w, I] -> [N, 2h, 2w, O].

    In the small image an even output row sees rows i-1 and i with the taps (a, b + c), an odd one i and i+1 with
    (a + b, c); the same holds for columns.
    """
    if form == "3d":
        return same_conv2d(x.repeat(2, axis=1).repeat(2, axis=2), kernel)
    n, h, w, _ = x.shape
    outputs = kernel.shape[-1]
    phases = [(i, j, phase) for i, rows in enumerate(_phases(kernel, 0)) for j, phase in enumerate(_phases(rows, 1))]
    if 4 * outputs <= _FULL_CHANNELS:  # narrow: the four phases as channels of one 3x3 convolution
        stacked = [jnp.pad(k, ((i, 1 - i), (j, 1 - j), (0, 0), (0, 0))) for i, j, k in phases]
        y = same_conv2d(x, jnp.concatenate(stacked, axis=-1)).reshape(n, h, w, 2, 2, outputs)
    else:
        y = jnp.stack([_convolve(x, k, (1, 1), [(1 - i, i), (1 - j, j)], _IMAGE_LAYOUT)
                       for i, j, k in phases], axis=3).reshape(n, h, w, 2, 2, outputs)
    return y.transpose(0, 1, 3, 2, 4, 5).reshape(n, 2 * h, 2 * w, outputs)  # rows and columns interleaved


def _phases(kernel: Array, axis: int) -> tuple[Array, Array]:
    a, b, c = (lax.slice_in_dim(kernel, i, i + 1, axis=axis) for i in range(3))
    return jnp.concatenate([a, b + c], axis), jnp.concatenate([a + b, c], axis)


def halving_conv(x: Array, kernel: Array, form: str) -> Array:
    """3x3 convolution with stride 2 after zero padding at the bottom and right: [N, h, w, I] -> [N, h//2, w//2, O]."""
    n, h, w, inputs = x.shape
    if form == "3d" or inputs > _FULL_CHANNELS or h % 2 or w % 2:
        return _convolve(x, kernel, (2, 2), [(0, 1), (0, 1)], _IMAGE_LAYOUT)
    x = x.reshape(n, h // 2, 2, w // 2, 2, inputs).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(n, h // 2, w // 2, 4 * inputs)  # 2x2 pixels -> channels
    kernel = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0))).reshape(2, 2, 2, 2, inputs, -1)
    kernel = kernel.transpose(0, 2, 1, 3, 4, 5).reshape(2, 2, 4 * inputs, -1)  # [4, 4, I, O] -> [2, 2, 4I, O]
    return _convolve(x, kernel, (1, 1), [(0, 1), (0, 1)], _IMAGE_LAYOUT)
