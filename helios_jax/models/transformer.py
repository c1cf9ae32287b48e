"""The Helios video transformer (diffusers ``HeliosTransformer3DModel``).

The sequence of one chunk is ``[long | mid | short | current]``: 16 + 2 + 2 frames of history, compacted by patch
convolutions of growing size, and the 9 noisy frames. History tokens carry the modulation of timestep 0, current
tokens that of their own timestep; so modulation is two vectors per sample and never a tensor per token.

Parameters are one plain dict (see ``helios_jax.models`` for the naming). The blocks are stacked along a leading layer
axis; :meth:`HeliosTransformer.apply` has one loop over them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from helios_jax.config import TransformerConfig
from helios_jax.errors import UserError
from helios_jax.models.embedders import ConditionEmbedder, PatchEmbedding
from helios_jax.models.inputs import FrameIndices, History
from helios_jax.models.layers import Linear, gelu, layer_norm
from helios_jax.models.rope import rotary_tables
from helios_jax.models.streaming import scan_layers
from helios_jax.sharding import constrain
from kernels.attention import (
    HistoryKeysValues,
    compacted_attention,
    cross_attention,
    prepare_history,
    rms_norm_heads,
)

Array = jax.Array
Dtype = Any
Params = Mapping[str, Any]

# Parameters that stay in float32 when the model computes in a half type (the original's _keep_in_fp32_modules).
FLOAT32_PARAMETERS = ("time_embedder", "scale_shift_table", "norm2", "history_key_scale")
# log(0) for an attention bias: finite, so that gradients stay finite.
MASKED = -1e30

class TextContext(NamedTuple):
    """Cross-attention keys and values of a batch of prompts; they depend on neither the timestep nor the latents.

    keys, values: [L, B, K, N, D] (normed keys); bias: [B, K] float32 added to the logits. Row K-1 stands for all
    padded prompt rows, which are identical after the text projection: its bias is log(512 - length).
    """

    keys: Array
    values: Array
    bias: Array


class HistoryContext(NamedTuple):
    """Keys and values of the history in every layer [L, B, S_history, N, D], of :meth:`history_context`."""

    keys: Array
    values: Array


class TextRows(NamedTuple):
    """Projected prompt rows [B, K, C] and their bias [B, K]: keys and values are then made inside each block."""

    rows: Array
    bias: Array


class Attention(nn.Module):
    """Projections and q/k norms of one attention layer. Source: diffusers ``HeliosAttention``."""

    config: TransformerConfig
    dtype: Dtype
    is_cross: bool
    implementation: str | None = None

    def setup(self):
        dim = self.config.dim
        into_heads = functools.partial(Linear, dim, dtype=self.dtype, kernel_axes=("embed", "heads"))
        self.to_q, self.to_k, self.to_v = into_heads(), into_heads(), into_heads()
        self.to_out_0 = Linear(dim, dtype=self.dtype, kernel_axes=("heads", "embed"))
        self.norm_q, self.norm_k = NormWeight(dim), NormWeight(dim)
        if self.config.is_amplify_history and not self.is_cross:
            size = self.config.num_attention_heads if self.config.history_scale_mode == "per_head" else 1
            self.history_key_scale = self.param("history_key_scale", nn.initializers.ones, (size,), jnp.float32)

    def _history_scale(self) -> Array | None:
        return 1.0 + jax.nn.sigmoid(self.history_key_scale) * 9.0 if self.config.is_amplify_history else None

    def self_attention(self, x: Array, cos: Array, sin: Array, history_length: int,
                       history: HistoryKeysValues | None = None) -> Array:
        """x [B, S, C] -> [B, S, C]; cos, sin [S, D/2]. ``history`` stands for history tokens that are not in x."""
        restrict = self.config.restrict_self_attn and 0 < history_length < x.shape[1]
        out = compacted_attention(
            self.to_q(x), self.to_k(x), self.to_v(x), norm_q=self.norm_q(), norm_k=self.norm_k(), cos=cos, sin=sin,
            num_heads=self.config.num_attention_heads, eps=self.config.eps, history_length=history_length,
            history_key_scale=self._history_scale(), restrict_self_attn=restrict, history=history,
            implementation=self.implementation)
        return self.to_out_0(out)

    def history_keys_values(self, x: Array, cos: Array, sin: Array) -> HistoryKeysValues:
        """Of history tokens x [B, H, C]."""
        return prepare_history(
            self.to_k(x), self.to_v(x), norm_k=self.norm_k(), cos=cos, sin=sin, eps=self.config.eps,
            num_heads=self.config.num_attention_heads, history_key_scale=self._history_scale())

    def text_keys_values(self, rows: Array) -> tuple[Array, Array]:
        """Projected prompt rows [B, K, C] -> normed keys and values, each [B, K, N, D]."""
        heads = self.config.num_attention_heads
        keys = rms_norm_heads(self.to_k(rows), self.norm_k(), self.config.eps, heads)
        return keys, self.to_v(rows).reshape(keys.shape)

    def cross(self, x: Array, keys: Array, values: Array, bias: Array) -> Array:
        """x [B, S, C] attends to the prompt's keys and values [B, K, N, D]. Returns [B, S, C]."""
        out = cross_attention(self.to_q(x), keys, values, bias, norm_q=self.norm_q(), eps=self.config.eps,
                              num_heads=self.config.num_attention_heads, implementation=self.implementation)
        return self.to_out_0(out)

    def initialise(self, x: Array) -> None:
        """Touches every parameter once, for ``init``."""
        self.to_q(x), self.to_k(x), self.to_v(x), self.to_out_0(x), self.norm_q(), self.norm_k()


