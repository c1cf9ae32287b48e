"""Between Linen's partitioning boxes and plain trees.

Modules declare their parameters with logical axis names (``nn.with_logical_partitioning``), so ``init`` returns boxes.
The rest of the library works with plain arrays and, where it shards them, with the names beside them.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from flax.core import meta
from flax.linen import spmd

from helios_jax.config import TransformerConfig
from helios_jax.models.quantize import PARTS

PyTree = Any
Names = tuple[str | None, ...]


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


@functools.cache
def _transformer_axes() -> dict[tuple[str, ...], Names]:
    """Path -> axis names of every parameter that a transformer can have, as its modules declare them."""
    from helios_jax.models.transformer import HeliosTransformer  # which this module must not need to be imported

    smallest = TransformerConfig(num_attention_heads=1, attention_head_dim=6, rope_dim=(2, 2, 2), text_dim=2,
                                 freq_dim=2, ffn_dim=2, num_layers=1, is_amplify_history=True)
    axes = logical_axes(jax.eval_shape(HeliosTransformer(smallest).init, jax.random.key(0)))
    flat = jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    return {tuple(entry.key for entry in path): names for path, names in flat}


def declared_axes(path: tuple[str, ...], rank: int) -> Names | None:
    """Axis names of a transformer's parameter, or of its low-rank adapter, at the end of a path.

    An adapter's ``a`` [..., in, r] has the names of its kernel up to the last, its ``b`` [..., r, out] those of the
    layer axis and of the kernel's last; the rank is never divided. Both arrays of a quantised kernel lie transposed.

    Args:
      path: names from the root of any tree, for example ("lora", "blocks", "attn1", "to_q", "a").
      rank: of the array.
    Returns: one name or None per axis; None if no parameter of the transformer has this path.
    """
    table = _transformer_axes()
    for start in range(len(path)):
        end = path[start:]
        names = table.get(end)
        if names is None and end[-1] in PARTS and (kernel := table.get(end[:-1])):
            names = (*kernel[:-2], kernel[-1], kernel[-2])
        if names is None and end[-1] in ("a", "b"):
            kernel = table.get((*end[:-1], "kernel"))
            if kernel is not None:
                layers = kernel[: rank - 2]
                names = (*kernel[:-1], None) if end[-1] == "a" else (*layers, None, kernel[-1])
        if names is not None and len(names) == rank:
            return names
    return None
