"""LoRA files: reading them, merging them into the weights or keeping them apart, and writing those of a training.

An adapter changes a Linear or a patch convolution by W + s (alpha / r) B A, and its bias by s (alpha / r) b. Its
weight s is chosen by the user; alpha / r is 1 unless the file's metadata or (in Wan-style files) its alpha tensors say
otherwise. Several adapters add up.

Three spellings are read:
  diffusers  ``transformer.<module>.lora_A.weight``, ``.lora_B.weight``, ``.lora_B.bias`` (also ``.lora.down``,
             ``.lora.up`` and ``.to_q_lora.down``); metadata ``lora_adapter_metadata``
  Wan        ``diffusion_model.<Wan module>.lora_A.weight`` or ``.lora_down.weight``, ``.alpha``, ``.diff_b``
  musubi     ``lora_unet_<Wan module with underscores>.lora_down.weight``, ``.alpha``

Sources: diffusers ``HeliosLoraLoaderMixin`` and its Wan converters, PEFT. The original ignores keys that it cannot
place; here they are an error unless the caller allows it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from helios_jax.config import TransformerConfig
from helios_jax.convert.folder import download, refuse_pickles
from helios_jax.convert.rules import Layout, Leaf, TensorRule, flatten, leaves, listing, tensor_rules, unflatten
from helios_jax.convert.safetensors_io import SafetensorsFile, SafetensorsWriter
from helios_jax.errors import UserError
from helios_jax.models.quantize import is_quantised

DEFAULT_FILE = "pytorch_lora_weights.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)
MERGE_REFUSED = ("lora: adapters cannot be merged into quantised weights; keep them apart (--lora_apart, "
                 "merge_lora=False), or quantise a model into which they have been merged")


@dataclasses.dataclass(frozen=True)
class LoraModule:
    """The update of one module, in PyTorch layout and float32.

    Attributes:
      a: [r, in], or [r, in, kt, kh, kw] for a patch convolution.
      b: [out, r], or [out, r, 1, 1, 1].
      bias: [out] or None.
      scale: alpha / r.
    """

    a: np.ndarray
    b: np.ndarray
    bias: np.ndarray | None
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclasses.dataclass(frozen=True)
class Adapter:
    """One LoRA file, matched to a transformer.

    Attributes:
      name: its file.
      config: the transformer it was matched to.
      weight: how strongly it is applied; 1 as trained.
      modules: PyTorch module name -> update.
      ignored: keys of the file that have no effect (only with ``allow_unmatched``).
    """

    name: str
    config: TransformerConfig
    weight: float
    modules: Mapping[str, LoraModule]
    ignored: tuple[str, ...] = ()


def read_lora(path: str | Path, config: TransformerConfig, weight: float = 1.0,
              allow_unmatched: bool = False) -> Adapter:
    """Reads a LoRA file for a transformer.

    Args:
      path: a safetensors file, a folder that holds one, or a hub id ('owner/name').
      config: the transformer's configuration.
      weight: the adapter's weight.
      allow_unmatched: ignore keys that name no module of this transformer or that are no LoRA, as the original does,
        and list them in ``Adapter.ignored``.

    Raises:
      UserError: the file is missing, damaged, a pickle or no LoRA for this transformer; the line lists the keys.
    """
    if not math.isfinite(weight):
        raise UserError(f"lora weight: must be a finite number, got {weight}")
    file = _find_file(path)
    with SafetensorsFile(file) as opened:
        tensors = {name: opened.read(name).astype(np.float32) for name in opened.entries}
        metadata = _adapter_metadata(file, opened.metadata)
    modules, ignored = _parse(file, tensors, metadata, config, allow_unmatched)
    return Adapter(str(path), config, float(weight), modules, tuple(ignored))


def merge(params: Mapping[str, Any], adapters: Sequence[Adapter], in_place: bool = False) -> dict[str, Any]:
    """Transformer parameters with the adapters added to the weights.

    Products are float32 and rounded once to each parameter's dtype. Leaves that no adapter touches are shared with
    ``params``; the others are new, one layer's product in memory at a time, and keep their sharding.

    Args:
      params: the transformer's parameter tree.
      adapters: of :func:`read_lora`; their updates add up.
      in_place: give up the memory of the weights that change, which ``params`` must not be asked for again: where they
        fill a device, there is no room for both.

    Raises:
      UserError: the weights are quantised.
    """
    return _with_updates(params, _module_updates(adapters), in_place)


def merge_tree(params: Mapping[str, Any], lora: Mapping[str, Any]) -> dict[str, Any]:
    """The same for a "lora" collection (see :func:`adapter_tree`) in place of files."""
    modules: dict[tuple[str, ...], dict[str, Any]] = {}
    for path, array in flatten(lora):
        modules.setdefault(path[:-1], {})[path[-1]] = array
    return _with_updates(params, modules.items(), in_place=False)


def _with_updates(params: Mapping[str, Any], updates: Iterable[tuple[tuple[str, ...], Mapping[str, Any]]],
                  in_place: bool) -> dict[str, Any]:
    merged = dict(flatten(params))
    for path, update in updates:
        kernel = merged[(*path, "kernel")]
        if is_quantised(kernel):
            raise UserError(MERGE_REFUSED)
        merged[(*path, "kernel")] = _add_product(kernel, update["a"], update["b"], in_place)
        if "bias" in update:
            bias = jnp.asarray(merged[(*path, "bias")])
            merged[(*path, "bias")] = (bias.astype(jnp.float32) + update["bias"]).astype(bias.dtype)
    return unflatten(merged.items())


def write_lora(path: str | Path, lora: Mapping[str, Any], config: TransformerConfig, alpha: float) -> None:
    """Writes a "lora" collection as a file of the diffusers format, float32, one tensor in memory at a time.

    Args:
      path: the file to create.
      lora: a tree as of :func:`adapter_tree`, of one rank and without biases; ``b`` without the scale alpha / r.
      config: the transformer's configuration.
      alpha: stored in the file's metadata, from which readers take the scale.
    """
    arrays = dict(flatten(lora))
    targets = [(leaf, leaf.path[:-1]) for leaf in leaves("transformer", config)
               if leaf.path[-1] == "kernel" and (*leaf.path[:-1], "a") in arrays]
    rank = arrays[(*targets[0][1], "a")].shape[-1]
    tensors = {}  # name -> (shape, function that makes it)
    for leaf, module in targets:
        for layer, rule in enumerate(leaf.tensors):
            at = layer if leaf.stacked else ...
            name, kernel = f"transformer.{_module_name(rule)}", rule.shape[2:]
            shape_a, shape_b = (rank, *rule.shape[1:]), (rule.shape[0], rank, *(1 for _ in kernel))
            tensors[f"{name}.lora_A.weight"] = shape_a, functools.partial(
                lambda a, at, layout, shape: layout.to_torch(np.asarray(a[at]), shape), arrays[(*module, "a")], at,
                rule.layout, shape_a)
            tensors[f"{name}.lora_B.weight"] = shape_b, functools.partial(
                lambda b, at, shape: np.asarray(b[at]).T.reshape(shape), arrays[(*module, "b")], at, shape_b)
    modules = [_module_name(rule) for leaf, _ in targets for rule in leaf.tensors]
    metadata = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": modules}
    writer = SafetensorsWriter(path, {name: (np.dtype(np.float32), shape) for name, (shape, _) in tensors.items()}, {
        "format": "pt", "lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in metadata.items()})})
    try:
        for name, (_, make) in tensors.items():
            writer.write(name, make().astype(np.float32))
        writer.close()
    except BaseException:
        writer.abort()
        raise


def adapter_tree(adapters: Sequence[Adapter], dtype: Any = np.float32) -> dict[str, Any]:
    """The adapters as the "lora" collection, to be applied beside the weights.

    Args:
      adapters: of :func:`read_lora`.
      dtype: of the arrays; the model casts them to its compute dtype at use.

    Returns: a tree that mirrors the parameters: ``{"blocks": {"attn1": {"to_q": {"a": [L, in, R], "b": [L, R, out],
      "bias": [L, out]}}}, "patch_long": {"a": [kt, kh, kw, in, R], "b": [R, out]}, ...}`` as numpy arrays. "bias" is
      there only if an adapter has one. The adapters stand side by side in R, padded with zeros where one lacks a
      layer; scales and weights are folded into "b" and "bias".

    Raises:
      UserError: the adapters were read for different transformers.
    """
    return unflatten([((*path, name), array.astype(dtype)) for path, update in _module_updates(adapters)
                      for name, array in update.items()])


def _module_updates(adapters: Sequence[Adapter]) -> Iterator[tuple[tuple[str, ...], dict[str, np.ndarray]]]:
    """Per module path that any adapter touches, its arrays in our layout."""
    if any(adapter.config != adapters[0].config for adapter in adapters):
        raise UserError("lora: the adapters were read for different transformer configurations")
    for leaf in leaves("transformer", adapters[0].config) if adapters else ():
        if leaf.path[-1] != "kernel":
            continue
        names = [_module_name(rule) for rule in leaf.tensors]
        involved = [adapter for adapter in adapters if any(n in adapter.modules for n in names)]
        if involved:
            yield leaf.path[:-1], _side_by_side(leaf, names, involved)


def _side_by_side(leaf: Leaf, names: list[str], adapters: list[Adapter]) -> dict[str, np.ndarray]:
    """The adapters of one leaf, concatenated along the rank."""
    ranks = [max(adapter.modules[n].rank for n in names if n in adapter.modules) for adapter in adapters]
    lead, (*inner, features_in, features_out) = ((leaf.shape[:1], leaf.shape[1:]) if leaf.stacked
                                                 else ((), leaf.shape))
    a = np.zeros((*lead, *inner, features_in, sum(ranks)), np.float32)
    b = np.zeros((*lead, sum(ranks), features_out), np.float32)
    bias = np.zeros((*lead, features_out), np.float32)
    has_bias = False
    start = 0
    for adapter, rank in zip(adapters, ranks, strict=True):
        for layer, name in enumerate(names):
            module = adapter.modules.get(name)
            if module is None:
                continue
            at = (layer,) if leaf.stacked else ()
            columns = slice(start, start + module.rank)
            scale = np.float32(adapter.weight * module.scale)
            a[(*at, ..., columns)] = leaf.tensors[0].layout.to_tree(module.a)
            b[(*at, columns)] = scale * module.b.reshape(features_out, module.rank).T
            if module.bias is not None:
                bias[at] += scale * module.bias
                has_bias = True
        start += rank
    return {"a": a, "b": b} | ({"bias": bias} if has_bias else {})


def _add_product(kernel: Any, a: np.ndarray, b: np.ndarray, in_place: bool) -> jax.Array:
    """kernel + a b, layer by layer if stacked ([L, in, out]); in the kernel's dtype and sharding."""
    sharding = kernel.sharding if isinstance(kernel, jax.Array) else None
    stacked = b.ndim == 3
    return _product_adder(stacked, sharding, in_place)(kernel, a, b)


