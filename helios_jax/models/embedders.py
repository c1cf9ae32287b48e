"""What turns the transformer's inputs into its width: latents, history, timesteps and prompt rows."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from helios_jax.config import TransformerConfig
from helios_jax.models.layers import Linear, gelu, low_rank, matmul_float32, silu
from helios_jax.sharding import constrain

Array = jax.Array
Dtype = Any

_condition_init = nn.initializers.normal(0.02)


class PatchEmbedding(nn.Module):
    """Convolution whose kernel equals its stride, as one matrix product. Source: the ``patch_*`` Conv3d layers."""

    patch: tuple[int, int, int]
    features: int
    dtype: Dtype
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, T, h, w, C_in] -> [B, t, y, x, C]. Trailing frames, rows and columns that fill no patch are dropped."""
        kt, kh, kw = self.patch
        channels = x.shape[-1]
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", in_axis=(0, 1, 2, 3), out_axis=4)
        axes = (None, None, None, None, "embed")
        kernel = self.param("kernel", nn.with_logical_partitioning(init, axes), (kt, kh, kw, channels, self.features),
                            self.param_dtype)
        bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, ("embed",)), (self.features,),
                          self.param_dtype)
        t, h, w = (size // k * k for size, k in zip(x.shape[1:4], self.patch, strict=True))
        x = x[:, :t, :h, :w].astype(self.dtype)
        x = rearrange(x, "b (t kt) (y kh) (x kw) c -> b t y x (kt kh kw c)", kt=kt, kh=kh, kw=kw)
        y = matmul_float32(x, kernel.reshape(-1, self.features))  # -> [B, t, y, x, C]
        if self.has_variable("lora", "a"):
            a = self.get_variable("lora", "a")  # [kt, kh, kw, C_in, r]
            y = y + low_rank(x, a.reshape(-1, a.shape[-1]), self.get_variable("lora", "b"))
            if self.has_variable("lora", "bias"):
                y = y + self.get_variable("lora", "bias").astype(jnp.float32)
        # Whole along the axis that divides tokens: repeating so little is cheap, and the gradients of kernel and
        # adapter are then sums over the batch's axes alone. Sums over the other axis, too, scattered over some of the
        # batch's, are more than libtpu (0.0.41, 0.0.50) compiles (INTERNAL, post-layout).
        y = constrain(y, "batch", None, None, None, None)
        return (y + bias.astype(jnp.float32)).astype(self.dtype)


class TimestepEmbedder(nn.Module):
    """Sinusoid (cosine first) and a two-layer SiLU network, all in float32."""

    dim: int
    freq_dim: int

    @nn.compact
    def __call__(self, timestep: Array) -> Array:
        """timestep: [B] in 0...1000, fractional allowed. Returns [B, C] float32."""
        half = self.freq_dim // 2
        frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
        angles = timestep.astype(jnp.float32)[:, None] * frequencies  # [B] -> [B, half]
        x = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)  # [B, freq_dim]
        x = Linear(self.dim, kernel_init=_condition_init, kernel_axes=(None, "embed"), name="linear_1")(x)
        return Linear(self.dim, kernel_init=_condition_init, kernel_axes=("embed", None), name="linear_2")(silu(x))


class TextProjection(nn.Module):
    """Two-layer GELU network from the text encoder's width to the model's."""

    dim: int
    dtype: Dtype

    @nn.compact
    def __call__(self, rows: Array) -> Array:
        """[B, K, text_dim] -> [B, K, C]."""
        x = Linear(self.dim, dtype=self.dtype, kernel_init=_condition_init, kernel_axes=(None, "embed"),
                   name="linear_1")(rows)
        return Linear(self.dim, dtype=self.dtype, kernel_init=_condition_init, kernel_axes=("embed", None),
                      name="linear_2")(gelu(x))


class ConditionEmbedder(nn.Module):
    """Source: diffusers ``HeliosTimeTextEmbedding``."""

    config: TransformerConfig
    dtype: Dtype

    def setup(self):
        dim = self.config.dim
        self.time_embedder = TimestepEmbedder(dim, self.config.freq_dim)
        self.time_proj = Linear(6 * dim, dtype=self.dtype, kernel_init=_condition_init, kernel_axes=("embed", "mlp"))
        self.text_embedder = TextProjection(dim, self.dtype)

    def time(self, timestep: Array) -> tuple[Array, Array]:
        """timestep [B] -> (embedding [B, C], modulation [B, 6, C]), both in the model's dtype."""
        embedding = self.time_embedder(timestep).astype(self.dtype)
        modulation = self.time_proj(silu(embedding))
        return embedding, modulation.reshape(-1, 6, self.config.dim)  # [B, 6C] -> [B, 6, C]

    def text(self, rows: Array) -> Array:
        return self.text_embedder(rows)

    def __call__(self, timestep: Array, rows: Array):
        return self.time(timestep), self.text(rows)
