"""Where the leaves of a parameter tree come from: safetensors files or a tree in memory (Orbax: ``orbax_io``).

A source hands out one leaf in blocks, so that neither reader nor writer ever needs a whole leaf in memory. Stacked
leaves come layer by layer; large unstacked ones in ranges of rows where rows stay contiguous.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from helios_jax.convert.folder import CheckpointFiles
from helios_jax.convert.rules import (
    HISTORY_PATCHES,
    Config,
    Layout,
    Leaf,
    Shape,
    TensorRule,
    common_dtype,
    is_float,
    leaves,
    listing,
    match_names,
    param_dtype,
    tensor_rules,
)
from helios_jax.convert.safetensors_io import copy_strips
from helios_jax.convert.state_dict import match_leaves
from helios_jax.convert.wan import history_kernel
from helios_jax.errors import UserError
from helios_jax.models.quantize import check_precision, format_of, quantise, require_qwix

Index = tuple[slice, ...]
# Reads and transposes go through buffers of this size.
BUFFER_BYTES = 64 << 20
# Layers of a stack that are read at the same time, each through a buffer of its own.
LAYERS_AT_ONCE = 4
# Unstacked leaves above this size are handed out in several blocks.
BLOCK_BYTES = 256 << 20


class LeafSource(Protocol):
    """Hands out the leaves of one component."""

    component: str
    config: Config
    precision: str  # of its kernels: which leaves there are, see :func:`~helios_jax.convert.rules.leaves`

    def dtype(self, leaf: Leaf) -> np.dtype:
        """The dtype of the leaf's blocks."""
        ...

    def blocks(self, leaf: Leaf) -> Iterator[tuple[Index, np.ndarray]]:
        """The leaf in disjoint blocks that cover it, each with the index it fills."""
        ...


