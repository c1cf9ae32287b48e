"""The loop over layers, whose weights may stay in the host's memory.

Stacked weights [L, ...] that a device has no room for lie in the host's pinned memory, and a layer's weights are copied
while the layer before it computes: two layers are on the device at a time. The copies are part of the compiled program,
so nothing returns to Python in between.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any
Body = Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]

# Weights with fewer numbers (per layer) stay on the device: they need little room, and every copy has a price.
SMALL_WEIGHT = 2**16
# Where a component's parameters have what is streamed: stacks of layers, and the table of the text encoder's tokens.
STACKS = {"transformer": ("blocks",), "text_encoder": ("encoder", "block")}
TABLES = {"text_encoder": ("shared",)}


def to_device(tree: PyTree) -> PyTree:
    """Copies of what lies in the host's memory; what is on the device already must not be asked for again, because the
    TPU compiler would then look for it in the host's memory."""
    device = jax.memory.Space.Device
    return jax.tree.map(lambda x: x if jax.typeof(x).memory_space == device else jax.device_put(x, device), tree)


def scan_layers(body: Body, carry: PyTree, weights: PyTree, others: PyTree = None, *, last: Body | None = None,
                unroll: int = 1, streamed: bool = False) -> tuple[PyTree, PyTree]:
    """``carry, out = body(carry, weights of a layer, others of a layer)`` for all layers.

    Args:
      body: one layer.
      carry: what it changes.
      weights: a tree of arrays [L, ...], or a tuple with the tree of each layer (:func:`split_layers`), over which no
        loop is compiled: where a part of a stack is copied before it is multiplied, that saves the copy.
      others: a tree of arrays [L, ...].
      last: what the last layer does in place of ``body``; its ``out`` is not returned. For computations without
        gradients: layers are then taken from the stacks by their index, because a loop over a part of a stack would
        copy it, and the gradient of an index is a sum over whole stacks.
      unroll: layers per turn of the loop.
      streamed: the weights lie in the host's memory.
    Returns: the last carry, and the outs stacked.
    """
    if isinstance(weights, tuple):
        # A function of its own is traced and lowered once, not once a layer: XLA sets it into the program in its place.
        body, outs = jax.jit(body), []
        for i, own in enumerate(weights):
            is_last = last is not None and i == len(weights) - 1
            carry, out = (last if is_last else body)(carry, own, jax.tree.map(lambda leaf, i=i: leaf[i], others))
            outs += [] if is_last else [out]
        return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *outs) if outs else None
    if last is None and not streamed:
        return jax.lax.scan(lambda carry, layer: body(carry, *layer), carry, (weights, others), unroll=unroll)
    layers = jax.tree.leaves(weights)[0].shape[0]

    def layer(tree: PyTree, i: jax.Array | int) -> PyTree:
        return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), tree)

    def step(state: PyTree, i: jax.Array) -> tuple[PyTree, PyTree]:
        carry, present = state
        coming = to_device(layer(weights, jnp.minimum(i + 1, layers - 1))) if streamed else None
        carry, out = body(carry, present if streamed else layer(weights, i), layer(others, i))
        return (carry, coming), out

    turns = layers - (last is not None)
    state, outs = (carry, to_device(layer(weights, 0)) if streamed else None), None
    if turns:
        state, outs = jax.lax.scan(step, state, jnp.arange(turns), unroll=min(unroll, turns))
    carry, present = state
    if last is not None:
        carry, _ = last(carry, present if streamed else layer(weights, layers - 1), layer(others, layers - 1))
    return carry, outs


# Where a compiled program copies a layer's weights out of their stack before it multiplies by them: on a CPU, and on a
# GPU, which reads and writes 48 GB more in every forward of the 14B model.
COPIES_FROM_STACKS = ("cpu", "gpu")


def split_layers(stacked: PyTree, in_place: bool = False) -> tuple[PyTree, ...]:
    """The tree of every layer, from arrays [L, ...] or from their ``jax.ShapeDtypeStruct``.

    Args:
      stacked: arrays of NumPy, or of JAX on one device or divided over a mesh, but not along the layers; bound to no
        device, their layers are not either.
      in_place: give up the memory of every stack once it is split: there may be no room for the whole tree twice.
    """

    def parts(leaf: Any) -> list[Any]:
        is_array = not isinstance(leaf, jax.ShapeDtypeStruct)
        leaf = jnp.asarray(leaf) if is_array else leaf
        place = None if is_array and not leaf.committed else _of_a_layer(leaf.sharding)
        if not is_array:
            return [jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=place)] * leaf.shape[0]
        found = [_layer_taker(place)(leaf, i) for i in range(leaf.shape[0])]
        if in_place:
            jax.block_until_ready(found)
            leaf.delete()
        return found

    leaves, structure = jax.tree.flatten(stacked)
    return tuple(structure.unflatten(layer) for layer in zip(*map(parts, leaves), strict=True))


def _of_a_layer(sharding: jax.sharding.Sharding | None) -> jax.sharding.Sharding | None:
    """Where one layer of a stack lies."""
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[1:]),
                                          memory_kind=sharding.memory_kind)
    return sharding


@functools.lru_cache(maxsize=64)
def _layer_taker(place: jax.sharding.Sharding | None) -> Callable[[jax.Array, int], jax.Array]:
    return jax.jit(lambda stack, i: jax.lax.dynamic_index_in_dim(stack, i, keepdims=False), out_shardings=place)


def is_streamed(component: str, path: tuple[str, ...], shape: tuple[int, ...]) -> bool:
    """Whether a parameter of a component ('transformer', 'text_encoder'; the VAE has none) can be streamed."""

    def within(place: tuple[str, ...] | None) -> bool:
        return place is not None and path[: len(place)] == place

    if within(STACKS.get(component)):
        return math.prod(shape[1:]) >= SMALL_WEIGHT
    return within(TABLES.get(component)) and math.prod(shape) >= SMALL_WEIGHT


def streamed_places(component: str, shapes: PyTree, places: PyTree) -> PyTree:
    """The places of a component's parameters with the host's memory where they can be streamed.

    Args:
      component: 'transformer', 'text_encoder' or 'vae'.
      shapes: nested dicts of arrays or ``jax.ShapeDtypeStruct``.
      places: their shardings on the device.
    """

    def place(path: tuple, leaf: Any, where: jax.sharding.Sharding) -> jax.sharding.Sharding:
        names = tuple(entry.key for entry in path)
        return where.with_memory_kind("pinned_host") if is_streamed(component, names, leaf.shape) else where

    return jax.tree_util.tree_map_with_path(place, shapes, places)
