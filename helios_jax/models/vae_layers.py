"""Layers of the Wan video VAE: causal convolutions, residual blocks and the two kinds of resampling.

One code path serves both the whole sequence and chunk-by-chunk work. Every causal layer asks a :class:`FrameMemory`
for the frames that came before; at the start of a video there are none, and a video given whole is simply a first
chunk of many frames. Sources: diffusers ``WanCausalConv3d``, ``WanResidualBlock``, ``WanAttentionBlock``,
``WanMidBlock``, ``WanResample``, ``WanUpBlock``.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from helios_jax.models.vae_ops import (
    doubling_conv,
    extend,
    fold_frames,
    halving_conv,
    rms_norm,
    same_conv2d,
    time_valid_conv,
    unfold_frames,
)
from helios_jax.sharding import constrain
from kernels.attention import precision_of

Array = jax.Array
Dtype = Any

_SCORES_AT_ONCE = 2**26
# Where frames [B, T, h, w, C] lie on a mesh: columns are divided, and a convolution fetches its neighbours' edges.
_IN_STRIPS = ("batch", None, None, "width", None)
_WHOLE_FRAMES = ("batch", None, None, None, None)

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
        self._incoming = None if cache is None else iter(cache)
        self.outgoing: list[Array] = []

    def recall(self) -> Array | None:
        """What the layer that runs now put down in the previous call; None at the start of a video."""
        return None if self._incoming is None else next(self._incoming)

    def remember(self, frames: Array) -> None:
        self.outgoing.append(frames)


class Gamma(nn.Module):
    """The scale [channels] of an RMS norm."""

    @nn.compact
    def __call__(self, channels: int) -> Array:
        return self.param("gamma", nn.initializers.ones, (channels,))


class CausalConv(nn.Module):
    """Causal 3-D convolution (diffusers ``WanCausalConv3d``), [B, T, h, w, I] -> [B, T, h, w, features].

    Padding is (k-1)/2 in space; in time the k-1 frames before x (zeros at the start of a video) stand on the left.
    With ``gamma`` the RMS norm and the SiLU that precede the convolution are part of it.
    """

    features: int
    window: tuple[int, int, int] = (3, 3, 3)
    dtype: Dtype = jnp.float32
    conv_form: str = "taps"
    kernel_init: nn.initializers.Initializer = conv_init

    @nn.compact
    def __call__(self, x: Array, memory: FrameMemory, gamma: Array | None = None) -> Array:
        kernel = self.param("kernel", self.kernel_init, (*self.window, x.shape[-1], self.features)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        frames = self.window[0] - 1
        past = memory.recall() if frames else None

        # The backward pass repeats the cheap steps before the convolution: what they make is several times larger
        # than x, and writing it to fresh memory costs a CPU more than computing it again.
        @jax.checkpoint
        def run(x: Array, past: Array | None, gamma: Array | None, kernel: Array) -> tuple[Array, Array]:
            x = x.astype(self.dtype) if gamma is None else nn.silu(rms_norm(x, gamma, self.dtype))
            extended = extend(x, past, frames)  # T -> k-1 + T
            newest = extended[:, x.shape[1] :]  # [B, k-1, h, w, I]
            if past is None and x.shape[1] == 1:
                kernel, extended = kernel[-1:], x  # a lone first frame sees only zeros before it
            return time_valid_conv(extended, kernel, self.conv_form), newest  # I -> features

        y, newest = run(x, past, gamma, kernel)
        if frames:
            memory.remember(newest)
        return constrain(y + bias, *_IN_STRIPS)


class ImageConv(nn.Module):
    """The 2-D convolution of a resampler, frame by frame.

    ``mode`` "down": zero padding at the bottom and right only, stride 2. "up": nearest x2 first, then padding 1.
    "same": stride 1 (used with 1x1 kernels).
    """

    features: int
    mode: str
    window: tuple[int, int] = (3, 3)
    dtype: Dtype = jnp.float32
    conv_form: str = "taps"
    kernel_init: nn.initializers.Initializer = plain_init

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", self.kernel_init, (*self.window, x.shape[-1], self.features)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        batch = x.shape[0]
        x = fold_frames(x.astype(self.dtype))  # [B*T, h, w, I]
        if self.mode == "down":
            x = halving_conv(x, kernel, self.conv_form)  # h, w -> h/2, w/2
        elif self.mode == "up":
            x = doubling_conv(x, kernel, self.conv_form)  # h, w -> 2h, 2w
        else:
            x = same_conv2d(x, kernel)
        return constrain(unfold_frames(x + bias, batch), *_IN_STRIPS)  # [B, T, h', w', features]


class ResidualBlock(nn.Module):
    """shortcut(x) + conv2(SiLU(norm2(conv1(SiLU(norm1(x)))))); the shortcut is a 1x1x1 conv where widths differ."""

    features: int
    dtype: Dtype = jnp.float32
    conv_form: str = "taps"

    @nn.compact
    def __call__(self, x: Array, memory: FrameMemory) -> Array:
        conv = dict(features=self.features, dtype=self.dtype, conv_form=self.conv_form)
        gamma = Gamma(name="norm1")(x.shape[-1])
        y = CausalConv(**conv, name="conv1")(x, memory, gamma)  # C -> features
        gamma = Gamma(name="norm2")(self.features)
        y = CausalConv(**conv, kernel_init=branch_init, name="conv2")(y, memory, gamma)
        if x.shape[-1] != self.features:
            conv |= dict(window=(1, 1, 1), kernel_init=plain_init)
            x = CausalConv(**conv, name="conv_shortcut")(x, memory)  # C -> features
        return x + y


def _attend(q: Array, k: Array, v: Array) -> Array:
    """softmax(q k' / sqrt(C)) v for [N, S, C]."""
    exact = precision_of(q.dtype)
    scores = jnp.einsum("nqc,nkc->nqk", q, k, precision=exact, preferred_element_type=jnp.float32)  # [N, S, S]
    weights = jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=-1)
    return jnp.einsum("nqk,nkc->nqc", weights.astype(v.dtype), v, precision=exact)


