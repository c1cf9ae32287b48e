"""Which parameters of the transformer a run trains: all of them, or low-rank adapters beside a fixed base.

The parameters of the training loop are then ``{"lora": adapters, "full": modules}``: the ``lora`` collection of the
model, and whole modules that are trained with it (the original trains the history convolutions of stage 1 so). The
base stands in ``frozen["base"]``; neither optimizer nor average nor checkpoint hold a copy of it.

W' x = W x + (alpha / r) B A x with A ~ N(0, 1 / r^2) and B = 0 at the start, without bias or dropout, as in the
original. (It rounds most of A's start values to bfloat16; that is not repeated.)
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from helios_jax import lora as lora_files
from helios_jax import sharding
from helios_jax.config import TransformerConfig
from helios_jax.convert.rules import Layout, Leaf, flatten, leaves, unflatten
from helios_jax.convert.safetensors_io import write_safetensors
from helios_jax.errors import UserError
from helios_jax.models.partition import unbox
from helios_jax.models.transformer import HeliosTransformer
from helios_jax.training.config import require

PyTree = Any

ALL_LINEAR = "all-linear"
PARTIAL_FILE = "transformer_partial.safetensors"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank training; the defaults switch it off.

    A module is named as in PyTorch (``blocks.0.attn1.to_q``, ``patch_short``). A pattern selects the modules of that
    name, of that ending (``to_q``), or that it matches as a regular expression from beginning to end; all layers of
    a stack or none.

    Attributes:
      rank: r; 0 trains all parameters and needs nothing else of this group.
      alpha: scale times r; 0 means r, a scale of 1.
      targets: patterns of the modules with adapters; 'all-linear' stands for every Linear layer (no convolution).
      full: patterns of modules that are trained whole (weight and bias).
      base_dtype: 'bfloat16' or 'float32', in which the fixed parameters are kept (those that a half-precision model
        keeps in float32 stay so).
    """

    USUAL_PLACE: ClassVar[str] = "objective.lora"

    rank: int = 0
    alpha: float = 0.0
    targets: tuple[str, ...] = (ALL_LINEAR,)
    full: tuple[str, ...] = ()
    base_dtype: str = "bfloat16"

    def __post_init__(self):
        require(self.rank >= 0, f"objective.lora.rank: 0 or more, got {self.rank}")
        require(self.alpha >= 0, f"objective.lora.alpha: 0 or more, got {self.alpha}")
        require(self.rank == 0 or bool(self.targets), "objective.lora.targets: at least one pattern, got none")
        require(self.base_dtype in ("float32", "bfloat16"),
                f"objective.lora.base_dtype: 'float32' or 'bfloat16', got {self.base_dtype!r}")
        for field in ("targets", "full"):
            for pattern in getattr(self, field):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise UserError(f"objective.lora.{field}: {pattern!r} is no regular expression ({error})") from None

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank if self.alpha else 1.0


