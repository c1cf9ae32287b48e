"""Compiled programs that outlive the process, in JAX's persistent cache.

The folder holds one folder per kind of device and version of JAX, so one made elsewhere may be copied or shared: what
does not fit is never loaded, and the programs are compiled as if it were not there. Inside, JAX names a program by a
hash of its text, options and compiler. Entries are the runtime's own serialised executables (machine code: take them
from people you trust); no pickle is read.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from helios_jax.errors import UserError


def default_cache() -> Path:
    """The user's folder for compiled programs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "helios_jax" / "programs"


def use_cache(folder: str | Path | None = None) -> str | None:
    """Keeps compiled programs in a folder, and takes them from there, from now on in this process.

    Args:
      folder: made where it is missing; None takes the user's own (:func:`default_cache`), unless the environment or
        ``jax.config`` names one already, and does without where that cannot be read and written.
    Returns: one line to show where the folder holds only programs of other devices or versions, else None.
    Raises:
      UserError: ``folder`` cannot be read and written.
    """
    if folder is None and jax.config.jax_compilation_cache_dir is not None:
        return None
    root = default_cache() if folder is None else Path(folder)
    here = program_place()
    try:
        others = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
        (root / here).mkdir(parents=True, exist_ok=True)
        if not os.access(root / here, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(13, "no permission")
    except OSError as error:
        if folder is None:
            return None
        raise UserError(f"compile_cache: {folder} cannot be read and written ({error.strerror}); name another folder, "
                        "or 'off'") from None
    jax.config.update("jax_compilation_cache_dir", str(root / here))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # there are many small programs, too
    compilation_cache.reset_cache()  # else a program compiled before decides that there is none
    if not others or here in others:
        return None
    return (f"compile_cache: {root} holds programs of {', '.join(others)}, none of {here}: this run compiles its own, "
            "beside them")


def program_place() -> str:
    """What compiled programs depend on beside their text: the kind of device and JAX's version, as a folder's name.

    A CPU's programs use the instructions of the machine that compiled them, so there the processor counts.
    """
    kind = jax.devices()[0].device_kind
    if jax.default_backend() == "cpu":
        info = Path("/proc/cpuinfo")
        features = re.search(r"^(flags|Features)\s*:.*$", info.read_text(), re.M) if info.is_file() else None
        known = features[0] if features else platform.processor()
        kind = f"cpu-{platform.machine()}-{hashlib.sha256(known.encode()).hexdigest()[:8]}"
    return re.sub(r"[^\w.-]+", "_", f"{kind}-jax-{jax.__version__}")
