"""Layers of the Wan video VAE: causal convolutions, residual blocks and the two kinds of resampling.

One code path serves both the whole sequence and chunk-by-chunk work. Every causal layer asks a :class:`FrameMemory`
for the frames that came before; at the start of a video there are none, and a video given whole is simply a first
chunk of many frames. Sources: diffusers ``WanCausalConv3d``, ``WanRMS_norm``, ``WanResidualBlock``,
``WanAttentionBlock``, ``WanMidBlock``, ``WanResample``, ``WanUpBlock``.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

Array = jax.Array
Dtype = Any

CONV_FORMS = ("taps", "3d")
IMAGE_LAYOUT = ("NHWC", "HWIO", "NHWC")
VIDEO_LAYOUT = ("NDHWC", "DHWIO", "NDHWC")

# Inputs of most convolutions are SiLU of unit-norm features, whose second moment is 0.36: a gain of 2 keeps the scale.
conv_init = nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal")
plain_init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
# The last layer of a residual branch starts small, so that the whole network starts close to linear and trains well.
branch_init = nn.initializers.variance_scaling(0.1, "fan_in", "truncated_normal")


def newest_frame_init(key: Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> Array:
    """Temporal resampling starts as "repeat" (up) or "drop" (down): every output is the newest input frame, plus noise.

    The first frame of a video bypasses these convolutions, so any other start would show later layers two statistics.
    Args:
      shape: [3, 1, 1, in, out] where out is a multiple of in.
    """
    inputs, outputs = shape[-2:]
    copy = jnp.tile(jnp.eye(inputs, dtype=dtype), (1, outputs // inputs))
    return branch_init(key, shape, dtype) + jnp.zeros(shape, dtype).at[-1, 0, 0].set(copy)


class FrameMemory:
    """The newest input frames of every causal layer, in the order in which the layers run.

    A plain Python object that lives for one traced call. ``outgoing`` is the cache for the next call: a list of arrays
    whose number and shapes do not depend on the chunk. Without ``cache`` the call starts a video.
    """

    def __init__(self, cache: list[Array] | None = None):
        self.starts_video = cache is None
        self._incoming = iter(cache or ())
        self.outgoing: list[Array] = []

    def extend(self, x: Array, frames: int) -> Array:
        """Puts the remembered ``frames`` frames (zeros at the start of a video) before x [B, T, h, w, C]."""
        if self.starts_video:
            x = jnp.pad(x, ((0, 0), (frames, 0), (0, 0), (0, 0), (0, 0)))  # T -> frames + T
        else:
            x = jnp.concatenate([next(self._incoming).astype(x.dtype), x], axis=1)  # T -> frames + T
        self.outgoing.append(x[:, -frames:])
        return x


def fold_frames(x: Array) -> Array:
    return x.reshape(-1, *x.shape[2:])  # [B, T, h, w, C] -> [B*T, h, w, C]


def unfold_frames(x: Array, batch: int) -> Array:
    return x.reshape(batch, -1, *x.shape[1:])  # [B*T, h, w, C] -> [B, T, h, w, C]


def same_conv2d(x: Array, kernel: Array) -> Array:
    """Stride-1 convolution of images [N, h, w, I] with [kh, kw, I, O], zero padding (k-1)/2 on each side."""
    if kernel.shape[:2] == (1, 1):
        return x @ kernel[0, 0]  # I -> O
    pads = [((k - 1) // 2, (k - 1) // 2) for k in kernel.shape[:2]]
    return lax.conv_general_dilated(x, kernel, (1, 1), pads, dimension_numbers=IMAGE_LAYOUT)  # I -> O


def time_valid_conv(x: Array, kernel: Array, form: str, stride: int = 1) -> Array:
    """Convolution without temporal padding.

    Args:
      x: [B, T, h, w, I]; kernel: [kt, kh, kw, I, O]; stride: temporal stride.
    Returns: [B, (T - kt) // stride + 1, h, w, O].
    """
    taps, kh, kw = kernel.shape[:3]
    batch, frames = x.shape[:2]
    length = (frames - taps) // stride + 1
    if form == "3d":
        pads = [(0, 0)] + [((k - 1) // 2, (k - 1) // 2) for k in (kh, kw)]
        return lax.conv_general_dilated(x, kernel, (stride, 1, 1), pads, dimension_numbers=VIDEO_LAYOUT)
    shifted = [x[:, k : k + stride * (length - 1) + 1 : stride] for k in range(taps)]
    x = fold_frames(jnp.concatenate(shifted, axis=-1))  # kt x [B, T', h, w, I] -> [B*T', h, w, kt*I]
    kernel = kernel.transpose(1, 2, 0, 3, 4).reshape(kh, kw, -1, kernel.shape[-1])  # -> [kh, kw, kt*I, O]
    return unfold_frames(same_conv2d(x, kernel), batch)  # [B*T', h, w, O] -> [B, T', h, w, O]


class CausalConv(nn.Module):
    """Causal 3-D convolution [..., I] -> [..., O], stride 1: padding (k-1)/2 in space, k-1 past frames in time."""

    features: int
    kernel_size: tuple[int, int, int] = (3, 3, 3)
    dtype: Dtype = jnp.float32
    conv_form: str = "taps"
    kernel_init: nn.initializers.Initializer = conv_init

    @nn.compact
    def __call__(self, x: Array, memory: FrameMemory) -> Array:
        kernel = self.param("kernel", self.kernel_init, (*self.kernel_size, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        kernel, x = kernel.astype(self.dtype), x.astype(self.dtype)
        past = self.kernel_size[0] - 1
        if past:
            extended = memory.extend(x, past)  # T -> T + past
            if memory.starts_video and x.shape[1] == 1:
                kernel = kernel[-1:]  # a lone first frame sees only zeros before it
            else:
                x = extended
        return time_valid_conv(x, kernel, self.conv_form) + bias.astype(self.dtype)  # I -> O, T frames


class ImageConv(nn.Module):
    """The 2-D convolution of a resampler, frame by frame.

    ``mode`` "down": zero padding at the bottom and right only, stride 2. "up": nearest x2 first, then padding 1.
    "same": stride 1 (used with 1x1 kernels).
    """

    features: int
    mode: str
    kernel_size: tuple[int, int] = (3, 3)
    dtype: Dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = plain_init

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", self.kernel_init, (*self.kernel_size, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        batch = x.shape[0]
        kernel, x = kernel.astype(self.dtype), fold_frames(x.astype(self.dtype))  # [B*T, h, w, I]
        if self.mode == "down":
            x = lax.conv_general_dilated(x, kernel, (2, 2), [(0, 1), (0, 1)], dimension_numbers=IMAGE_LAYOUT)  # h/2 w/2
        elif self.mode == "up":
            x = same_conv2d(x.repeat(2, axis=1).repeat(2, axis=2), kernel)  # h, w -> 2h, 2w
        else:
            x = same_conv2d(x, kernel)
        return unfold_frames(x + bias.astype(self.dtype), batch)  # [B, T, h', w', O]


class RMSNorm(nn.Module):
    """x / max(|x|, 1e-12) * sqrt(C) * gamma over the last axis: statistics in float32, gamma after the cast back."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        gamma = self.param("gamma", nn.initializers.ones, (channels,))
        y = x.astype(jnp.float32)
        # max inside the root: the gradient stays finite where a whole pixel is zero.
        y = y * lax.rsqrt(jnp.maximum(jnp.square(y).sum(-1, keepdims=True), 1e-24))
        return y.astype(self.dtype) * (gamma * channels**0.5).astype(self.dtype)


class ResidualBlock(nn.Module):
    """shortcut(x) + conv2(SiLU(norm2(conv1(SiLU(norm1(x)))))); the shortcut is a 1x1x1 conv where widths differ."""

    features: int
    dtype: Dtype = jnp.float32
    conv_form: str = "taps"

    @nn.compact
    def __call__(self, x: Array, memory: FrameMemory) -> Array:
        conv = dict(features=self.features, dtype=self.dtype, conv_form=self.conv_form)
        y = nn.silu(RMSNorm(self.dtype, name="norm1")(x))
        y = CausalConv(**conv, name="conv1")(y, memory)  # C -> features
        y = nn.silu(RMSNorm(self.dtype, name="norm2")(y))
        y = CausalConv(**conv, kernel_init=branch_init, name="conv2")(y, memory)
        if x.shape[-1] != self.features:
            conv |= dict(kernel_size=(1, 1, 1), kernel_init=plain_init)
            x = CausalConv(**conv, name="conv_shortcut")(x, memory)  # C -> features
        return x + y


class FrameAttention(nn.Module):
    """Single-head self-attention over the positions of each frame, softmax in float32, with its residual."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, frames, h, w, channels = x.shape
        y = RMSNorm(self.dtype, name="norm")(x)
        y = ImageConv(3 * channels, "same", (1, 1), self.dtype, name="to_qkv")(y)  # C -> 3C
        q, k, v = jnp.split(y.reshape(batch * frames, h * w, 3 * channels), 3, axis=-1)  # 3 x [B*T, S, C]
        weights = jnp.einsum("nqc,nkc->nqk", q, k, preferred_element_type=jnp.float32) * channels**-0.5
        weights = jax.nn.softmax(weights, axis=-1).astype(self.dtype)  # [B*T, S, S]
        y = jnp.einsum("nqk,nkc->nqc", weights, v).reshape(x.shape)  # [B, T, h, w, C]
        return x + ImageConv(channels, "same", (1, 1), self.dtype, branch_init, name="proj")(y)


class MidBlock(nn.Module):
    """Residual block, attention, residual block at one width."""

    dtype: Dtype = jnp.float32
    conv_form: str = "taps"

    @nn.compact
    def __call__(self, x: Array, memory: FrameMemory) -> Array:
        x = ResidualBlock(x.shape[-1], self.dtype, self.conv_form, name="resnets_0")(x, memory)
        x = FrameAttention(self.dtype, name="attentions_0")(x)
        return ResidualBlock(x.shape[-1], self.dtype, self.conv_form, name="resnets_1")(x, memory)


class Downsample(nn.Module):
    """Halves height and width and, if ``temporal``, the number of frames after the first of the video."""

    temporal: bool
    dtype: Dtype = jnp.float32
    conv_form: str = "taps"

    @nn.compact
    def __call__(self, x: Array, memory: FrameMemory) -> Array:
        x = ImageConv(x.shape[-1], "down", dtype=self.dtype, name="resample_1")(x)  # h, w -> h/2, w/2
        if self.temporal:
            x = TimeDown(self.dtype, self.conv_form, name="time_conv")(x, memory)
        return x


class TimeDown(nn.Module):
    """Stride-2 conv over three frames. The first frame of a video bypasses it: 1 + 2k -> 1 + k frames, then 2k -> k."""

    dtype: Dtype = jnp.float32
    conv_form: str = "taps"

    @nn.compact
    def __call__(self, x: Array, memory: FrameMemory) -> Array:
        channels = x.shape[-1]
        kernel = self.param("kernel", newest_frame_init, (3, 1, 1, channels, channels)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (channels,)).astype(self.dtype)
        extended = memory.extend(x, 1)  # T -> 1 + T
        if not memory.starts_video:
            return time_valid_conv(extended, kernel, self.conv_form, stride=2) + bias  # 2k -> k
        if x.shape[1] == 1:
            return x
        later = time_valid_conv(x, kernel, self.conv_form, stride=2) + bias  # 1 + 2k -> k
        return jnp.concatenate([x[:, :1], later], axis=1)  # -> 1 + k


class Upsample(nn.Module):
    """Doubles height and width, halves the channels; if ``temporal``, first doubles the frames after the first."""

    temporal: bool
    dtype: Dtype = jnp.float32
    conv_form: str = "taps"

    @nn.compact
    def __call__(self, x: Array, memory: FrameMemory) -> Array:
        if self.temporal:
            x = TimeUp(self.dtype, self.conv_form, name="time_conv")(x, memory)
        return ImageConv(x.shape[-1] // 2, "up", dtype=self.dtype, name="resample_1")(x)  # 2h, 2w, C/2


class TimeUp(nn.Module):
    """Two frames out of each: first C channels the earlier one. 1 + k -> 1 + 2k frames at the start, then k -> 2k.

    The first frame of a video passes through alone, and the convolution never sees it: zeros stand in its place.
    """

    dtype: Dtype = jnp.float32
    conv_form: str = "taps"

    @nn.compact
    def __call__(self, x: Array, memory: FrameMemory) -> Array:
        channels = x.shape[-1]
        kernel = self.param("kernel", newest_frame_init, (3, 1, 1, channels, 2 * channels)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (2 * channels,)).astype(self.dtype)
        first, later = (x[:, :1], x[:, 1:]) if memory.starts_video else (x[:, :0], x)
        extended = memory.extend(later, 2)  # k -> 2 + k
        if later.shape[1] == 0:
            return first
        later = time_valid_conv(extended, kernel, self.conv_form) + bias  # [B, k, h, w, 2C]
        batch, frames, h, w, _ = later.shape
        later = later.reshape(batch, frames, h, w, 2, channels).transpose(0, 1, 4, 2, 3, 5)  # [B, k, 2, h, w, C]
        later = later.reshape(batch, 2 * frames, h, w, channels)  # [B, 2k, h, w, C]
        return jnp.concatenate([first, later], axis=1)


class UpBlock(nn.Module):
    """``num_res_blocks`` + 1 residual blocks, then an upsampler (``upsample``: None, "2d" or "3d")."""

    features: int
    num_res_blocks: int
    upsample: str | None
    dtype: Dtype = jnp.float32
    conv_form: str = "taps"

    @nn.compact
    def __call__(self, x: Array, memory: FrameMemory) -> Array:
        for i in range(self.num_res_blocks + 1):
            x = ResidualBlock(self.features, self.dtype, self.conv_form, name=f"resnets_{i}")(x, memory)
        if self.upsample:
            x = Upsample(self.upsample == "3d", self.dtype, self.conv_form, name="upsamplers_0")(x, memory)
        return x
