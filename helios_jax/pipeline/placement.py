"""In which form and where a pipeline's weights lie, known before they are read."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import SingleDeviceSharding

from helios_jax import sharding
from helios_jax.convert.folder import ModelFolder
from helios_jax.convert.rules import COMPONENTS, abstract_params, flatten
from helios_jax.errors import UserError
from helios_jax.models.quantize import as_qarrays
from helios_jax.models.streaming import STACKS, is_streamed, streamed_places
from helios_jax.sharding import Partition

PyTree = Any


class WeightBytes(NamedTuple):
    """Bytes of a pipeline's weights.

    Attributes:
      device: what stays on the device.
      host: what stays in the host's memory.
      visiting: what of it is on the device at a time: two layers, or the table of the text encoder's tokens.
    """

    device: int
    host: int
    visiting: int


@dataclasses.dataclass(frozen=True)
class Placement:
    """Form and place of the weights.

    Attributes:
      folder: the model.
      dtypes: component -> the dtype it computes in.
      precision: of the kernels, a mode of ``helios_jax.models.quantize``.
      partition: the mesh; None for one device.
      streamed: the weights of transformer and text encoder stay in the host's memory; for one device.
    """

    folder: ModelFolder
    dtypes: Mapping[str, Any]
    precision: str = "none"
    partition: Partition | None = None
    streamed: bool = False

    def shardings(self) -> dict[str, PyTree]:
        """Component -> a sharding for every array, as the loaders take it. On a mesh the VAE, which is small, is whole
        on every device."""
        return {component: self._shardings(component, self._shapes(component)) for component in COMPONENTS}

    def abstract(self) -> dict[str, PyTree]:
        """Component -> the parameters that will be read, as ``jax.ShapeDtypeStruct``."""
        found = {}
        for component in COMPONENTS:
            shapes = self._shapes(component)
            found[component] = as_qarrays(sharding.with_shardings(shapes, self._shardings(component, shapes)))
        return found

    def bytes(self) -> WeightBytes:
        """Counted from the configurations; on a mesh, of one device."""
        device = host = visiting = 0
        for component in COMPONENTS:
            two_layers = 0
            shapes = self._shapes(component)
            places = {} if self.partition is None else dict(flatten(self._shardings(component, shapes)))
            for path, leaf in flatten(shapes):
                size = _bytes(places[path].shard_shape(leaf.shape) if places else leaf.shape, leaf.dtype)
                if not (self.streamed and is_streamed(component, path, leaf.shape)):
                    device += size
                    continue
                host += size
                if path[: len(STACKS[component])] == STACKS[component]:
                    two_layers += 2 * size // leaf.shape[0]
                else:
                    visiting = max(visiting, size)
            visiting = max(visiting, two_layers)
        return WeightBytes(device, host, visiting)

    def layer_bytes(self) -> int:
        """Of one block of the transformer, as a device holds it that has gathered what ``fsdp`` divides."""
        divided = 1 if self.partition is None else self.partition.size("heads")
        blocks = self._shapes("transformer")["blocks"]
        return sum(_bytes(leaf.shape[1:], leaf.dtype) for _, leaf in flatten(blocks)) // divided

    def largest_stack_bytes(self) -> int:
        """Of the largest stack of blocks, on one device: it is there twice while it is taken apart."""
        shapes = self._shapes("transformer")
        places = {} if self.partition is None else dict(flatten(self._shardings("transformer", shapes)["blocks"]))
        return max(_bytes(places[path].shard_shape(leaf.shape) if places else leaf.shape, leaf.dtype)
                   for path, leaf in flatten(shapes["blocks"]))

    def _shapes(self, component: str) -> PyTree:
        return abstract_params(component, self.folder.config(component), self.dtypes[component],
                               self.precision if component in STACKS else "none")

    def _shardings(self, component: str, shapes: PyTree) -> PyTree:
        if self.partition is not None and component != "vae":
            return sharding.param_shardings(self.partition, shapes)
        there = SingleDeviceSharding(jax.local_devices()[0]) if self.partition is None else self.partition.replicated
        places = jax.tree.map(lambda _: there, shapes)
        return streamed_places(component, shapes, places) if self.streamed else places


@contextlib.contextmanager
def plain_path_offered() -> Iterator[None]:
    """Adds to the line about a mesh that does not fit that there is a way without one."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}; without a mesh (no --mesh) one device makes the videos") from None


def _bytes(shape: tuple[int, ...], dtype: Any) -> int:
    return math.prod(shape) * jax.dtypes.itemsize_bits(dtype) // 8
