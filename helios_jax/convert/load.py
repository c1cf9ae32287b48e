"""Loading parameters from a model folder, published or Orbax, one tensor at a time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from helios_jax.config import TransformerConfig, read_json
from helios_jax.convert.folder import (
    ORBAX_FOLDER,
    ModelFolder,
    read_component_config,
    read_model_folder,
    resolve_model,
    stored_precision,
)
from helios_jax.convert.rules import COMPONENTS, Config, Leaf, flatten, leaves, unflatten
from helios_jax.convert.sources import Index, LeafSource, QuantisedSource, SafetensorsSource
from helios_jax.convert.wan import transformer_config_from_wan
from helios_jax.errors import UserError
from helios_jax.models.quantize import as_qarrays
from helios_jax.models.streaming import STACKS

Sharding = jax.sharding.Sharding
# One sharding for everything, a tree like the parameters, or a function of a leaf's path and shape.
Shardings = Sharding | Mapping[str, Any] | Callable[[tuple[str, ...], tuple[int, ...]], Sharding] | None


def load_component(folder: str | Path, component: str, config: Config | None = None, dtype: Any = None,
                   sharding: Shardings = None, from_wan: bool = False,
                   only: Callable[[tuple[str, ...]], bool] | None = None, precision: str | None = None
                   ) -> dict[str, Any]:
    """Loads the parameters of one component.

    Reading is strict: missing, unexpected and misshapen tensors are all listed in one error. Leaves are read one at a
    time, several layers of a stack at once; the host holds at most one leaf and some buffers beyond the result, and
    with ``sharding`` only the parts that this process' devices need are kept.

    Args:
      folder: the component's folder, with ``config.json`` and either safetensors files (and their index) or an Orbax
        checkpoint in ``params/``.
      component: 'transformer', 'vae' or 'text_encoder'.
      config: its configuration; None reads ``config.json``.
      dtype: the dtype the component will compute in. Half-precision transformers keep the parameters in float32 that
        the original keeps (see :func:`~helios_jax.convert.rules.param_dtype`). None keeps the stored dtypes (float64
        becomes float32).
      sharding: None puts everything on the default device; a ``Sharding`` for all leaves; a tree of them; or a
        function (path, shape) -> ``Sharding``.
      from_wan: the folder holds a Wan 2.1 text-to-video transformer; its history patches are made from its patch
        embedding (see ``helios_jax.convert.wan``).
      only: of a parameter's path, whether to return it; all by default. (An Orbax checkpoint is read whole.)
      precision: a mode of ``helios_jax.models.quantize``, into which kernels are quantised while they are read: no
        device holds more than a layer of a plain one. None keeps them as stored.

    Returns: nested dicts of ``jax.Array``; quantised kernels are ``qwix.QArray``.

    Raises:
      UserError: the folder, its files or its tensors are not what the component needs; one line.
    """
    folder = Path(folder)
    if config is None:
        config = _wan_config(folder) if from_wan else read_component_config(folder, component)
    sharding_of = _sharding_lookup(sharding)
    stored = stored_precision(folder)
    if stored != "none" and precision not in (None, stored):
        raise UserError(f"precision: {folder} is stored in {stored}, got {precision!r}; leave it out, or convert the "
                        "original model")
    with contextlib.ExitStack() as stack:
        if (folder / ORBAX_FOLDER).is_dir():
            from helios_jax.convert.orbax_io import OrbaxSource, restore_params

            if precision in (None, stored):
                params = as_qarrays(restore_params(folder / ORBAX_FOLDER, component, config, dtype, sharding_of,
                                                   stored))
                return params if only is None else unflatten(
                    [(path, leaf) for path, leaf in flatten(params) if only(path)])
            source = OrbaxSource(folder / ORBAX_FOLDER, component, config, dtype)
        else:
            source = stack.enter_context(SafetensorsSource(folder, component, config, dtype, from_wan))
        read = _load_leaf
        if precision not in (None, "none"):
            source, read = QuantisedSource(source, precision), _load_blocks
        return as_qarrays(unflatten([(leaf.path, read(source, leaf, sharding_of(leaf)))
                                     for leaf in leaves(component, config, source.precision)
                                     if only is None or only(leaf.path)]))


def load_wan_transformer(model: str | Path, dtype: Any = None, sharding: Shardings = None,
                         ) -> tuple[TransformerConfig, dict[str, Any]]:
    """The transformer of a Wan 2.1 text-to-video model as a Helios transformer to be trained.

    Args:
      model: folder or hub id of the diffusers version (e.g. 'Wan-AI/Wan2.1-T2V-14B-Diffusers').

    Returns: its Helios configuration and parameters, with history patches made from the patch embedding.
    """
    folder = resolve_model(model) / "transformer"
    config = _wan_config(folder)
    return config, load_component(folder, "transformer", config, dtype, sharding, from_wan=True)


def load_pipeline_params(model: str | Path, dtype: Any = None, components: Sequence[str] = COMPONENTS,
                         sharding: Mapping[str, Shardings] | None = None, precision: str | None = None,
                         ) -> tuple[ModelFolder, dict[str, dict[str, Any]]]:
    """Loads a whole model.

    Args:
      model: folder (published layout or Orbax) or hub id.
      dtype: the dtype to compute in, for all components or as a mapping component -> dtype; None keeps the stored
        dtypes. The original's program uses bfloat16 and keeps the VAE in float32.
      components: which ones to load.
      sharding: component -> shardings, see :func:`load_component`.
      precision: of transformer and text encoder, see :func:`load_component`.

    Returns: the folder with all configurations, and component -> parameters.

    Raises:
      UserError: see :func:`load_component`.
    """
    folder = read_model_folder(resolve_model(model))
    params = {}
    for component in components:
        component_dtype = dtype.get(component) if isinstance(dtype, Mapping) else dtype
        params[component] = load_component(folder.root / component, component, folder.config(component),
                                           component_dtype, (sharding or {}).get(component),
                                           precision=precision if component in STACKS else None)
    return folder, params


def _wan_config(folder: Path) -> TransformerConfig:
    return transformer_config_from_wan(read_json(folder / "config.json"))


def _sharding_lookup(sharding: Shardings) -> Callable[[Leaf], Sharding]:
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if isinstance(sharding, Sharding):
        return lambda leaf: sharding
    if isinstance(sharding, Mapping):

        def from_tree(leaf: Leaf) -> Sharding:
            node: Any = sharding
            for name in leaf.path:
                node = node[name]
            return node

        return from_tree
    return lambda leaf: sharding(leaf.path, leaf.shape)


def _load_leaf(source: SafetensorsSource, leaf: Leaf, sharding: Sharding) -> jax.Array:
    if isinstance(sharding, jax.sharding.SingleDeviceSharding):
        return jax.device_put(source.read(leaf), sharding)
    needed = sharding.addressable_devices_indices_map(leaf.shape).values()
    return jax.make_array_from_callback(leaf.shape, sharding, _shard_reader(source, leaf, needed))


def _load_blocks(source: LeafSource, leaf: Leaf, sharding: Sharding) -> jax.Array:
    """A leaf of a source that only hands out blocks; whole on the host."""
    whole = np.empty(leaf.shape, source.dtype(leaf))
    for index, block in source.blocks(leaf):
        whole[index] = block
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: whole[index])


def _shard_reader(source: SafetensorsSource, leaf: Leaf, needed: Iterable[Index]) -> Callable[[Index], np.ndarray]:
    """Reads the shards that this process needs, each once, and returns the lookup by index."""
    shards = {_bounds(index, leaf) for index in needed}
    if 2 * sum(math.prod(stop - start for start, stop in shard) for shard in shards) >= math.prod(leaf.shape):
        # Shards that split PyTorch's second axis each cost a read of all rows; then one read serves them all.
        whole = source.read(leaf)
        return lambda index: whole[index]
    parts = {shard: source.read(leaf, tuple(slice(*bounds) for bounds in shard)) for shard in shards}
    return lambda index: parts[_bounds(index, leaf)]


def _bounds(index: Index, leaf: Leaf) -> tuple[tuple[int, int], ...]:
    """(start, stop) per axis of one shard."""
    return tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True))