def block_shape(leaf: Leaf, dtype: np.dtype) -> Shape:
    """The shape of a leaf's blocks: one layer of a stack, or rows of a table that is too large for one block."""
    if leaf.stacked:
        return (1, *leaf.shape[1:])
    row_bytes = math.prod(leaf.shape[1:]) * dtype.itemsize
    if leaf.tensors[0].layout is Layout.SAME and leaf.shape and leaf.shape[0] * row_bytes > BLOCK_BYTES:
        return (max(1, BLOCK_BYTES // row_bytes), *leaf.shape[1:])
    return leaf.shape


def block_indices(leaf: Leaf, dtype: np.dtype) -> Iterator[Index]:
    """The indices of a leaf's blocks; only the first axis is ever split."""
    shape = block_shape(leaf, dtype)
    rest = tuple(slice(0, n) for n in leaf.shape[1:])
    for start in range(0, leaf.shape[0], shape[0]):
        yield (slice(start, min(start + shape[0], leaf.shape[0])), *rest)


class SafetensorsSource:
    """The leaves of a component in the published layout.

    Args:
      folder: holds the weight files.
      component: 'transformer', 'vae' or 'text_encoder'.
      config: its configuration.
      dtype: the dtype the component will compute in; None keeps the stored dtypes.
      from_wan: the files are a Wan 2.1 text-to-video transformer, which has no history patches; they are made from
        its patch embedding.

    Raises:
      UserError: the files are damaged, or do not hold exactly the component's tensors (all listed).
    """

    precision = "none"

    def __init__(self, folder: str | Path, component: str, config: Config, dtype: Any = None, from_wan: bool = False):
        self.component, self.config = component, config
        self._compute_dtype = dtype
        self._from_wan = from_wan
        self._files = CheckpointFiles(folder, component)
        try:
            entries = self._files.entries
            stored_config = dataclasses.replace(config, has_multi_term_memory_patch=False) if from_wan else config
            self._stored = match_names(component, stored_config, {n: e.shape for n, e in entries.items()}, str(folder))
            wrong = [f"{n} is {entries[n].dtype}" for n in self._stored.values() if not is_float(entries[n].dtype)]
            if wrong:
                raise UserError(f"{folder}: float tensors expected: {listing('of another dtype', wrong)}")
            self._dtypes = {name: entries[stored].dtype for name, stored in self._stored.items()}
        except BaseException:
            self.close()
            raise

    def dtype(self, leaf: Leaf) -> np.dtype:
        if self._compute_dtype is not None:
            return param_dtype(self.component, leaf.path, self._compute_dtype)
        return common_dtype([self._dtypes[self._origin(rule).name] for rule in leaf.tensors])

    def blocks(self, leaf: Leaf) -> Iterator[tuple[Index, np.ndarray]]:
        for index in block_indices(leaf, self.dtype(leaf)):
            yield index, self.read(leaf, index)

    def read(self, leaf: Leaf, index: Index | None = None) -> np.ndarray:
        """A rectangular part of a leaf.

        Args:
          leaf: one of the component's leaves.
          index: one slice per axis with step 1; None reads the whole leaf.

        Returns: a fresh array in the dtype of :meth:`dtype`.
        """
        index = (slice(None),) * len(leaf.shape) if index is None else index
        bounds = [s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True)]
        out = np.empty([stop - start for start, stop in bounds], self.dtype(leaf))
        if leaf.stacked:
            if len(out) == 1:  # a thread's memory would stay with it
                self._read_tensor(leaf.tensors[bounds[0][0]], bounds[1:], out[0])
                return out
            with ThreadPoolExecutor(LAYERS_AT_ONCE) as pool:
                done = pool.map(lambda tensor, row: self._read_tensor(tensor, bounds[1:], row),
                                leaf.tensors[slice(*bounds[0])], out)
                collections.deque(done, maxlen=0)  # raises what a thread raised
        else:
            self._read_tensor(leaf.tensors[0], bounds, out)
        return out

    def _origin(self, rule: TensorRule) -> TensorRule:
        """The tensor in the files that ``rule`` is made from: itself, or Wan's patch embedding."""
        if self._from_wan and rule.path[0] in HISTORY_PATCHES:
            name = rule.name.replace(rule.path[0], "patch_embedding")
            return next(r for r in tensor_rules(self.component, self.config) if r.name == name)
        return rule

    def _read_tensor(self, rule: TensorRule, bounds: list[tuple[int, int]], out: np.ndarray) -> None:
        """Fills ``out`` with the part ``bounds`` of one tensor in our layout, a buffer of rows at a time."""
        origin = self._origin(rule)
        name = self._stored[origin.name]
        if origin is not rule:
            tensor = origin.layout.to_tree(self._files.read(name))
            if rule.layout is Layout.CONV:
                tensor = history_kernel(tensor, HISTORY_PATCHES[rule.path[0]])
            out[...] = tensor[tuple(slice(*b) for b in bounds)]
            return
        axis = rule.layout.row_axis(out.ndim)
        if axis is None:
            out[...] = rule.layout.to_tree(self._files.read(name))[tuple(slice(*b) for b in bounds)]
            return
        row_bytes = max(1, math.prod(rule.shape[1:]) * self._dtypes[rule.name].itemsize)
        step = max(1, BUFFER_BYTES // row_bytes)
        first, last = bounds[axis]
        others = [slice(*b) for b in bounds]
        others[axis] = slice(None)
        for start in range(first, last, step):
            stop = min(start + step, last)
            part = rule.layout.to_tree(self._files.read(name, slice(start, stop)))
            target = [slice(None)] * out.ndim
            target[axis] = slice(start - first, stop - first)
            copy_strips(out[tuple(target)], part[tuple(others)])

    def close(self) -> None:
        self._files.close()

    def __enter__(self) -> SafetensorsSource:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class TreeSource:
    """The leaves of a parameter tree in memory (numpy or jax arrays, sharded over this process' devices or not).

    Args:
      params: nested dicts, checked against the component's rules.
      dtype: cast to the dtypes of a component that computes in it; None keeps each array's dtype.
    """

    precision = "none"

    def __init__(self, component: str, config: Config, params: Mapping[str, Any], dtype: Any = None):
        self.component, self.config = component, config
        self._compute_dtype = dtype
        self._arrays = match_leaves(component, config, params)

    def dtype(self, leaf: Leaf) -> np.dtype:
        if self._compute_dtype is not None:
            return param_dtype(self.component, leaf.path, self._compute_dtype)
        return np.dtype(self._arrays[leaf.path].dtype)

    def blocks(self, leaf: Leaf) -> Iterator[tuple[Index, np.ndarray]]:
        array = self._arrays[leaf.path]
        for index in block_indices(leaf, self.dtype(leaf)):
            yield index, np.asarray(array[index]).astype(self.dtype(leaf), copy=False)


class QuantisedSource:
    """Another source's leaves, with the two arrays of a quantised kernel in place of each kernel.

    One block of a kernel at a time, a layer of its stack, is quantised on the default device.

    Args:
      source: of plain kernels.
      precision: a mode of ``helios_jax.models.quantize``.

    Raises:
      UserError: the precision is unknown, or qwix is not installed.
    """

    def __init__(self, source: LeafSource, precision: str):
        check_precision(precision, jax.devices()[0].device_kind)
        require_qwix()
        self.component, self.config, self.precision = source.component, source.config, precision
        self._source = source
        self._kernels = {leaf.path: leaf for leaf in leaves(source.component, source.config)}
        # Made beside the numbers, so that no kernel is read twice.
        self._scales: dict[tuple[str, ...], list[tuple[Index, np.ndarray]]] = {}

    def dtype(self, leaf: Leaf) -> np.dtype:
        return leaf.part_dtype or self._source.dtype(leaf)

    def blocks(self, leaf: Leaf) -> Iterator[tuple[Index, np.ndarray]]:
        if leaf.part_dtype is None:
            return self._source.blocks(leaf)
        path, part = leaf.path[:-1], leaf.path[-1]
        if part == "qvalue":
            return self._numbers(path)
        if path not in self._scales:  # asked for side by side with the numbers, or first
            collections.deque(self._numbers(path), maxlen=0)
        return iter(self._scales.pop(path))

    def _numbers(self, path: tuple[str, ...]) -> Iterator[tuple[Index, np.ndarray]]:
        format, scales = format_of(self.component, path, self.precision), []
        for (layers, *_), block in self._source.blocks(self._kernels[path]):
            quantised = jax.tree.map(np.asarray, quantise(block, format))
            index = (layers, slice(None), slice(None))
            scales.append((index, quantised.scale))
            yield index, quantised.qvalue
        self._scales[path] = scales
