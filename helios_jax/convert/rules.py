"""One table per component: every checkpoint tensor, its shape, its place in our parameter tree and the layout change.

The same table serves reading, writing, abstract shapes and the lookup of LoRA targets, so the directions cannot
disagree. A table is computed from the component's configuration; for the published 14B pipeline it has 1101
(transformer), 194 (VAE) and 242 (text encoder) entries.

Names follow three conventions (see ``helios_jax.models``): path components are those of PyTorch, a list index joins
the name before it, and the layers of a stack share one array with the layer as leading axis.

Sources: the state dicts of diffusers ``HeliosTransformer3DModel`` and ``AutoencoderKLWan`` and of transformers
``UMT5EncoderModel``.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from helios_jax.config import TextEncoderConfig, TransformerConfig, VAEConfig
from helios_jax.errors import UserError
from helios_jax.models.quantize import PARTS, format_of

Config = TransformerConfig | VAEConfig | TextEncoderConfig
Path = tuple[str, ...]
Shape = tuple[int, ...]

CONFIG_CLASSES: dict[str, type] = {
    "transformer": TransformerConfig,
    "vae": VAEConfig,
    "text_encoder": TextEncoderConfig,
}
COMPONENTS = tuple(CONFIG_CLASSES)


class Layout(enum.Enum):
    """How a PyTorch tensor becomes an array of our tree (without the layer axis of a stack)."""

    SAME = "same"
    LINEAR = "linear"  # [out, in] -> [in, out]
    CONV = "conv"  # [out, in, k...] -> [k..., in, out]
    GAMMA = "gamma"  # [C, 1, ...] -> [C]: the VAE's norm weights carry their broadcast axes
    TABLE = "table"  # [1, n, C] -> [n, C]: the modulation tables carry a batch axis

    def to_tree(self, tensor: np.ndarray) -> np.ndarray:
        """PyTorch layout to ours; a view wherever numpy allows one."""
        if self is Layout.LINEAR:
            return tensor.T
        if self is Layout.CONV:
            return np.moveaxis(tensor, (0, 1), (-1, -2))
        if self is Layout.GAMMA:
            return tensor.reshape(tensor.shape[0])
        if self is Layout.TABLE:
            return tensor.reshape(tensor.shape[1:])
        return tensor

    def to_torch(self, array: np.ndarray, shape: Shape) -> np.ndarray:
        """Our layout to PyTorch's, whose shape is ``shape``; a view wherever numpy allows one."""
        if self is Layout.LINEAR:
            return array.T
        if self is Layout.CONV:
            return np.moveaxis(array, (-1, -2), (0, 1))
        return array.reshape(shape)

    def row_axis(self, ndim: int) -> int | None:
        """The axis of our array (of ``ndim`` axes) that is PyTorch's first axis; None if that axis was dropped."""
        if self in (Layout.LINEAR, Layout.CONV):
            return ndim - 1
        return None if self is Layout.TABLE or ndim == 0 else 0

    def tree_shape(self, shape: Shape) -> Shape:
        if self is Layout.LINEAR:
            return shape[::-1]
        if self is Layout.CONV:
            return (*shape[2:], shape[1], shape[0])
        if self is Layout.GAMMA:
            return shape[:1]
        if self is Layout.TABLE:
            return shape[1:]
        return shape


