"""In which form and where a pipeline's weights lie, known before they are read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
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
        """Counted from the configurations; on a mesh, of all devices together without what several of them hold."""
        device = host = visiting = 0
        for component in COMPONENTS:
            two_layers = 0
            for path, leaf in flatten(self._shapes(component)):
                size = math.prod(leaf.shape) * jax.dtypes.itemsize_bits(leaf.dtype) // 8
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

    def check_device(self) -> None:
        """Refuses weights that alone are more than the memory of the one device.

        Raises:
          UserError: they do not fit; it says what streaming would need.
        """
        room = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        needed = self.bytes()
        if self.partition is not None or room is None or needed.device + needed.visiting <= room:
            return
        message = f"memory: the weights take {_gb(needed.device + needed.visiting)} of the device's {_gb(room)}"
        if not self.streamed:
            other = dataclasses.replace(self, streamed=True).bytes()
            message += (f"; with stream_weights {_gb(other.device + other.visiting)}, and {_gb(other.host)} of the "
                        "host's")
        raise UserError(message)

    def _shapes(self, component: str) -> PyTree:
        return abstract_params(component, self.folder.config(component), self.dtypes[component],
                               self.precision if component in STACKS else "none")

    def _shardings(self, component: str, shapes: PyTree) -> PyTree:
        if self.partition is not None and component != "vae":
            return sharding.param_shardings(self.partition, shapes)
        there = SingleDeviceSharding(jax.local_devices()[0]) if self.partition is None else self.partition.replicated
        places = jax.tree.map(lambda _: there, shapes)
        return streamed_places(component, shapes, places) if self.streamed else places


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