class NormWeight(nn.Module):
    """The weight of a norm whose arithmetic happens elsewhere."""

    dim: int

    @nn.compact
    def __call__(self) -> Array:
        return self.param("weight", nn.with_logical_partitioning(nn.initializers.ones, ("embed",)), (self.dim,),
                          jnp.float32)


class AffineNorm(nn.Module):
    """LayerNorm with weight and bias in float32. Source: diffusers ``FP32LayerNorm``."""

    dim: int
    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        weight = self.param("weight", nn.with_logical_partitioning(nn.initializers.ones, ("embed",)), (self.dim,))
        bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, ("embed",)), (self.dim,))
        return layer_norm(x, self.eps) * weight.astype(jnp.float32) + bias.astype(jnp.float32)


class FeedForward(nn.Module):
    """GELU network. Parameters ``net_0/proj`` and ``net_2`` as in the checkpoint."""

    hidden: int
    dim: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = constrain(GeluProjection(self.hidden, self.dtype, name="net_0")(x), "batch", "sequence", "hidden")
        return Linear(self.dim, dtype=self.dtype, kernel_axes=("mlp", "embed"), name="net_2")(x)


class GeluProjection(nn.Module):
    features: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = Linear(self.features, dtype=self.dtype, kernel_axes=("embed", "mlp"), name="proj")(x)
        return gelu(x)


class Segments(NamedTuple):
    """Modulation vectors of the two token segments.

    current: [B, 6, C] (or [B, 2, C] at the output); history: [1, 6, C], or None where all tokens share one timestep.
    """

    current: Array
    history: Array | None


