"""The UMT5 text encoder: token ids to one embedding row per token.

It differs from T5 in that every layer has its own table of relative-position biases. It differs from the Helios
transformer in that attention is not scaled by the head size and that the RMS weight is applied after the cast to the
compute type.

Source: transformers ``UMT5EncoderModel``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from helios_jax.config import TextEncoderConfig
from helios_jax.models.layers import Array, Dtype, Linear
from helios_jax.models.partition import unbox
from helios_jax.models.streaming import scan_layers, to_device
from kernels.attention import precision_of


@functools.lru_cache(maxsize=64)
def relative_buckets(length: int, num_buckets: int = 32, max_distance: int = 128) -> np.ndarray:
    """Which row of the relative-bias table belongs to each pair of positions.

    Half of the buckets are for keys after the query. Of each half, the first half counts single steps and the rest
    grows logarithmically up to ``max_distance``; everything farther shares the last bucket.

    Returns: int32 [length (query), length (key)], read-only (it is shared between calls).
    Source: ``UMT5Attention._relative_position_bucket``, bidirectional.
    """
    per_side = num_buckets // 2
    exact = per_side // 2
    distance = np.arange(length)
    # float32 on purpose: at the bucket borders the rounding of the logarithm decides, and the original has float32.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact)) / np.float32(
        math.log(max_distance / exact))
    logarithmic = exact + (ratio * np.float32(per_side - exact)).astype(np.int64)
    one_side = np.where(distance < exact, distance, np.minimum(logarithmic, per_side - 1))  # [length]
    offset = distance[None, :] - distance[:, None]  # [query, key]
    buckets = (one_side[np.abs(offset)] + per_side * (offset > 0)).astype(np.int32)
    buckets.flags.writeable = False
    return buckets


class RMSNorm(nn.Module):
    """Root-mean-square norm with float32 statistics; the weight is multiplied after the cast to ``dtype``.

    Takes [..., D] of any float type, returns [..., D] of ``dtype``. Source: ``UMT5LayerNorm``.
    """

    eps: float
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        weight = self.param("weight", nn.with_logical_partitioning(nn.initializers.ones, ("embed",)),
                            (x.shape[-1],), self.param_dtype)
        x = x.astype(jnp.float32)
        y = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        return y.astype(self.dtype) * weight.astype(self.dtype)


class RelativeBias(nn.Module):
    """The learnt bias of one layer, float32 [N, S, S], added to the attention logits."""

    num_buckets: int
    num_heads: int
    init_std: float
    param_dtype: Dtype

    @nn.compact
    def __call__(self, buckets: Array) -> Array:
        weight = self.param("weight",
                            nn.with_logical_partitioning(nn.initializers.normal(self.init_std), (None, "heads")),
                            (self.num_buckets, self.num_heads), self.param_dtype)
        return jnp.moveaxis(weight.astype(jnp.float32)[buckets], -1, 0)  # [S,S] -> [S,S,N] -> [N,S,S]


class SelfAttention(nn.Module):
    """Bidirectional attention with relative bias, no 1/sqrt(D) and no linear biases.

    From the projected queries, keys and values to the weighted sum it computes in float32.
    """

    config: TextEncoderConfig
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, mask: Array, buckets: Array) -> Array:
        config = self.config
        inner = config.num_heads * config.d_kv

        def project(name: str, features: int, std: float, axes: tuple[str, str]) -> Linear:
            return Linear(features, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype,
                          kernel_init=nn.initializers.normal(std), kernel_axes=axes, name=name)

        # Queries start smaller by sqrt(D): that takes the place of the missing scale in the softmax.
        std = config.d_model**-0.5
        query = project("q", inner, std * config.d_kv**-0.5, ("embed", "heads"))(x)
        key = project("k", inner, std, ("embed", "heads"))(x)
        value = project("v", inner, std, ("embed", "heads"))(x)
        split = (*x.shape[:-1], config.num_heads, config.d_kv)
        query, key, value = (t.reshape(split) for t in (query, key, value))  # [B,S,N*D] -> [B,S,N,D]

        bias = RelativeBias(config.relative_attention_num_buckets, config.num_heads, std, self.param_dtype,
                            name="relative_attention_bias")(buckets)
        logits = jnp.einsum("BTND,BSND->BNTS", query, key, precision=precision_of(query.dtype),
                            preferred_element_type=jnp.float32) + bias
        logits = jnp.where(mask[:, None, None, :], logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1)  # [B,N,T,S]
        out = jnp.einsum("BNTS,BSND->BTND", weights, value.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
        out = out.reshape(*x.shape[:-1], inner)  # [B,T,N,D] -> [B,T,N*D]
        return project("o", config.d_model, inner**-0.5, ("heads", "embed"))(out)


class GatedFeedForward(nn.Module):
    """wo(gelu(wi_0 x) * wi_1 x) with the tanh-approximate GELU."""

    config: TextEncoderConfig
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config = self.config

        def project(name: str, features: int, fan_in: int, axes: tuple[str, str], dtype: Dtype) -> Linear:
            return Linear(features, use_bias=False, dtype=dtype, param_dtype=self.param_dtype,
                          kernel_init=nn.initializers.normal(fan_in**-0.5), kernel_axes=axes, name=name)

        gate = project("wi_0", config.d_ff, config.d_model, ("embed", "mlp"), self.dtype)(x)
        up = project("wi_1", config.d_ff, config.d_model, ("embed", "mlp"), self.dtype)(x)
        # GELU and product in float32, rounded once.
        hidden = (nn.gelu(gate.astype(jnp.float32), approximate=True) * up.astype(jnp.float32)).astype(self.dtype)
        # In float16 the original keeps this one matrix in float32, because its output overflows.
        wo_dtype = jnp.float32 if self.dtype == jnp.float16 else self.dtype
        return project("wo", config.d_model, config.d_ff, ("mlp", "embed"), wo_dtype)(hidden)


class AttentionLayer(nn.Module):
    """The residual branch of sub-layer 0: attention of the normed input."""

    config: TextEncoderConfig
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, mask: Array, buckets: Array) -> Array:
        normed = RMSNorm(self.config.layer_norm_epsilon, self.dtype, self.param_dtype, name="layer_norm")(x)
        return SelfAttention(self.config, self.dtype, self.param_dtype, name="SelfAttention")(normed, mask, buckets)


class FeedForwardLayer(nn.Module):
    """The residual branch of sub-layer 1: feed-forward of the normed input."""

    config: TextEncoderConfig
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        normed = RMSNorm(self.config.layer_norm_epsilon, self.dtype, self.param_dtype, name="layer_norm")(x)
        return GatedFeedForward(self.config, self.dtype, self.param_dtype, name="DenseReluDense")(normed)


class Block(nn.Module):
    """One layer: x [B,S,D] float32 to the same; mask and buckets are those of every layer."""

    config: TextEncoderConfig
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, mask: Array, buckets: Array) -> Array:
        attended = AttentionLayer(self.config, self.dtype, self.param_dtype, name="layer_0")(x, mask, buckets)
        x = x + attended.astype(jnp.float32)
        fed = FeedForwardLayer(self.config, self.dtype, self.param_dtype, name="layer_1")(x)
        return x + fed.astype(jnp.float32)


def _buckets(config: TextEncoderConfig, length: int) -> Array:
    return jnp.asarray(relative_buckets(length, config.relative_attention_num_buckets,
                                        config.relative_attention_max_distance))


class Embedding(nn.Module):
    """The token table; ids [B,S] to rows [B,S,D]."""

    vocab_size: int
    features: int
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        weight = self.param("weight", nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed")),
                            (self.vocab_size, self.features), self.param_dtype)
        return weight[ids].astype(self.dtype)  # [B,S] -> [B,S,D]


@dataclasses.dataclass(frozen=True)
class UMT5Encoder:
    """The encoder half of UMT5 as two pure functions: :meth:`init_params` and :meth:`apply`.

    Attributes:
      config: sizes.
      dtype: compute type; float32, bfloat16 or float16. The residual, the norm statistics and what happens between
        the linear maps (attention weights and sums, the gate of the feed-forward) are float32 in any case.
      param_dtype: type of freshly initialised parameters. Loaded parameters may have any float type.
      unroll: layers per step of the scan over layers; ``config.num_layers`` unrolls it, which compiles longer.
      streamed: the table of tokens and the layers' weights lie in the host's memory and visit the device.

    Source: transformers ``UMT5EncoderModel`` (eager attention, no dropout).
    """

    config: TextEncoderConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    unroll: int = 1
    streamed: bool = False

    def apply(self, variables: Mapping[str, Any], ids: Array, mask: Array) -> Array:
        """Encodes token ids.

        Args:
          variables: ``{"params": ...}``.
          ids: int32 [B, S], each in [0, vocab_size); a larger id would silently read the last row.
          mask: bool or integer [B, S], true at real tokens. Rows at other positions are computed but mean nothing;
            every sample needs at least one real token.
        Returns: last hidden state [B, S, D] in ``dtype``.
        """
        params, mask = variables["params"], mask.astype(bool)
        table, layers = params["shared"], params["encoder"]["block"]
        x = self._table.apply({"params": to_device(table) if self.streamed else table}, ids)
        buckets = _buckets(self.config, x.shape[1])
        # The residual is carried in float32 whatever ``dtype`` is. In float16 the original gets there by promotion
        # behind its first float32 ``wo``, which leaves nothing for its clamps to do; in bfloat16 it rounds after
        # every sub-layer, which only loses accuracy.
        x, _ = scan_layers(lambda x, layer, _: (self._block.apply({"params": layer}, x, mask, buckets), None),
                           x.astype(jnp.float32), layers, unroll=self.unroll, streamed=self.streamed)
        return self._norm.apply({"params": params["encoder"]["final_layer_norm"]}, x)

    def init_params(self, key: Array) -> dict[str, Any]:
        """Fresh parameters as a plain nested dict, distributed as the original initialises them for training."""
        config = self.config
        ids = jnp.zeros((1, 2), jnp.int32)
        x = jnp.zeros((1, 2, config.d_model))

        def fresh(key: Array) -> dict[str, Any]:
            of_table, of_layers, of_norm = jax.random.split(key, 3)
            block = jax.vmap(lambda key: self._block.init(key, x, ids == 0, _buckets(config, 2))["params"])(
                jax.random.split(of_layers, config.num_layers))
            return unbox({"shared": self._table.init(of_table, ids)["params"],
                          "encoder": {"block": block, "final_layer_norm": self._norm.init(of_norm, x)["params"]}})

        # Compiled, so that the forward pass of the trace is dropped instead of run.
        return jax.jit(fresh)(key)

    @property
    def _table(self) -> Embedding:
        return Embedding(self.config.vocab_size, self.config.d_model, self.dtype, self.param_dtype)

    @property
    def _block(self) -> Block:
        return Block(self.config, self.dtype, self.param_dtype)

    @property
    def _norm(self) -> RMSNorm:
        return RMSNorm(self.config.layer_norm_epsilon, self.dtype, self.param_dtype)
