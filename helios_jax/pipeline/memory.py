"""Whether a model's weights fit a device, before they are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from helios_jax.convert.folder import ModelFolder
from helios_jax.convert.rules import COMPONENTS, leaves, param_dtype
from helios_jax.errors import UserError
from helios_jax.models.streaming import is_streamed


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


def weight_bytes(folder: ModelFolder, dtypes: Mapping[str, Any], streamed: bool = False) -> WeightBytes:
    """Where the weights lie, counted from the configurations.

    Args:
      folder: the model.
      dtypes: component -> the dtype it computes in.
      streamed: with the weights of transformer and text encoder in the host's memory.
    """
    device = host = visiting = 0
    for component in COMPONENTS:
        two_layers = 0
        for leaf in leaves(component, folder.config(component)):
            size = math.prod(leaf.shape) * param_dtype(component, leaf.path, dtypes[component]).itemsize
            if not (streamed and is_streamed(component, leaf.path, leaf.shape)):
                device += size
                continue
            host += size
            if leaf.stacked:
                two_layers += 2 * size // leaf.shape[0]
            else:
                visiting = max(visiting, size)
        visiting = max(visiting, two_layers)
    return WeightBytes(device, host, visiting)


def check_device(folder: ModelFolder, dtypes: Mapping[str, Any], streamed: bool) -> None:
    """Refuses a model whose weights alone are more than the device's memory.

    Raises:
      UserError: they do not fit.
    """
    room = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    needed = weight_bytes(folder, dtypes, streamed)
    if room is None or needed.device + needed.visiting <= room:
        return
    message = f"memory: the weights take {_gb(needed.device + needed.visiting)} of the device's {_gb(room)}"
    if not streamed:
        other = weight_bytes(folder, dtypes, streamed=True)
        message += f"; with stream_weights {_gb(other.device + other.visiting)}, and {_gb(other.host)} of the host's"
    raise UserError(message)


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