class Block(nn.Module):
    """One transformer block. Source: diffusers ``HeliosTransformerBlock``."""

    config: TransformerConfig
    dtype: Dtype
    implementation: str | None = None

    def setup(self):
        config = self.config
        self.attn1 = Attention(config, self.dtype, is_cross=False, implementation=self.implementation)
        self.attn2 = Attention(config, self.dtype, is_cross=True, implementation=self.implementation)
        if config.cross_attn_norm:
            self.norm2 = AffineNorm(config.dim, config.eps)
        self.ffn = FeedForward(config.ffn_dim, config.dim, self.dtype)
        self.scale_shift_table = self.param(
            "scale_shift_table", nn.with_logical_partitioning(nn.initializers.normal(config.dim**-0.5),
                                                              (None, "embed")), (6, config.dim), jnp.float32)

    def __call__(self, x: Array, modulation: Segments, text: TextContext | TextRows | None, cos: Array, sin: Array,
                 history_length: int, history: HistoryKeysValues | None = None) -> Array:
        """One block.

        Args:
          x: [B, S, C] in the model's dtype.
          modulation: of the timestep, before this block's table is added.
          text: this layer's keys and values [B, K, N, D], or the projected rows; None where x is history only.
          cos, sin: [S, D/2] float32.
          history_length: number of history tokens at the front.
          history: this layer's keys and values of history tokens that are not in x.
        Returns: [B, S, C].
        """
        x = constrain(x, "batch", "sequence", None)
        shift1, scale1, gate1, shift2, scale2, gate2 = self._per_token(modulation, x.shape[1], history_length)

        y = layer_norm(x, self.config.eps) * (1 + scale1) + shift1
        y = self.attn1.self_attention(y.astype(self.dtype), cos, sin, history_length, history)
        x = (x.astype(jnp.float32) + y * gate1).astype(self.dtype)

        # With guidance_cross_attn only the current tokens read the prompt.
        start = history_length if self.config.guidance_cross_attn else 0
        if start < x.shape[1]:
            queries = x[:, start:] + self._read_prompt(x[:, start:], text)
            x = jnp.concatenate([x[:, :start], queries], axis=1) if start else queries

        y = layer_norm(x, self.config.eps) * (1 + scale2) + shift2
        y = self.ffn(y.astype(self.dtype))
        x = (x.astype(jnp.float32) + y.astype(jnp.float32) * gate2).astype(self.dtype)
        return constrain(x, "batch", "sequence", None)

    def _read_prompt(self, x: Array, text: TextContext | TextRows) -> Array:
        y = self.norm2(x).astype(self.dtype) if self.config.cross_attn_norm else x
        if isinstance(text, TextRows):
            keys, values = self.attn2.text_keys_values(text.rows)
        else:
            keys, values = text.keys, text.values
        return self.attn2.cross(y, keys, values, text.bias)

    def history_keys_values(self, x: Array, modulation: Segments, cos: Array, sin: Array) -> HistoryKeysValues:
        """Of history tokens x [B, H, C] in front of this block."""
        shift, scale, *_ = self._per_token(modulation, x.shape[1], x.shape[1])
        y = layer_norm(x, self.config.eps) * (1 + scale) + shift
        return self.attn1.history_keys_values(y.astype(self.dtype), cos, sin)

    def _per_token(self, modulation: Segments, length: int, history_length: int) -> list[Array]:
        """Six float32 vectors that broadcast over [B, S, C]; a select per token, which XLA fuses away."""
        table = self.scale_shift_table.astype(jnp.float32)
        current = table + modulation.current.astype(jnp.float32)  # [B, 6, C]
        vectors = [current[:, i, None] for i in range(6)]  # [B, 6, C] -> six of [B, 1, C]
        if modulation.history is None or history_length == 0:
            return vectors
        history = table + modulation.history.astype(jnp.float32)
        is_history = (jnp.arange(length) < history_length)[None, :, None]  # [1, S, 1]
        return [jnp.where(is_history, history[:, i, None], vectors[i]) for i in range(6)]

    def text_keys_values(self, rows: Array) -> tuple[Array, Array]:
        return self.attn2.text_keys_values(rows)

    def initialise(self, x: Array) -> None:
        self.attn1.initialise(x), self.attn2.initialise(x), self.ffn(x)
        if self.config.cross_attn_norm:
            self.norm2(x)


class OutputTable(nn.Module):
    dim: int

    @nn.compact
    def __call__(self) -> Array:
        init = nn.with_logical_partitioning(nn.initializers.normal(self.dim**-0.5), (None, "embed"))
        return self.param("scale_shift_table", init, (2, self.dim), jnp.float32)