@dataclasses.dataclass(frozen=True)
class TensorRule:
    """One tensor of a checkpoint.

    Attributes:
      name: its PyTorch name.
      shape: its PyTorch shape.
      path: where it lives in our tree.
      layout: the layout change between the two.
      layer: its index on the leading axis of the leaf at ``path``, None if the leaf is not stacked.
    """

    name: str
    shape: Shape
    path: Path
    layout: Layout
    layer: int | None


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of our tree and the checkpoint tensors that fill it, in the order of its leading axis if stacked.

    ``part_dtype``: only of the two arrays of a quantised kernel, ``.../kernel/qvalue`` and ``.../kernel/scale``.
    """

    path: Path
    shape: Shape
    tensors: tuple[TensorRule, ...]
    stacked: bool
    part_dtype: np.dtype | None = None

    @property
    def key(self) -> str:
        return "/".join(self.path)


class _Table:
    """Collects the rules of one component under PyTorch names."""

    def __init__(self, stacked_prefix: str | None = None):
        self.rules: list[TensorRule] = []
        self._stacked = None if stacked_prefix is None else re.compile(re.escape(stacked_prefix) + r"\.(\d+)\.")
        self._stacked_prefix = stacked_prefix

    def add(self, name: str, shape: Shape, layout: Layout = Layout.SAME) -> None:
        layer, tree_name = None, name
        if self._stacked and (match := self._stacked.match(name)):
            layer = int(match[1])
            tree_name = f"{self._stacked_prefix}.{name[match.end():]}"
        path: list[str] = []
        for part in tree_name.split("."):
            if part.isdigit():
                path[-1] += f"_{part}"
            else:
                path.append(part)
        if layout in (Layout.LINEAR, Layout.CONV):
            path[-1] = "kernel"
        self.rules.append(TensorRule(name, shape, tuple(path), layout, layer))

    def linear(self, name: str, features_in: int, features_out: int, bias: bool = True) -> None:
        self.add(f"{name}.weight", (features_out, features_in), Layout.LINEAR)
        if bias:
            self.add(f"{name}.bias", (features_out,))

    def conv(self, name: str, channels_in: int, channels_out: int, kernel: Shape) -> None:
        self.add(f"{name}.weight", (channels_out, channels_in, *kernel), Layout.CONV)
        self.add(f"{name}.bias", (channels_out,))


def _transformer(config: TransformerConfig) -> list[TensorRule]:
    table = _Table(stacked_prefix="blocks")
    dim, channels = config.dim, config.in_channels
    kt, kh, kw = config.patch_size
    table.conv("patch_embedding", channels, dim, (kt, kh, kw))
    if config.has_multi_term_memory_patch:
        for tier, factor in HISTORY_PATCHES.items():
            table.conv(tier, channels, dim, (factor * kt, factor * kh, factor * kw))
    table.linear("condition_embedder.time_embedder.linear_1", config.freq_dim, dim)
    table.linear("condition_embedder.time_embedder.linear_2", dim, dim)
    table.linear("condition_embedder.time_proj", dim, 6 * dim)
    table.linear("condition_embedder.text_embedder.linear_1", config.text_dim, dim)
    table.linear("condition_embedder.text_embedder.linear_2", dim, dim)
    for i in range(config.num_layers):
        block = f"blocks.{i}"
        table.add(f"{block}.scale_shift_table", (1, 6, dim), Layout.TABLE)
        for attention in ("attn1", "attn2"):
            for projection in ("to_q", "to_k", "to_v", "to_out.0"):
                table.linear(f"{block}.{attention}.{projection}", dim, dim)
            for norm in ("norm_q", "norm_k"):
                table.add(f"{block}.{attention}.{norm}.weight", (dim,))
        if config.is_amplify_history:
            scales = config.num_attention_heads if config.history_scale_mode == "per_head" else 1
            table.add(f"{block}.attn1.history_key_scale", (scales,))
        if config.cross_attn_norm:
            table.add(f"{block}.norm2.weight", (dim,))
            table.add(f"{block}.norm2.bias", (dim,))
        table.linear(f"{block}.ffn.net.0.proj", dim, config.ffn_dim)
        table.linear(f"{block}.ffn.net.2", config.ffn_dim, dim)
    table.add("norm_out.scale_shift_table", (1, 2, dim), Layout.TABLE)
    # The outputs keep the checkpoint's order (kt, kh, kw, c), which is not that of the input convolution (c, kt, kh,
    # kw); the model un-patchifies accordingly.
    table.linear("proj_out", dim, math.prod(config.patch_size) * config.out_channels)
    return table.rules


# Kernel of each history convolution in units of the patch size (diffusers HeliosTransformer3DModel).
HISTORY_PATCHES = {"patch_short": 1, "patch_mid": 2, "patch_long": 4}


def _vae(config: VAEConfig) -> list[TensorRule]:
    table = _Table()
    k3 = (3, 3, 3)

    def residual(name: str, channels_in: int, channels_out: int) -> None:
        table.add(f"{name}.norm1.gamma", (channels_in, 1, 1, 1), Layout.GAMMA)
        table.conv(f"{name}.conv1", channels_in, channels_out, k3)
        table.add(f"{name}.norm2.gamma", (channels_out, 1, 1, 1), Layout.GAMMA)
        table.conv(f"{name}.conv2", channels_out, channels_out, k3)
        if channels_in != channels_out:
            table.conv(f"{name}.conv_shortcut", channels_in, channels_out, (1, 1, 1))

    def middle(name: str, channels: int) -> None:
        residual(f"{name}.resnets.0", channels, channels)
        table.add(f"{name}.attentions.0.norm.gamma", (channels, 1, 1), Layout.GAMMA)
        table.conv(f"{name}.attentions.0.to_qkv", channels, 3 * channels, (1, 1))
        table.conv(f"{name}.attentions.0.proj", channels, channels, (1, 1))
        residual(f"{name}.resnets.1", channels, channels)

    levels = len(config.dim_mult)
    # Encoder: a flat list of residual blocks and downsamplers.
    widths = [config.base_dim * m for m in (1, *config.dim_mult)]
    table.conv("encoder.conv_in", config.in_channels, widths[0], k3)
    index = 0
    for level in range(levels):
        channels, wide = widths[level], widths[level + 1]
        for _ in range(config.num_res_blocks):
            residual(f"encoder.down_blocks.{index}", channels, wide)
            channels, index = wide, index + 1
        if level < levels - 1:
            table.conv(f"encoder.down_blocks.{index}.resample.1", wide, wide, (3, 3))
            if config.temperal_downsample[level]:
                table.conv(f"encoder.down_blocks.{index}.time_conv", wide, wide, (3, 1, 1))
            index += 1
    middle("encoder.mid_block", widths[-1])
    table.add("encoder.norm_out.gamma", (widths[-1], 1, 1, 1), Layout.GAMMA)
    table.conv("encoder.conv_out", widths[-1], 2 * config.z_dim, k3)
    table.conv("quant_conv", 2 * config.z_dim, 2 * config.z_dim, (1, 1, 1))
    table.conv("post_quant_conv", config.z_dim, config.z_dim, (1, 1, 1))
    # Decoder: nested blocks; every upsampler halves the channels, so a level starts with half the width before it.
    multipliers = config.dim_mult[::-1]
    widths = [(config.decoder_base_dim or config.base_dim) * m for m in (multipliers[0], *multipliers)]
    table.conv("decoder.conv_in", config.z_dim, widths[0], k3)
    middle("decoder.mid_block", widths[0])
    for level in range(levels):
        channels, wide = widths[level] // (2 if level else 1), widths[level + 1]
        block = f"decoder.up_blocks.{level}"
        for j in range(config.num_res_blocks + 1):
            residual(f"{block}.resnets.{j}", channels, wide)
            channels = wide
        if level < levels - 1:
            table.conv(f"{block}.upsamplers.0.resample.1", wide, wide // 2, (3, 3))
            if config.temperal_downsample[::-1][level]:
                table.conv(f"{block}.upsamplers.0.time_conv", wide, 2 * wide, (3, 1, 1))
    table.add("decoder.norm_out.gamma", (widths[-1], 1, 1, 1), Layout.GAMMA)
    table.conv("decoder.conv_out", widths[-1], config.out_channels, k3)
    return table.rules


def _text_encoder(config: TextEncoderConfig) -> list[TensorRule]:
    table = _Table(stacked_prefix="encoder.block")
    dim, inner = config.d_model, config.num_heads * config.d_kv
    table.add("shared.weight", (config.vocab_size, dim))
    for i in range(config.num_layers):
        attention, feed_forward = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        table.add(f"{attention}.layer_norm.weight", (dim,))
        for projection in ("q", "k", "v"):
            table.linear(f"{attention}.SelfAttention.{projection}", dim, inner, bias=False)
        table.linear(f"{attention}.SelfAttention.o", inner, dim, bias=False)
        table.add(f"{attention}.SelfAttention.relative_attention_bias.weight",
                  (config.relative_attention_num_buckets, config.num_heads))
        table.add(f"{feed_forward}.layer_norm.weight", (dim,))
        table.linear(f"{feed_forward}.DenseReluDense.wi_0", dim, config.d_ff, bias=False)
        table.linear(f"{feed_forward}.DenseReluDense.wi_1", dim, config.d_ff, bias=False)
        table.linear(f"{feed_forward}.DenseReluDense.wo", config.d_ff, dim, bias=False)
    table.add("encoder.final_layer_norm.weight", (dim,))
    return table.rules


_TABLES = {"transformer": _transformer, "vae": _vae, "text_encoder": _text_encoder}


@functools.lru_cache(maxsize=32)
def tensor_rules(component: str, config: Config) -> tuple[TensorRule, ...]:
    """Every tensor of the component's checkpoint, in the order of the PyTorch module.

    Args:
      component: 'transformer', 'vae' or 'text_encoder'.
      config: the component's configuration.

    Raises:
      UserError: the component is unknown or the configuration is of another component.
    """
    if component not in CONFIG_CLASSES:
        raise UserError(f"component: one of {', '.join(COMPONENTS)}, got {component!r}")
    if not isinstance(config, CONFIG_CLASSES[component]):
        raise UserError(f"{component}: expected a {CONFIG_CLASSES[component].__name__}, got {type(config).__name__}")
    return tuple(_TABLES[component](config))


@functools.lru_cache(maxsize=32)
def leaves(component: str, config: Config, precision: str = "none") -> tuple[Leaf, ...]:
    """The arrays of the component's parameter tree, each with the tensors that fill it.

    Args:
      precision: 'none', or a mode of ``helios_jax.models.quantize``: in place of each of its kernels then stand the two
        arrays of the quantised one.
    """
    groups: dict[Path, list[TensorRule]] = {}
    for rule in tensor_rules(component, config):
        groups.setdefault(rule.path, []).append(rule)
    result = []
    for path, tensors in groups.items():
        shape = tensors[0].layout.tree_shape(tensors[0].shape)
        stacked = tensors[0].layer is not None
        leaf = Leaf(path, (len(tensors), *shape) if stacked else shape, tuple(tensors), stacked)
        result += _parts(component, leaf, precision)
    return tuple(result)


def _parts(component: str, leaf: Leaf, precision: str) -> list[Leaf]:
    """The leaf itself, or the arrays of the quantised kernel that stands in its place."""
    format = format_of(component, leaf.path, precision)
    if format is None:
        return [leaf]
    *lead, features_in, features_out = leaf.shape
    shapes = ((*lead, features_out, features_in), format.scale_shape(leaf.shape))
    dtypes = (jax.numpy.dtype(format.dtype), np.dtype(np.float32))
    return [dataclasses.replace(leaf, path=(*leaf.path, part), shape=shape, part_dtype=dtype)
            for part, shape, dtype in zip(PARTS, shapes, dtypes, strict=True)]


def param_dtype(component: str, path: Path, dtype: Any) -> np.dtype:
    """The dtype in which a parameter is kept when the component computes in ``dtype``.

    As the reference: a half-precision transformer keeps the time embedder, the modulation tables, the affine norm
    before the cross-attention and the history key scale in float32 (but not time_proj nor the q/k norms); a float16
    text encoder keeps its ``wo`` matrices in float32; everything else follows ``dtype``.
    """
    dtype = np.dtype(dtype)
    if dtype.itemsize >= 4:
        return dtype
    if component == "transformer" and not _FLOAT32_PARTS.isdisjoint(path):
        return np.dtype(np.float32)
    if component == "text_encoder" and dtype == np.float16 and "wo" in path:
        return np.dtype(np.float32)
    return dtype


_FLOAT32_PARTS = {"time_embedder", "scale_shift_table", "norm2", "history_key_scale"}


def abstract_params(component: str, config: Config, dtype: Any = np.float32, precision: str = "none"
                    ) -> dict[str, Any]:
    """The parameter tree as ``jax.ShapeDtypeStruct``s, in the dtypes of :func:`param_dtype`.

    A quantised kernel is a dict of its two arrays (``helios_jax.models.quantize.as_qarrays`` makes it one).
    """
    return unflatten((leaf.path, jax.ShapeDtypeStruct(
        leaf.shape, leaf.part_dtype or param_dtype(component, leaf.path, dtype)))
        for leaf in leaves(component, config, precision))


def unflatten(items: Iterator[tuple[Path, Any]] | list[tuple[Path, Any]]) -> dict[str, Any]:
    """Nested dicts from pairs of path and value."""
    tree: dict[str, Any] = {}
    for path, value in items:
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = value
    return tree


def flatten(tree: Mapping[str, Any], prefix: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Pairs of path and value of nested dicts, depth first in insertion order."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, (*prefix, name))
        else:
            yield (*prefix, name), value


# Names under which older or training-time checkpoints store the same tensors.
_ALIASES: dict[str, tuple[tuple[re.Pattern[str], str], ...]] = {
    "transformer": (
        (re.compile(r"^scale_shift_table$"), "norm_out.scale_shift_table"),
        (re.compile(r"^multi_term_memory_patch\.(patch_(?:short|mid|long))\."), r"\1."),
        (re.compile(r"^(?:multi_term_memory_patch|clean_patch_embedding)\.proj\."), "patch_short."),
        (re.compile(r"^(?:multi_term_memory_patch|clean_patch_embedding)\.proj_2x\."), "patch_mid."),
        (re.compile(r"^(?:multi_term_memory_patch|clean_patch_embedding)\.proj_4x\."), "patch_long."),
    ),
    "vae": (),
    "text_encoder": ((re.compile(r"^encoder\.embed_tokens\.weight$"), "shared.weight"),),
}

# Tensors that a checkpoint may hold and that no forward pass reads: leftovers of the adversarial training, the
# training-time history adapters, and a norm that diffusers ignores too.
_IGNORABLE = re.compile(
    r"norm_added_q|^gan_heads\.|^gan_final_head\.|^blocks\.\d+\.attn1\.[qkv]_loras\.(down|up)\.weight$")
# Projections of the cross-attention that added_kv_proj_dim creates and that the forward pass never reads.
_ADDED_PROJECTIONS = re.compile(r"^blocks\.\d+\.attn2\.(add_[kv]_proj\.(weight|bias)|norm_added_k\.weight)$")


def canonical_name(component: str, name: str) -> str:
    """The published name of a tensor that a checkpoint calls ``name``."""
    for pattern, replacement in _ALIASES[component]:
        if pattern.search(name):
            return pattern.sub(replacement, name)
    return name


def is_ignorable(component: str, config: Config, name: str) -> bool:
    """Whether a checkpoint tensor may be left out because no forward pass uses it."""
    if component != "transformer":
        return False
    return bool(_IGNORABLE.search(name)
                or (config.added_kv_proj_dim is not None and _ADDED_PROJECTIONS.match(name)))


def match_names(component: str, config: Config, shapes: Mapping[str, Shape], where: str) -> dict[str, str]:
    """Strictly assigns the tensors of a checkpoint to the rules.

    Args:
      shapes: PyTorch shape of every tensor in the checkpoint, by stored name.
      where: how the error calls the checkpoint.

    Returns: published name -> stored name, for every rule.

    Raises:
      UserError: listing every kind of disagreement at once: missing, unexpected and misshapen tensors.
    """
    rules = {rule.name: rule for rule in tensor_rules(component, config)}
    stored: dict[str, str] = {}
    unexpected: list[str] = []
    for name in shapes:
        canonical = canonical_name(component, name)
        if canonical not in rules:
            if not is_ignorable(component, config, name):
                unexpected.append(name)
        elif canonical not in stored or name == canonical:  # of two aliases the published name wins
            stored[canonical] = name
    missing = [name for name in rules if name not in stored]
    misshapen = [f"{stored[n]} is {list(shapes[stored[n]])}, expected {list(r.shape)}" for n, r in rules.items()
                 if n in stored and tuple(shapes[stored[n]]) != r.shape]
    if not (missing or unexpected or misshapen):
        return stored
    problems = [listing(kind, names) for kind, names in
                (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen)) if names]
    foreign = " (this looks like the checkpoint of another model)" if len(missing) > len(rules) // 2 else ""
    raise UserError(f"{where}: not a {component} of this configuration{foreign}: {'; '.join(problems)}")


def listing(kind: str, names: list[str], limit: int = 8) -> str:
    """'3 missing: a, b, c', cut after ``limit`` names."""
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return f"{len(names)} {kind}: {', '.join(names[:limit])}{more}"


def as_float_array(name: str, array: Any) -> np.ndarray:
    """A numpy array of a float dtype (bfloat16 and float8 included).

    Raises:
      UserError: the dtype is not a float.
    """
    array = np.asarray(array)
    if not is_float(array.dtype):
        raise UserError(f"{name}: expected a float dtype, got {array.dtype}")
    return array


def is_float(dtype: np.dtype) -> bool:
    return np.issubdtype(dtype, np.floating) or dtype.name.startswith(("bfloat16", "float8"))


def common_dtype(dtypes: list[np.dtype]) -> np.dtype:
    """The dtype of a stack whose layers are stored in several: the narrowest that holds all of them exactly."""
    distinct = set(dtypes)
    if len(distinct) == 1:
        return distinct.pop()
    if all(d.itemsize == 1 for d in distinct):
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(np.float64) if np.dtype(np.float64) in distinct else np.dtype(np.float32)
