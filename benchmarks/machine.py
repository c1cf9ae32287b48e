"""What stands beside a measurement: the machine it was made on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any


def processor_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def describe() -> dict[str, Any]:
    """Processor, cores, their load in the last minute (more than was measured means company), devices, versions."""
    import jax

    return {"processor": processor_name(), "cores": os.cpu_count(), "load": os.getloadavg()[0],
            "device": jax.devices()[0].device_kind, "devices": jax.device_count(), "python": platform.python_version(),
            "jax": jax.__version__}
