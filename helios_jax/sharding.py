"""One mesh for training: which device holds which part of what.

Parameters name their axes where they are declared ("embed", "heads", "mlp", ...), activations where they are made
("batch", "sequence", ...). A table of rules, which is data of the run's configuration, says over which of the four
mesh axes each name is divided:

    data      whole copies of the model, other samples
    fsdp      other samples; parameters, their average and the optimizer's state are divided too
    context   the tokens of one sample (around attention its heads, by an all-to-all); columns of frames in the VAE
    tensor    heads and hidden units of one layer; columns of frames in the VAE

The compiler derives the communication; attention alone exchanges tokens for heads itself. On one device nothing here
changes anything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from helios_jax.errors import UserError
from kernels.attention import partition as attention_partition
from kernels.attention.partition import AttentionPartition

PyTree = Any
Names = tuple[str | None, ...]

MESH_AXES = ("data", "fsdp", "context", "tensor")
# Logical axis -> mesh axes. "layers", "vocab" and every other name that is not listed is never divided.
DEFAULT_RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    # parameters
    ("embed", ("fsdp",)),
    ("heads", ("tensor",)),
    ("mlp", ("tensor",)),
    ("largest", ("fsdp",)),  # the largest axis of a large parameter that is not divided so by the others
    # activations
    ("batch", ("data", "fsdp")),
    ("sequence", ("context",)),
    ("hidden", ("tensor",)),
    ("width", ("context", "tensor")),  # columns of the frames in the VAE
)
# Parameters with fewer numbers (per layer) are divided only as they declare.
SMALL_PARAMETER = 2**16


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh and the rules that differ from :data:`DEFAULT_RULES`.

    Attributes:
      data, fsdp, context, tensor: devices along each axis; one of them may be -1, which takes all that remain.
      rules: (logical axis, mesh axes) pairs; each replaces the default rule of that name.
    """

    data: int = 1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1
    rules: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def __post_init__(self):
        for axis, size in self.sizes.items():
            if size < 1 and size != -1:
                raise UserError(f"mesh.{axis}: a positive number or -1 for the remaining devices, got {size}")
        if list(self.sizes.values()).count(-1) > 1:
            raise UserError(f"mesh: only one axis may be -1, got {_listing(self.sizes)}")
        for name, axes in self.rules:
            unknown = [axis for axis in axes if axis not in MESH_AXES]
            if unknown:
                raise UserError(f"mesh.rules: {name!r} names the mesh axis {unknown[0]!r}; there are "
                                f"{', '.join(MESH_AXES)}")

    @property
    def sizes(self) -> dict[str, int]:
        """As configured, -1 included."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}

    def resolve(self, num_devices: int) -> dict[str, int]:
        """The sizes on so many devices.

        Raises:
          UserError: the sizes do not divide the devices or need more of them.
        """
        sizes = self.sizes
        fixed = math.prod(size for size in sizes.values() if size != -1)
        if -1 in sizes.values():
            if num_devices % fixed:
                raise UserError(f"mesh: {num_devices} devices do not divide by {fixed}, the product of the given sizes "
                                f"({_listing(sizes)}), but by "
                                + ", ".join(str(n) for n in range(1, num_devices + 1) if num_devices % n == 0))
            return {axis: num_devices // fixed if size == -1 else size for axis, size in sizes.items()}
        if fixed > num_devices:
            raise UserError(f"mesh: {_listing(sizes)} needs {fixed} devices, there are {num_devices}")
        return sizes


def _listing(sizes: dict[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items())


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a run; its axes are ``MESH_AXES``, all of the automatic kind.

    Neighbours on an axis are neighbours on the chips' torus where its shape allows it; else an axis takes a part of one
    of the torus. Slices (parts of a job without the fast network between them: TPU slices, GPU machines) are divided
    over the first axes that take them, so over ``data`` if its size does.

    Args:
      config: the sizes.
      devices: default: all devices of all processes. A single process may use fewer than it has; the first ones are
        taken.

    Raises:
      UserError: the sizes do not fit the devices or their slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = config.resolve(len(devices))
    wanted = math.prod(sizes.values())
    if wanted < len(devices):
        if len({device.process_index for device in devices}) > 1:
            raise UserError(f"mesh: {_listing(sizes)} uses {wanted} of {len(devices)} devices, but with several "
                            "processes every device must take part; set one axis to -1")
        devices = devices[:wanted]
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    between = []  # how many slices stand along each axis
    for size in sizes.values():
        between.append(math.gcd(size, slices // math.prod(between)))
    if math.prod(between) != slices:
        raise UserError(f"mesh: {_listing(sizes)} cannot be divided over {slices} slices")
    within = [size // count for size, count in zip(sizes.values(), between, strict=True)]

    def arranged(split: bool) -> np.ndarray:
        if slices == 1:
            return mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=split)
        return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=split)

    try:
        found = arranged(split=False)
    except NotImplementedError:  # no product of the torus's axes is the size of one of these
        found = arranged(split=True)
    return Mesh(found, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


@dataclasses.dataclass(frozen=True)
class Partition:
    """A mesh with its rules: everything that is needed to place an array.

    Attributes:
      mesh: of :func:`make_mesh`.
      rules: logical axis -> mesh axes.
    """

    mesh: Mesh
    rules: dict[str, tuple[str, ...]]

    @classmethod
    def create(cls, config: MeshConfig, devices: Sequence[Any] | None = None) -> Partition:
        """From a run's configuration. Raises UserError, see :func:`make_mesh`."""
        return cls(make_mesh(config, devices), {**dict(DEFAULT_RULES), **dict(config.rules)})

    def size(self, name: str) -> int:
        """Over how many devices the logical axis is divided."""
        return math.prod(self.mesh.shape[axis] for axis in self.rules.get(name, ()))

    def axes(self, name: str | None) -> tuple[str, ...]:
        """The mesh axes of a logical axis that have more than one device."""
        return tuple(axis for axis in self.rules.get(name, ()) if self.mesh.shape[axis] > 1)

    def spec(self, names: Names, shape: Sequence[int]) -> PartitionSpec:
        """Where an array with these logical axes lies.

        A mesh axis that does not divide the array's axis is left out there: the array is then whole along it.

        Raises:
          ValueError: the number of names is not the array's rank. UserError: the rules use a mesh axis twice.
        """
        if len(names) != len(shape):
            raise ValueError(f"{len(names)} axis names {names} for an array of shape {tuple(shape)}")
        entries, used = [], set()
        for name, size in zip(names, shape, strict=True):
            axes = self.axes(name)
            while axes and size % math.prod(self.mesh.shape[axis] for axis in axes):
                axes = axes[:-1]
            if used & set(axes):
                raise UserError(f"mesh.rules: an array with the axes {names} would be divided twice over "
                                f"{', '.join(sorted(used & set(axes)))}")
            used |= set(axes)
            entries.append(axes[0] if len(axes) == 1 else axes or None)
        return PartitionSpec(*entries)

    def sharding(self, names: Names, shape: Sequence[int]) -> NamedSharding:
        """:meth:`spec` on this mesh."""
        return NamedSharding(self.mesh, self.spec(names, shape))

    @property
    def replicated(self) -> NamedSharding:
        """Whole on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def batch(self, shape: Sequence[int]) -> NamedSharding:
        """Of an array whose leading axis is the batch."""
        return self.sharding(("batch", *[None] * (len(shape) - 1)), shape)

    @property
    def attention(self) -> AttentionPartition:
        """Which mesh axes divide the samples, tokens and heads of an attention."""
        return AttentionPartition(self.mesh, self.axes("batch"), self.axes("sequence"), self.axes("heads"))

    def check_batch(self, batch_size: int, accumulate: int = 1) -> None:
        """Raises UserError unless every device gets equally many samples in each of ``accumulate`` parts."""
        parts = self.size("batch") * accumulate
        if batch_size % parts:
            raise UserError(f"batch_size: {batch_size} does not divide by {parts} (mesh.data {self.mesh.shape['data']} "
                            f"x mesh.fsdp {self.mesh.shape['fsdp']} x accumulate {accumulate})")

    def local_rows(self, batch_size: int) -> np.ndarray:
        """Which rows of a global batch this process' devices hold, ascending: int [rows]."""
        indices = self.batch((batch_size,)).addressable_devices_indices_map((batch_size,)).values()
        return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