class OutputHead(nn.Module):
    """Modulated norm and projection of the current tokens. Source: diffusers ``HeliosOutputNorm``, ``proj_out``."""

    config: TransformerConfig
    dtype: Dtype

    def setup(self):
        self.norm_out = OutputTable(self.config.dim)
        self.proj_out = Linear(4 * self.config.out_channels, dtype=self.dtype, kernel_init=nn.initializers.zeros,
                               kernel_axes=("embed", None))

    def __call__(self, x: Array, embedding: Array) -> Array:
        """x: [B, S_current, C]; embedding: [B, C] of the timestep. Returns [B, S_current, 4 * C_out]."""
        table = self.norm_out().astype(jnp.float32) + embedding.astype(jnp.float32)[:, None]  # [B, 2, C]
        shift, scale = table[:, :1], table[:, 1:]
        y = layer_norm(x, self.config.eps) * (1 + scale) + shift
        return self.proj_out(y.astype(self.dtype))


def unpatchify(x: Array, frames: int, rows: int, columns: int) -> Array:
    """[B, T*y*x, 4*C] with the channel fastest -> latents [B, T, 2y, 2x, C]."""
    return rearrange(x, "b (t y x) (kh kw c) -> b t (y kh) (x kw) c", t=frames, y=rows, x=columns, kh=2, kw=2)


def _replicate_pad(x: Array, multiple: tuple[int, int, int]) -> Array:
    """Repeats the last frame, row and column of [B, T, h, w, C] up to multiples."""
    pads = [(0, -size % k) for size, k in zip(x.shape[1:4], multiple, strict=True)]
    return jnp.pad(x, [(0, 0), *pads, (0, 0)], mode="edge") if any(p for _, p in pads) else x


_HEAD = ("norm_out", "proj_out")