@functools.lru_cache(maxsize=64)
def _product_adder(stacked: bool, sharding: jax.sharding.Sharding | None, in_place: bool):
    def add(kernel, a, b):  # [..., in, out] + [..., in, r] [r, out]
        product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        return (kernel.astype(jnp.float32) + product).astype(kernel.dtype)

    def add_layers(kernel, a, b):
        def layer(i, kernel):
            own = (jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False) for leaf in (kernel, a, b))
            return jax.lax.dynamic_update_index_in_dim(kernel, add(*own), i, 0)

        return jax.lax.fori_loop(0, kernel.shape[0], layer, kernel)

    return jax.jit(add_layers if stacked else add, out_shardings=sharding, donate_argnums=0 if in_place else ())


# --- reading ---------------------------------------------------------------------------------------------------------


def _find_file(path: str | Path) -> Path:
    """The file that diffusers would choose."""
    path = Path(path)
    is_hub_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(path)) and path.suffix not in WEIGHT_SUFFIXES
    if not path.exists() and is_hub_id:  # whose name may have dots
        path = download(str(path), ["*.safetensors"])
    if path.is_dir():
        if (path / DEFAULT_FILE).is_file():
            return path / DEFAULT_FILE
        found = sorted(p for p in path.glob("*.safetensors")
                       if not any(word in p.name for word in ("scheduler", "optimizer", "checkpoint")))
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(f"lora {path}: several safetensors files ({', '.join(p.name for p in found[:8])}); name "
                            "one of them")
        pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLE_SUFFIXES)
        raise UserError(refuse_pickles(path, pickles) if pickles else f"lora {path}: holds no *.safetensors file")
    if path.suffix in PICKLE_SUFFIXES:
        raise UserError(refuse_pickles(path.parent, [path.name]))
    if not path.is_file():
        raise UserError(f"lora {str(path)!r}: no such file or folder")
    return path