# -- parameters and whatever follows them ---------------------------------------------------------------------------


def _path_names(path: tuple) -> tuple[str, ...]:
    return tuple(str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path)


def param_shardings(partition: Partition, abstract_params: PyTree) -> PyTree:
    """A sharding for every parameter, adapter or frozen array.

    Axis names come from the transformer's declarations, found by the end of the path; so a tree may hold the
    transformer's parameters or adapters at any depth. A large array that these names leave whole along the mesh axes of
    the rule "largest" (half of all adapters, whose kernel has "embed" on the side of the other half) is divided over
    them along its largest axis that is free, but never along its layers; small ones stay as they are.

    Args:
      partition: mesh and rules.
      abstract_params: tree of arrays or ``jax.ShapeDtypeStruct``.
    """
    from helios_jax.models.partition import declared_axes  # it builds the models, which import this file

    def place(path: tuple, leaf: Any) -> NamedSharding:
        shape = tuple(np.shape(leaf))
        names = list(declared_axes(_path_names(path), len(shape)) or [None] * len(shape))
        spec = partition.spec(tuple(names), shape)
        used = {axis for entry in spec if entry for axis in (entry if isinstance(entry, tuple) else (entry,))}
        free = [size if name != "layers" and entry is None and size % partition.size("largest") == 0 else 0
                for name, entry, size in zip(names, spec, shape, strict=True)]
        numbers = math.prod(size for name, size in zip(names, shape, strict=True) if name != "layers")
        if numbers >= SMALL_PARAMETER and any(free) and not used & set(partition.axes("largest")):
            names[int(np.argmax(free))] = "largest"
        return partition.sharding(tuple(names), shape)

    return jax.tree_util.tree_map_with_path(place, abstract_params)


