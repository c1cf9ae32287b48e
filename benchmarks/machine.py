"""What stands beside a measurement: the machine it was made on."""

from __future__ import annotations

import os
import platform
import resource
from pathlib import Path
from typing import Any


def processor_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _kilobytes(file: str, field: str) -> int | None:
    """A field of a file in /proc, in bytes; None where there is none."""
    lines = Path(file).read_text().splitlines() if Path(file).exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def host_peak_bytes() -> int:
    """The most memory that this process has had. Linux gives ``ru_maxrss`` of the process that started it, too, where
    that is more, so it comes second."""
    return _kilobytes("/proc/self/status", "VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def describe() -> dict[str, Any]:
    """Processor, cores, their load in the last minute (more than was measured means company), devices, bytes of memory
    (of a device what JAX may use; None where it does not say), versions."""
    import jax

    device = jax.devices()[0]
    return {"processor": processor_name(), "cores": os.cpu_count(), "load": os.getloadavg()[0],
            "memory": _kilobytes("/proc/meminfo", "MemTotal"), "device": device.device_kind,
            "devices": jax.device_count(), "device_memory": (device.memory_stats() or {}).get("bytes_limit"),
            "runtime": device.client.platform_version, "python": platform.python_version(), "jax": jax.__version__}
