"""Between Linen's partitioning boxes and plain trees.

Modules declare their parameters with logical axis names (``nn.with_logical_partitioning``), so ``init`` returns boxes.
The rest of the library works with plain arrays and, where it shards them, with the names beside them.
"""

from __future__ import annotations

from typing import Any

import jax
from flax.core import meta
from flax.linen import spmd

PyTree = Any


def unbox(tree: PyTree) -> PyTree:
    """The same tree with plain arrays (or abstract shapes) in place of the boxes; traceable."""
    return meta.unbox(tree)


def logical_axes(tree: PyTree) -> PyTree:
    """The logical axis names of every leaf: a tuple of names or ``None``, one per axis.

    Args:
      tree: parameters as ``init`` (or ``jax.eval_shape`` of it) returns them, boxes included.
    Returns: a tree of tuples with the structure of ``unbox(tree)``; a leaf without a box gets ``(None, ...)``.
    """

    def names(leaf: Any) -> tuple[str | None, ...]:
        if isinstance(leaf, spmd.LogicallyPartitioned):
            return tuple(leaf.names)
        return (None,) * getattr(leaf, "ndim", 0)

    return jax.tree.map(names, tree, is_leaf=lambda x: isinstance(x, meta.AxisMetadata))