class TrainedWeights(Protocol):
    """How the parameters of the training loop become the transformer's."""

    def init(self, key: jax.Array) -> PyTree:
        """Random start values, float32; traceable."""

    def variables(self, params: PyTree, frozen: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """The argument of ``HeliosTransformer.apply``."""

    def merged(self, params: PyTree, base: PyTree) -> PyTree:
        """One tree of transformer parameters with the same output; ``base`` as in ``frozen["base"]``."""

    def write_parts(self, params: PyTree, folder: str | Path) -> None:
        """Writes what was trained beside the merged model, where that is something of its own; all processes call
        it, the first one writes."""


class FullTraining:
    """All parameters are trained."""

    def __init__(self, model: HeliosTransformer):
        self._model = model

    def init(self, key: jax.Array) -> PyTree:
        return unbox(self._model.init(key))

    def variables(self, params: PyTree, frozen: Mapping[str, PyTree]) -> dict[str, PyTree]:
        del frozen
        return {"params": params}

    def merged(self, params: PyTree, base: PyTree) -> PyTree:
        del base
        return params

    def write_parts(self, params: PyTree, folder: str | Path) -> None:
        del params, folder


class LoraTraining:
    """Adapters, and whole modules beside them.

    Args:
      config: with a positive rank.
      model: the transformer.
      field: of the configuration, for errors.

    Raises:
      UserError: a pattern that matches nothing, or only some layers of a stack; a module in both lists.
    """

    def __init__(self, config: LoraConfig, model: HeliosTransformer, field: str = LoraConfig.USUAL_PLACE):
        self.config, self._model = config, model
        self._targets = _selected(config.targets, model.config, f"{field}.targets")
        self._full = _selected(config.full, model.config, f"{field}.full", biases=True)
        both = {leaf.path[:-1] for leaf in self._targets} & {leaf.path[:-1] for leaf in self._full}
        require(not both, f"{field}.full: {'/'.join(min(both, default=()))} is among the targets, too; a module "
                "has an adapter or is trained whole")

    def init(self, key: jax.Array) -> PyTree:
        """``{"lora": ...}`` with, where modules are trained whole, random values for them under "full"."""
        adapters_key, model_key = jax.random.split(key)
        params = {"lora": self.init_adapters(adapters_key)}
        return params | self._whole_modules(unbox(self._model.init(model_key))) if self._full else params

    def init_adapters(self, key: jax.Array) -> PyTree:
        """The start values of the adapters, float32: blocks' a [L, in, r], b [L, r, out], convolutions' a
        [kt, kh, kw, in, r]."""
        rank, items = self.config.rank, []
        for leaf_key, leaf in zip(jax.random.split(key, len(self._targets)), self._targets, strict=True):
            layers = leaf.shape[:1] if leaf.stacked else ()
            items.append(((*leaf.path[:-1], "a"), jax.random.normal(leaf_key, (*leaf.shape[:-1], rank)) / rank))
            items.append(((*leaf.path[:-1], "b"), jnp.zeros((*layers, rank, leaf.shape[-1]))))
        return unflatten(items)

    @property
    def num_adapters(self) -> int:
        """Numbers in all adapters."""
        abstract = jax.eval_shape(self.init_adapters, jax.random.key(0))
        return sum(leaf.size for leaf in jax.tree.leaves(abstract))

    def is_whole(self, path: tuple[str, ...]) -> bool:
        """Whether the transformer's parameter at ``path`` is trained whole."""
        return any(leaf.path == path for leaf in self._full)

    def start(self, key: jax.Array, base: PyTree) -> PyTree:
        """The parameters of the loop at step 0 of a run from ``base``, which need not have more than whole modules."""
        return {"lora": jax.jit(self.init_adapters)(key)} | self._whole_modules(base)

    def _whole_modules(self, params: PyTree) -> dict[str, PyTree]:
        """``{"full": modules}`` in float32 (copies: the loop gives its own away), {} if there are none."""
        arrays = dict(flatten(params))
        items = [(leaf.path, jnp.array(arrays[leaf.path], jnp.float32, copy=True)) for leaf in self._full]
        return {"full": unflatten(items)} if items else {}

    def variables(self, params: PyTree, frozen: Mapping[str, PyTree]) -> dict[str, PyTree]:
        return {"params": self._overlaid(params, frozen["base"]), "lora": self._scaled(params["lora"])}

    def _overlaid(self, params: PyTree, base: PyTree) -> PyTree:
        return unflatten((dict(flatten(base)) | dict(flatten(params.get("full", {})))).items())

    def _scaled(self, lora: PyTree) -> PyTree:
        """The adapters with alpha / r in b, as the model's ``lora`` collection has them."""
        if self.config.scale == 1:
            return lora
        return unflatten((path, leaf * self.config.scale if path[-1] == "b" else leaf)
                         for path, leaf in flatten(lora))

    def merged(self, params: PyTree, base: PyTree) -> PyTree:
        return lora_files.merge_tree(self._overlaid(params, base), self._scaled(params["lora"]))

    def write_parts(self, params: PyTree, folder: str | Path) -> None:
        """``pytorch_lora_weights.safetensors`` as diffusers and :mod:`helios_jax.lora` read it, and the whole modules
        under their PyTorch names in ``transformer_partial.safetensors``; all float32."""
        params = sharding.gather(params)
        if jax.process_index() != 0:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lora_files.write_lora(folder / lora_files.DEFAULT_FILE, params["lora"], self._model.config,
                              alpha=self.config.alpha or self.config.rank)
        if self._full:
            arrays = dict(flatten(params["full"]))
            tensors = {}
            for leaf in self._full:
                array = np.asarray(arrays[leaf.path])
                for i, rule in enumerate(leaf.tensors):
                    tensors[rule.name] = rule.layout.to_torch(array[i] if leaf.stacked else array, rule.shape)
            write_safetensors(folder / PARTIAL_FILE, tensors)


def trained_weights(config: LoraConfig, model: HeliosTransformer, field: str = LoraConfig.USUAL_PLACE
                    ) -> TrainedWeights:
    """The kind of training that a configuration asks for; arguments as of :class:`LoraTraining`."""
    return LoraTraining(config, model, field) if config.rank else FullTraining(model)


def _module_name(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".bias")


def _matches(pattern: str, module: str, layout: Layout) -> bool:
    if pattern == ALL_LINEAR:
        return layout is Layout.LINEAR
    return module == pattern or module.endswith(f".{pattern}") or re.fullmatch(pattern, module) is not None


def _selected(patterns: tuple[str, ...], transformer: TransformerConfig, field: str, biases: bool = False
              ) -> tuple[Leaf, ...]:
    """The kernels, and the biases if asked for, that the patterns of a field of the configuration select."""
    candidates = []  # (leaf, [(module, layout) per layer])
    for leaf in leaves("transformer", transformer):
        layout = leaf.tensors[0].layout
        if layout in (Layout.LINEAR, Layout.CONV) or (biases and leaf.path[-1] == "bias"):
            candidates.append((leaf, layout, [_module_name(rule.name) for rule in leaf.tensors]))
    chosen: dict[tuple[str, ...], Leaf] = {}
    for pattern in patterns:
        found = False
        for leaf, layout, modules in candidates:
            matched = [_matches(pattern, module, layout) for module in modules]
            if any(matched):
                found = True
                require(all(matched), f"{field}: {pattern!r} matches {sum(matched)} of {len(matched)} "
                        f"layers of {'/'.join(leaf.path[:-1])}; all or none can be trained")
                chosen[leaf.path] = leaf
        if not found:
            names = sorted({name for *_, modules in candidates for module in modules
                            for name in (module, module.split(".")[-1])})
            near = difflib.get_close_matches(pattern, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; 'patch_short', 'to_q' and {ALL_LINEAR!r} would"
            raise UserError(f"{field}: {pattern!r} matches no module of this transformer{hint}")
    return tuple(chosen[leaf.path] for leaf in leaves("transformer", transformer) if leaf.path in chosen)
