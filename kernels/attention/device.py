"""Which device a traced call is meant for."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Device(NamedTuple):
    """platform: "cpu", "gpu" or "tpu"; kind: the device's name, such as "NVIDIA H100 80GB HBM3" or "TPU v5p"."""

    platform: str
    kind: str


def current_device() -> Device:
    """The abstract device of the mesh in context (ahead-of-time compilation), else JAX's default device.

    The mesh in context is part of the key of JAX's tracing caches, so a function that was traced for a CPU is traced
    anew under a TPU topology's mesh.
    """
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if abstract is not None:
        return Device(_platform(abstract.platform), abstract.device_kind)
    device = jax.config.jax_default_device
    if not isinstance(device, jax.Device):
        device = jax.devices(device)[0]
    return Device(_platform(device.platform), device.device_kind)


def _platform(name: str) -> str:
    return "gpu" if name in ("cuda", "rocm") else name