@dataclasses.dataclass(frozen=True)
class HeliosTransformer:
    """The model as two pure functions: :meth:`init` and :meth:`apply`.

    Attributes:
      config: shapes and options.
      dtype: compute dtype (float32 or bfloat16); islands of float32 are kept as in the original.
      unroll: layers per iteration of the scan over layers; 0 unrolls all (fastest on a CPU, slowest to compile).
      remat: name of a ``jax.checkpoint_policies`` entry for the blocks in training, or None to keep activations.
      attention: attention variant by name, or None for the device's default.
      for_sampling: the last block makes nothing of the history, which nobody reads. The numbers stay the same; without
        gradients only (see :func:`helios_jax.models.streaming.scan_layers`).
      streamed: the weights of the blocks lie in the host's memory and visit the device.
    """

    config: TransformerConfig
    dtype: Dtype = jnp.float32
    unroll: int = 1
    remat: str | None = None
    attention: str | None = None
    for_sampling: bool = False
    streamed: bool = False

    # -- parameters ---------------------------------------------------------------------------------------------

    def init(self, key: Array) -> dict[str, Any]:
        """Random parameters (the original's initialisation) as a plain dict; leaves may be boxed with logical axes.

        Use ``helios_jax.models.partition.unbox`` for plain arrays, ``logical_axes`` for the axis names.
        """
        config = self.config
        keys = iter(jax.random.split(key, 8))
        latents = jnp.zeros((1, 4, 8, 8, config.in_channels))
        params = {"patch_embedding": self._patch("patch_embedding").init(next(keys), latents)["params"]}
        if config.has_multi_term_memory_patch:
            for name in ("patch_short", "patch_mid", "patch_long"):
                params[name] = self._patch(name).init(next(keys), latents)["params"]
        rows = jnp.zeros((1, 1, config.text_dim))
        params["condition_embedder"] = self._conditions.init(next(keys), jnp.zeros(1), rows)["params"]
        tokens = jnp.zeros((1, 1, config.dim))

        def init_block(key):
            return self._block.init(key, tokens, method=Block.initialise)["params"]

        blocks = jax.vmap(init_block)(jax.random.split(next(keys), config.num_layers))
        is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
        params["blocks"] = jax.tree.map(
            lambda leaf: leaf.replace(names=("layers", *leaf.names)) if is_box(leaf) else leaf, blocks, is_leaf=is_box)
        params |= self._head.init(next(keys), tokens, jnp.zeros((1, config.dim)))["params"]
        return params

    # -- forward ------------------------------------------------------------------------------------------------

    def apply(
        self,
        variables: Mapping[str, Any],
        latents: Array,
        timestep: Array,
        text: TextContext | TextRows,
        history: History | Array | HistoryContext | None = None,
        *,
        indices: FrameIndices | None = None,
        history_size: tuple[int, int] | None = None,
        features: tuple[int, ...] = (),
    ) -> Array | tuple[Array, Array]:
        """Velocity of the current frames.

        Args:
          variables: ``{"params": ..., "lora": ...}``; "lora" is optional.
          latents: [B, T, h, w, 16] noisy frames at any pyramid resolution; h, w even.
          timestep: [B] in 0...1000.
          text: from :meth:`text_context` (sampling) or :meth:`text_rows` (training).
          history: latents, or their tokens from :meth:`embed_history`, or their keys and values from
            :meth:`history_context`, or None for no history.
          indices: frame indices; default: the window [anchor | long | mid | 1x | current] with history, 0...T-1
            without.
          history_size: (H', W') of the history latents; needed only where ``history`` is given as tokens.
          features: blocks, counted from 0, behind which the current tokens are returned, too.
        Returns: [B, T, h, w, 16] in the model's dtype; with ``features`` also the tokens [F, B, T, h/2, w/2, C].
        """
        config = self.config
        params, lora = variables["params"], variables.get("lora") or {}
        _, frames, height, width, _ = latents.shape
        rows, columns = height // 2, width // 2

        x = self._run(self._patch("patch_embedding"), "patch_embedding", params, lora, latents)
        x = rearrange(x, "b t y x c -> b (t y x) c")
        history_length = 0
        if isinstance(history, HistoryContext):
            indices = FrameIndices((indices or FrameIndices.for_history(frames=frames)).current)
        elif history is not None:
            if isinstance(history, History):
                history_size = history.short.shape[2:4]
                counts = tuple(part.shape[1] for part in (history.long, history.mid))
                default = FrameIndices.for_history((*counts, history.short.shape[1] - 1), frames)
                history = self.embed_history(variables, history)
            else:
                default = FrameIndices.for_history(frames=frames)
            indices = indices or default
            history_length = history.shape[1]
            x = jnp.concatenate([history, x], axis=1)  # history tokens stand in front
        indices = indices or FrameIndices(tuple(range(frames)))
        history_grid = (history_size[0] // 2, history_size[1] // 2) if history_size else (0, 0)
        cos, sin = (jnp.asarray(table) for table in rotary_tables(indices, (rows, columns), history_grid,
                                                                   config.rope_dim, config.rope_theta))

        embedding, modulation = self._run(self._conditions, "condition_embedder", params, lora, timestep,
                                          method=ConditionEmbedder.time)
        at_zero = None
        if config.zero_history_timestep and history_length:
            _, at_zero = self._run(self._conditions, "condition_embedder", params, lora, jnp.zeros(1),
                                   method=ConditionEmbedder.time)
        x, kept = self._blocks(params["blocks"], lora.get("blocks"), x, Segments(modulation, at_zero), text, cos, sin,
                               history_length, history if isinstance(history, HistoryContext) else None, features)
        head_params = {name: params[name] for name in _HEAD}
        head_lora = {name: lora[name] for name in _HEAD if name in lora}
        x = self._head.apply({"params": head_params, "lora": head_lora}, x, embedding)
        velocity = unpatchify(x, frames, rows, columns)
        if not features:
            return velocity
        return velocity, rearrange(kept, "f b (t y x) c -> f b t y x c", t=frames, y=rows, x=columns)

    def embed_history(self, variables: Mapping[str, Any], history: History) -> Array:
        """History latents -> tokens [B, S_history, C] in the order long, mid, short.

        They depend on neither the timestep nor the noise: once per chunk is enough.
        """
        params, lora = variables["params"], variables.get("lora") or {}
        parts = []
        for name, latents, k in (("patch_long", history.long, 4), ("patch_mid", history.mid, 2),
                                 ("patch_short", history.short, 1)):
            padded = _replicate_pad(latents, (k, 2 * k, 2 * k)) if k > 1 else latents
            x = self._run(self._patch(name), name, params, lora, padded)
            parts.append(rearrange(x, "b t y x c -> b (t y x) c"))
        return jnp.concatenate(parts, axis=1)

    def history_context(self, variables: Mapping[str, Any], history: History, indices: FrameIndices | None = None
                        ) -> HistoryContext:
        """The history's keys and values in every layer of a model with ``restrict_self_attn``: once per chunk.

        Args:
          variables: as for :meth:`apply`.
          history: latents.
          indices: as for :meth:`apply`.

        Raises:
          UserError: history tokens of this model see the noise.
        """
        if not self.config.restrict_self_attn:
            raise UserError("restrict_self_attn: must be true for the history's keys and values to be kept, got False")
        params, lora = variables["params"], variables.get("lora") or {}
        x = self.embed_history(variables, history)
        indices = dataclasses.replace(indices or FrameIndices.for_history(), current=())
        rows, columns = history.short.shape[2] // 2, history.short.shape[3] // 2
        cos, sin = (jnp.asarray(table) for table in rotary_tables(indices, (rows, columns), (rows, columns),
                                                                   self.config.rope_dim, self.config.rope_theta))
        _, at_zero = self._run(self._conditions, "condition_embedder", params, lora, jnp.zeros(1),
                               method=ConditionEmbedder.time)
        modulation = Segments(at_zero, at_zero)

        def one_block(x, params, adapter):
            own = self._layer_variables(params, adapter)
            keys_values = self._block.apply(own, x, modulation, cos, sin, method=Block.history_keys_values)
            return self._block.apply(own, x, modulation, None, cos, sin, x.shape[1]), HistoryContext(*keys_values)

        _, context = scan_layers(one_block, x, params["blocks"], lora.get("blocks"), streamed=self.streamed)
        return context

    def text_rows(self, variables: Mapping[str, Any], rows: Array, lengths: Array, total: int = 512) -> TextRows:
        """Projects prompt embeddings and folds the padded rows into one.

        Rows beyond a prompt's length are zeros in the original and therefore identical after the projection; n equal
        keys weigh as much as one key with log(n) added to its logit, exactly.

        Args:
          rows: [B, K', text_dim], real rows first; what stands beyond ``lengths`` is ignored.
          lengths: [B] number of real rows.
          total: rows of the original's padded sequence.
        """
        params, lora = variables["params"], variables.get("lora") or {}
        rows = jnp.pad(rows, ((0, 0), (0, 1), (0, 0)))  # [B, K', D] -> [B, K'+1, D]: the padded row
        projected = self._run(self._conditions, "condition_embedder", params, lora, rows.astype(self.dtype),
                              method=ConditionEmbedder.text)
        position = jnp.arange(rows.shape[1])[None, :]
        padding = jnp.asarray(total - lengths)[:, None].astype(jnp.float32)
        padded_bias = jnp.where(padding > 0, jnp.log(jnp.maximum(padding, 1.0)), MASKED)
        bias = jnp.where(position < jnp.asarray(lengths)[:, None], 0.0, MASKED)
        # A mask where the padded row stands beyond the last real one, in every sample.
        return TextRows(projected, jnp.where(position == rows.shape[1] - 1, padded_bias, bias))

    def text_context(self, variables: Mapping[str, Any], rows: Array, lengths: Array, total: int = 512
                     ) -> TextContext:
        """Cross-attention keys and values of every layer: once per prompt. Arguments as :meth:`text_rows`."""
        text = self.text_rows(variables, rows, lengths, total)
        lora = (variables.get("lora") or {}).get("blocks")

        def one_block(_, params, adapter):
            own = self._layer_variables(params, adapter)
            return None, self._block.apply(own, text.rows, method=Block.text_keys_values)

        _, (keys, values) = scan_layers(one_block, None, variables["params"]["blocks"], lora, streamed=self.streamed)
        return TextContext(keys, values, text.bias)

    def _blocks(self, blocks: Params, lora: Params | None, x: Array, modulation: Segments,
                text: TextContext | TextRows, cos: Array, sin: Array, history_length: int,
                history: HistoryContext | None, features: tuple[int, ...]) -> tuple[Array, Array | None]:
        """The only loop over blocks. Returns the current tokens, and those behind the blocks ``features``."""
        layers, current = self.config.num_layers, x.shape[1] - history_length
        kept = slots = None
        if features:  # every layer writes its tokens somewhere; those that nobody wants overwrite each other
            slots = jnp.asarray([features.index(i) if i in features else len(features) for i in range(layers)])
            kept = jnp.zeros((len(features) + 1, *x[:, -current:].shape), x.dtype)

        def one_block(carry, params, others, is_last=False):
            x, kept = carry
            adapter, keys_values, past, slot = others
            own, front = self._layer_variables(params, adapter), history_length
            layer_text = text if keys_values is None else TextContext(*keys_values, text.bias)
            past, tables = past and HistoryKeysValues(*past), (cos, sin)
            if is_last and front:  # nobody reads what it would make of the history: keys and values are enough
                before, tables = ([table[rows] for table in tables] for rows in (slice(front), slice(front, None)))
                past = self._block.apply(own, x[:, :front], modulation, *before, method=Block.history_keys_values)
                x, front = x[:, front:], 0
            y = self._block.apply(own, x, modulation, layer_text, *tables, front, past)
            if features:
                kept = jax.lax.dynamic_update_index_in_dim(kept, y[:, -current:], slot, 0)
            return (y, kept), None

        last = functools.partial(one_block, is_last=True) if self.for_sampling else None
        if self.remat is not None:
            policy = getattr(jax.checkpoint_policies, self.remat)
            one_block = jax.checkpoint(one_block, policy=policy, prevent_cse=False)
        keys_values = (text.keys, text.values) if isinstance(text, TextContext) else None
        (x, kept), _ = scan_layers(one_block, (x, kept), blocks, (lora, keys_values, history, slots), last=last,
                                   unroll=self.unroll or layers, streamed=self.streamed)
        return x[:, -current:], kept[:-1] if features else None

    # -- pieces -------------------------------------------------------------------------------------------------

    def _patch(self, name: str) -> PatchEmbedding:
        k = {"patch_embedding": 1, "patch_short": 1, "patch_mid": 2, "patch_long": 4}[name]
        return PatchEmbedding((k, 2 * k, 2 * k), self.config.dim, self.dtype)

    @property
    def _conditions(self) -> ConditionEmbedder:
        return ConditionEmbedder(self.config, self.dtype)

    @property
    def _block(self) -> Block:
        return Block(self.config, self.dtype, self.attention)

    @property
    def _head(self) -> OutputHead:
        return OutputHead(self.config, self.dtype)

    @staticmethod
    def _layer_variables(params: Params, lora: Params | None) -> dict[str, Any]:
        return {"params": params} if lora is None else {"params": params, "lora": lora}

    @staticmethod
    def _run(module: nn.Module, name: str, params: Params, lora: Params, *args, **kwargs):
        return module.apply({"params": params[name], "lora": lora.get(name, {})}, *args, **kwargs)