def _adapter_metadata(file: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The PEFT configuration that diffusers stores in the header, for the transformer; None if there is none."""
    text = metadata.get("lora_adapter_metadata")
    if not text:
        return None
    try:
        values = json.loads(text)
        values = {k.removeprefix("transformer."): v for k, v in values.items() if k.startswith("transformer.")}
    except (json.JSONDecodeError, AttributeError):
        raise UserError(f"{file}: its lora_adapter_metadata is not a JSON object") from None
    if values.get("use_dora"):
        raise UserError(f"{file}: is a DoRA adapter, which is not supported")
    for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern"):
        wanted = "patterns and their numbers" if field.endswith("pattern") else "a number"
        if not (_is_patterns if field.endswith("pattern") else _is_number)(values.get(field) or 0):
            raise UserError(f"{file}: {field} of its lora_adapter_metadata must be {wanted}, got {values[field]!r}")
    return values or None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_patterns(value: Any) -> bool:
    """Regular expressions with a number each, or 0 for none."""
    try:
        return value == 0 or all(re.compile(pattern) and _is_number(number) for pattern, number in value.items())
    except (AttributeError, re.error):
        return False


_NATIVE = (
    (re.compile(r"^(.+)\.lora_A\.weight$"), "a"), (re.compile(r"^(.+)\.lora_B\.weight$"), "b"),
    (re.compile(r"^(.+)\.lora_B\.bias$"), "bias"), (re.compile(r"^(.+)\.lora\.down\.weight$"), "a"),
    (re.compile(r"^(.+)\.lora\.up\.weight$"), "b"), (re.compile(r"^(.+\.to_(?:q|k|v|out))_lora\.down\.weight$"), "a"),
    (re.compile(r"^(.+\.to_(?:q|k|v|out))_lora\.up\.weight$"), "b"))
_WAN_PARTS = {"lora_A.weight": "a", "lora_down.weight": "a", "lora_B.weight": "b", "lora_up.weight": "b",
              "alpha": "alpha", "diff_b": "bias", "diff": "diff"}
_WAN_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "k_img": "add_k_proj",
                  "v_img": "add_v_proj"}
_WAN_MODULES = {
    "time_projection.1": "condition_embedder.time_proj", "head.head": "proj_out",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2", "patch_embedding": "patch_embedding"}
_WAN_BLOCK = re.compile(r"^blocks[._](\d+)[._](?:(self|cross)_attn[._](q|k|v|o|k_img|v_img)|ffn[._]([02]))$")


def _native_key(key: str) -> tuple[str, str] | None:
    """(module, part) of a diffusers key."""
    if not key.startswith("transformer."):
        return None
    key = key.removeprefix("transformer.")
    for pattern, part in _NATIVE:
        if match := pattern.match(key):
            module = match[1]
            return (f"{module}.0" if module.endswith(".to_out") else module), part
    return None


def _wan_key(key: str) -> tuple[str, str] | None:
    """(module, part) of a Wan or musubi key; the module is named as in diffusers."""
    prefix = next((p for p in ("diffusion_model.", "lora_unet_") if key.startswith(p)), None)
    if prefix is None:
        return None
    key = key.removeprefix(prefix)
    ending = next((e for e in _WAN_PARTS if key.endswith(f".{e}")), None)
    if ending is None:
        return None
    module, part = key[: -len(ending) - 1], _WAN_PARTS[ending]
    if match := _WAN_BLOCK.match(module):
        block, kind, projection, feed_forward = match.groups()
        if kind:
            return f"blocks.{block}.{'attn1' if kind == 'self' else 'attn2'}.{_WAN_ATTENTION[projection]}", part
        return f"blocks.{block}.ffn.net.{'0.proj' if feed_forward == '0' else '2'}", part
    for name, ours in _WAN_MODULES.items():
        if module in (name, name.replace(".", "_")):
            return ours, part
    return None


def _module_name(rule: TensorRule) -> str:
    return rule.name.removesuffix(".weight")


def _parse(file: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any] | None,
           config: TransformerConfig, allow_unmatched: bool) -> tuple[dict[str, LoraModule], list[str]]:
    """The modules of a file, and the keys that were ignored."""
    is_wan = any(key.startswith(("diffusion_model.", "lora_unet_")) for key in tensors)
    targets = {_module_name(rule): rule for rule in tensor_rules("transformer", config)
               if rule.layout in (Layout.LINEAR, Layout.CONV)}
    parts: dict[str, dict[str, np.ndarray]] = {}
    unmatched: list[str] = []
    for key, tensor in tensors.items():
        if is_wan and "norm" in key and key.endswith((".diff", ".diff_b")) and not np.any(tensor):
            continue  # Wan trainers write zero updates for norms, which no loader applies
        place = _wan_key(key) if is_wan else _native_key(key)
        if place is None or place[0] not in targets or (place[1] == "diff" and place[0] != "proj_out"):
            unmatched.append(key)
        elif place[1] in parts.setdefault(place[0], {}):
            raise UserError(f"{file}: {place[0]} has its part {place[1]!r} twice, the second time as {key}")
        else:
            parts[place[0]][place[1]] = tensor
    time_proj = parts.get("condition_embedder.time_proj", {})
    if is_wan and time_proj and "a" not in time_proj:
        # Some files carry the bias of an update whose matrices they lack; the original leaves it out.
        del parts["condition_embedder.time_proj"]
    modules: dict[str, LoraModule] = {}
    problems: dict[str, list[str]] = {"incomplete": [], "misshapen": []}
    for name, found in parts.items():
        module = _module(name, found, targets[name], metadata, problems)
        if module is not None:
            modules[name] = module
    kinds = dict(problems) | ({} if allow_unmatched else {"that match no module of this transformer": unmatched})
    wrong = [listing(kind, names) for kind, names in kinds.items() if names]
    if not modules and not any(problems.values()):
        wrong.insert(0, "no LoRA weights for this transformer")
    if wrong:
        bare = not is_wan and any(_native_key(f"transformer.{key}") for key in unmatched)
        hint = "; keys of the diffusers format begin with 'transformer.'" if bare else ""
        raise UserError(f"lora {file}: {'; '.join(wrong)}{hint}")
    return modules, unmatched


def _module(name: str, found: dict[str, np.ndarray], rule: TensorRule, metadata: Mapping[str, Any] | None,
            problems: dict[str, list[str]]) -> LoraModule | None:
    """One module's update; None (and an entry in ``problems``) if its parts do not fit."""
    out, kernel = rule.shape[0], rule.shape[2:]
    if "diff" in found:  # a full update of the output projection
        found = found | {"a": found["diff"], "b": np.eye(out, dtype=np.float32)}
    if "a" not in found and "b" not in found and "bias" in found:  # an update of the bias alone
        found = found | {"a": np.zeros((1, *rule.shape[1:]), np.float32),
                         "b": np.zeros((out, 1, *(1,) * len(kernel)), np.float32)}
    if "a" not in found or "b" not in found:
        problems["incomplete"].append(f"{name} (only {', '.join(sorted(found))})")
        return None
    a, b, bias = found["a"], found["b"], found.get("bias")
    rank = a.shape[0] if a.ndim else 0
    expected = {"a": (a, (rank, *rule.shape[1:])), "b": (b, (out, rank, *(1,) * len(kernel)))}
    if bias is not None:
        expected["bias"] = (bias, (out,))
    bad = [f"{name} {part} is {list(array.shape)}, expected {list(shape)}"
           for part, (array, shape) in expected.items() if array.shape != shape]
    if bad or rank == 0:
        problems["misshapen"] += bad or [f"{name} has rank 0"]
        return None
    if metadata is not None:
        scale = _metadata_scale(name, rank, metadata, problems)
    else:
        scale = float(found["alpha"].reshape(-1)[0]) / rank if "alpha" in found else 1.0
    return LoraModule(a, b, bias, scale)


def _metadata_scale(name: str, rank: int, metadata: Mapping[str, Any], problems: dict[str, list[str]]) -> float:
    """alpha / r by PEFT's configuration: patterns first, then the common values."""

    def lookup(pattern_field: str, default: Any) -> Any:
        for pattern, value in (metadata.get(pattern_field) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        return default

    declared = lookup("rank_pattern", metadata.get("r", 8))
    if declared != rank:
        problems["misshapen"].append(f"{name} has rank {rank}, its metadata says {declared}")
    alpha = lookup("alpha_pattern", metadata.get("lora_alpha", 8))
    return alpha / math.sqrt(rank) if metadata.get("use_rslora") else alpha / rank
