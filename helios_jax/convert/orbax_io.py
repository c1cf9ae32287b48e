"""Orbax checkpoints of parameter trees, written and read a block at a time.

Orbax saves a tree that is already in memory. Here its leaves are :class:`_PendingLeaf` objects, which a small type
handler asks for their blocks one after the other; what lands on the disk is an ordinary Orbax checkpoint, chunked per
layer, that ``StandardCheckpointer().restore`` reads as one tree. A chunk per layer also means that a process that
restores only its shards of a parameter reads little else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import type_handlers

from helios_jax.convert.rules import Config, Leaf, leaves, listing, param_dtype, unflatten
from helios_jax.convert.sources import Index, LeafSource, block_indices, block_shape
from helios_jax.convert.state_dict import match_leaves
from helios_jax.errors import UserError

# Leaves are written side by side up to this size in total.
CONCURRENT_BYTES = 64 << 20


class _PendingLeaf:
    """A leaf that is read only while it is written."""

    def __init__(self, source: LeafSource, leaf: Leaf):
        self.source, self.leaf = source, leaf
        self.shape, self.dtype = leaf.shape, source.dtype(leaf)

    @property
    def nbytes(self) -> int:  # Orbax logs it
        return math.prod(self.shape) * self.dtype.itemsize


class _PendingLeafHandler(type_handlers.TypeHandler):
    """Writes pending leaves in order, holding one block at a time."""

    def typestr(self) -> str:
        return "jax.Array"  # recorded in the checkpoint, so that Orbax restores with its own handler

    async def serialize(self, values, infos, args=None):
        group, size = [], 0
        for pending, info in zip(values, infos, strict=True):
            # Every commit of a small leaf waits for the disk, so small ones are written side by side.
            if group and size + pending.nbytes > CONCURRENT_BYTES:
                await _all(group)
                group, size = [], 0
            group.append(self._write(pending, info))
            size += pending.nbytes
        await _all(group)
        return []

    async def _write(self, pending: _PendingLeaf, info) -> None:
        spec = type_handlers.get_json_tspec_write(
            info, use_ocdbt=info.is_ocdbt_checkpoint, global_shape=pending.shape,
            local_shape=block_shape(pending.leaf, pending.dtype), dtype=pending.dtype, process_index=0)
        array = await ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context)
        for index, block in pending.source.blocks(pending.leaf):
            await array[index].write(block, can_reference_source_data_indefinitely=True)

    async def deserialize(self, infos, args=None):
        raise NotImplementedError("pending leaves are only written")

    async def metadata(self, infos):
        raise NotImplementedError("pending leaves are only written")


async def _all(writes: list) -> None:
    """Waits for every write, then raises the first failure: none may go on after the event loop has gone."""
    results = await asyncio.gather(*writes, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result


def save_leaves(folder: str | Path, source: LeafSource) -> None:
    """Writes a component's parameters as one Orbax checkpoint, in one process.

    Peak memory beyond the source's own is a few blocks: a layer of the largest stacked parameter.

    Raises:
      OSError: the disk is full or cannot be written.
    """
    tree = unflatten([(leaf.path, _PendingLeaf(source, leaf))
                      for leaf in leaves(source.component, source.config, source.precision)])
    registry = type_handlers.create_type_handler_registry((_PendingLeaf, _PendingLeafHandler()))
    try:
        with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as checkpointer:
            checkpointer.save(Path(folder).absolute(), args=ocp.args.PyTreeSave(tree))
    except ValueError as error:  # how TensorStore reports a failed system call
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def restore_params(folder: str | Path, component: str, config: Config, dtype: Any, sharding_of,
                   precision: str = "none") -> dict[str, Any]:
    """Restores a component's parameters.

    Args:
      folder: the Orbax checkpoint.
      dtype: the dtype the component will compute in; None keeps the stored dtypes.
      sharding_of: leaf -> the sharding it is restored with.
      precision: in which its kernels are stored; those that are quantised come as dicts of their two arrays.

    Raises:
      UserError: the checkpoint is damaged or of another model.
    """
    stored = _stored_arrays(folder, component, config, precision)

    def abstract_leaf(leaf: Leaf) -> jax.ShapeDtypeStruct:
        kept = stored[leaf.path].dtype if dtype is None else param_dtype(component, leaf.path, dtype)
        kept = leaf.part_dtype or jax.dtypes.canonicalize_dtype(kept)
        return jax.ShapeDtypeStruct(leaf.shape, kept, sharding=sharding_of(leaf))

    abstract = unflatten([(leaf.path, abstract_leaf(leaf)) for leaf in leaves(component, config, precision)])
    with _reading(folder), ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(Path(folder).absolute(), abstract)


class OrbaxSource:
    """The leaves of a component's Orbax checkpoint, restored one at a time.

    Raises:
      UserError: the checkpoint is damaged or of another model.
    """

    precision = "none"

    def __init__(self, folder: str | Path, component: str, config: Config, dtype: Any = None):
        self.component, self.config = component, config
        self._folder = Path(folder).absolute()
        self._compute_dtype = dtype
        self._stored = _stored_arrays(folder, component, config)

    def dtype(self, leaf: Leaf) -> np.dtype:
        if self._compute_dtype is not None:
            return param_dtype(self.component, leaf.path, self._compute_dtype)
        return np.dtype(self._stored[leaf.path].dtype)

    def blocks(self, leaf: Leaf) -> Iterator[tuple[Index, np.ndarray]]:
        wanted = unflatten([(leaf.path, 0)])
        how = unflatten([(leaf.path, ocp.RestoreArgs(restore_type=np.ndarray))])
        with _reading(self._folder), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(
                self._folder, args=ocp.args.PyTreeRestore(item=wanted, restore_args=how, partial_restore=True))
        for name in leaf.path:
            restored = restored[name]
        for index in block_indices(leaf, self.dtype(leaf)):
            yield index, restored[index].astype(self.dtype(leaf), copy=False)


def _stored_arrays(folder: str | Path, component: str, config: Config, precision: str = "none"
                   ) -> dict[tuple[str, ...], Any]:
    """Shape and dtype of every leaf in a checkpoint, checked against the rules."""
    with _reading(folder), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        metadata = checkpointer.metadata(Path(folder).absolute())
        metadata = getattr(metadata, "item_metadata", metadata)
        tree = getattr(metadata, "tree", metadata)
        stored = match_leaves(component, config, tree, str(folder), precision)
    wrong = [f"{leaf.key} is {stored[leaf.path].dtype}, expected {leaf.part_dtype}"
             for leaf in leaves(component, config, precision)
             if leaf.part_dtype is not None and stored[leaf.path].dtype != leaf.part_dtype]
    if wrong:
        raise UserError(f"{folder}: not stored in the precision {precision}: {listing('of another dtype', wrong)}")
    return stored


@contextlib.contextmanager
def _reading(folder: str | Path) -> Iterator[None]:
    try:
        with _quiet():
            yield
    except UserError:
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds for damaged checkpoints
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: the Orbax checkpoint is damaged or incomplete "
                        f"({type(error).__name__}: {reason})") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Orbax's warnings about features that a parameter tree does not use."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