def following_shardings(partition: Partition, abstract_tree: PyTree, params: PyTree, shardings: PyTree) -> PyTree:
    """Shardings for what belongs to parameters: their average, an optimizer's state.

    A leaf follows the parameter whose path its own path ends with, if it has that parameter's shape; everything else
    (counters) is whole on every device.

    Args:
      partition: mesh and rules.
      abstract_tree: the state, with ``jax.ShapeDtypeStruct`` leaves.
      params, shardings: the abstract parameters and their shardings.
    """
    known = {_path_names(path): (tuple(np.shape(leaf)), sharding) for (path, leaf), sharding in
             zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True)}

    def place(path: tuple, leaf: Any) -> NamedSharding:
        names = _path_names(path)
        for start in range(len(names)):
            shape, sharding = known.get(names[start:], (None, None))
            if shape == tuple(leaf.shape):
                return sharding
        return partition.replicated

    return jax.tree_util.tree_map_with_path(place, abstract_tree)


def with_shardings(abstract: PyTree, shardings: PyTree) -> PyTree:
    """``jax.ShapeDtypeStruct`` leaves that know their place."""
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                        abstract, shardings)


# -- moving arrays between host and mesh ----------------------------------------------------------------------------


def place(tree: PyTree, shardings: PyTree) -> PyTree:
    """Arrays (the same in every process) onto the mesh; arrays that already lie there are not copied."""

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        if sharding.is_fully_addressable or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
            return jax.device_put(leaf, sharding)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree, shardings)


def place_batch(partition: Partition, batch: PyTree, batch_size: int) -> PyTree:
    """Global arrays of a batch, of which this process has read its own rows (:meth:`Partition.local_rows`) or all."""
    rows = partition.local_rows(batch_size)

    def put(local: np.ndarray) -> jax.Array:
        shape = (batch_size, *local.shape[1:])
        sharding = partition.batch(shape)
        if sharding.is_fully_addressable:
            return jax.device_put(local, sharding)
        if len(local) == batch_size:
            local = local[rows]

        def shard(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            first = int(np.searchsorted(rows, start))
            return local[(slice(first, first + stop - start), *index[1:])]

        return jax.make_array_from_callback(shape, sharding, shard)

    return jax.tree.map(put, batch)


def gather(tree: PyTree) -> PyTree:
    """Whole copies of arrays that lie on a mesh, as numpy arrays in the first process, None in the others.

    Every process must call it. Arrays that other processes hold parts of come a slice of the leading axis at a time,
    so that neither a device nor another process needs room for a whole stack of layers.
    """
    from jax.experimental import multihost_utils

    is_first = jax.process_index() == 0

    def whole(leaf: Any) -> np.ndarray | None:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
            slices = [leaf] if leaf.ndim < 3 else (leaf[i] for i in range(leaf.shape[0]))
            parts = []
            for part in slices:
                gathered = multihost_utils.process_allgather(part, tiled=True)
                parts += [np.asarray(gathered)] if is_first else []
            if not is_first:
                return None
            return parts[0] if leaf.ndim < 3 else np.stack(parts)
        if not is_first:
            return None
        return np.asarray(leaf)

    return jax.tree.map(whole, tree)


# -- inside the model -----------------------------------------------------------------------------------------------

_CURRENT: ContextVar[Partition | None] = ContextVar("partition", default=None)


@contextlib.contextmanager
def use(partition: Partition) -> Iterator[None]:
    """Within it, :func:`constrain` and the input pipelines know the mesh, and attention runs device by device."""
    token = _CURRENT.set(partition)
    try:
        with attention_partition.use(partition.attention):
            yield
    finally:
        _CURRENT.reset(token)


def current() -> Partition | None:
    """The partition in :func:`use`."""
    return _CURRENT.get()


def jit(partition: Partition | None, function: Callable[..., Any], **options: Any) -> Any:
    """``jax.jit`` of a function that runs on a mesh; what it returns is whole on every device.

    Args:
      partition: mesh and rules; None, or one device, for plain ``jax.jit``.
      function: traced within :func:`use`.
      options: of ``jax.jit``.
    """
    if partition is None or partition.mesh.size == 1:
        return jax.jit(function, **options)

    @functools.wraps(function)
    def on_mesh(*args: Any, **kwargs: Any) -> Any:
        with use(partition):
            return function(*args, **kwargs)

    return jax.jit(on_mesh, out_shardings=partition.replicated, **options)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """States where an activation lies; without a mesh, or on one device, it is ``x`` itself.

    Args:
      x: any array.
      names: one logical axis, or None, per axis of ``x``.
    """
    partition = _CURRENT.get()
    if partition is None or partition.mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition.sharding(names, x.shape))


def local_rows(batch_size: int) -> np.ndarray | None:
    """Rows of every global batch that this process reads, or None for all of them."""
    partition = _CURRENT.get()
    if partition is None:
        return None
    rows = partition.local_rows(batch_size)
    return None if len(rows) == batch_size else rows