class FrameAttention(nn.Module):
    """Single-head self-attention over the positions of each frame, softmax in float32, with its residual.

    Frames are worked one after the other where their scores together would take more than 256 MB.
    """

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, frames, h, w, channels = x.shape
        y = rms_norm(x, Gamma(name="norm")(channels), self.dtype)
        y = ImageConv(3 * channels, "same", (1, 1), self.dtype, name="to_qkv")(y)  # C -> 3C
        y = constrain(y, *_WHOLE_FRAMES)  # every position sees all others
        q, k, v = jnp.split(y.reshape(batch * frames, h * w, 3 * channels), 3, axis=-1)  # 3 x [B*T, S, C]
        if batch * frames * (h * w) ** 2 > _SCORES_AT_ONCE:
            y = lax.map(lambda qkv: _attend(*(a[None] for a in qkv))[0], (q, k, v))
        else:
            y = _attend(q, k, v)
        y = y.reshape(x.shape)  # [B*T, S, C] -> [B, T, h, w, C]
        return x + ImageConv(channels, "same", (1, 1), self.dtype, kernel_init=branch_init, name="proj")(y)


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
        x = ImageConv(x.shape[-1], "down", (3, 3), self.dtype, self.conv_form, name="resample_1")(x)  # h, w -> h/2, w/2
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
        past = memory.recall()
        memory.remember(x[:, -1:])
        if past is not None:
            return time_valid_conv(extend(x, past, 1), kernel, self.conv_form, stride=2) + bias  # 2k -> k
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
        conv = ImageConv(x.shape[-1] // 2, "up", (3, 3), self.dtype, self.conv_form, name="resample_1")
        return conv(x)  # h, w, C -> 2h, 2w, C/2


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
        extended = extend(later, memory.recall(), 2)  # k -> 2 + k
        memory.remember(extended[:, -2:])
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
