"""How much memory each step of a comparison needs, and how much there is."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from pathlib import Path

import numpy as np

from helios_jax.convert.folder import ORBAX_FOLDER, ModelFolder
from helios_jax.convert.rules import Leaf, leaves, param_dtype
from helios_jax.convert.sources import LeafSource, SafetensorsSource
from helios_jax.errors import UserError
from helios_jax.verify.inputs import CHUNK_FRAMES, CHUNK_LATENTS, TIERS, Settings

# The process itself with JAX, PyTorch, diffusers and transformers imported and their programs compiled.
PROGRAM_BYTES = 1.5e9
FLOAT32 = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True)
class Step:
    """One stretch of a comparison, in which no more than one framework's components are in memory.

    Attributes:
      name: the components it compares.
      weights, workspace: bytes.
    """

    name: str
    weights: int
    workspace: int

    @property
    def total(self) -> float:
        return PROGRAM_BYTES + self.weights + self.workspace


def kept_dtype(folder: ModelFolder, component: str, dtype: str) -> str:
    """The dtype in which a component's weights are kept to be computed with in ``dtype``.

    For float32 that is the stored half type, if every parameter that may be a half type is stored in one: each weight
    is widened when it is used, which loses nothing.
    """
    if dtype != "float32":
        return dtype
    with _source(folder, component) as source:
        for half in ("bfloat16", "float16"):
            # What the half-precision component keeps in float32 may be stored in either.
            if all(source.dtype(leaf).name == half for leaf in leaves(component, folder.config(component))
                   if param_dtype(component, leaf.path, _dtype(half)) != FLOAT32):
                return half
    return "float32"


def weight_bytes(folder: ModelFolder, component: str, dtype: str) -> int:
    """Bytes of a component's weights in the larger of the two frameworks.

    Raises:
      UserError: the checkpoint does not hold exactly the component's tensors.
    """
    all_leaves = leaves(component, folder.config(component))
    kept = _dtype(kept_dtype(folder, component, dtype))
    in_torch = sum(_bytes(leaf, param_dtype(component, leaf.path, kept)) for leaf in all_leaves)
    with _source(folder, component, None if dtype == "float32" else _dtype(dtype)) as source:
        return max(in_torch, sum(_bytes(leaf, source.dtype(leaf)) for leaf in all_leaves))


def plan(settings: Settings) -> list[Step]:
    """The steps of a comparison.

    Raises:
      UserError: a component's files are damaged or do not hold exactly its tensors.
    """
    wanted, steps = set(settings.components), []

    def weights(component: str, dtype: str) -> int:
        return max(weight_bytes(folder, component, dtype) for folder in (settings.folder, settings.against))

    if "text_encoder" in wanted:
        steps.append(Step("text_encoder", weights("text_encoder", settings.dtype), _text_workspace(settings)))
    if "vae" in wanted:
        steps.append(Step("vae", 2 * weights("vae", "float32"), _vae_workspace(settings)))  # float64
    if {"transformer", "sample"} & wanted:
        names = [c for c in ("transformer", "sample") if c in wanted]
        step = Step(" + ".join(names), weights("transformer", settings.dtype), _transformer_workspace(settings))
        if "sample" in wanted:  # decodes its chunks
            step = Step(step.name, step.weights + 2 * weights("vae", "float32"),
                        max(step.workspace, _vae_workspace(settings)))
        steps.append(step)
    return steps


def check(steps: list[Step], available: float | None) -> None:
    """Raises:
      UserError: a step needs more than is available.
    """
    for step in steps:
        if available is not None and step.total > available:
            raise UserError(f"memory: {step.name} needs {gigabytes(step.total)} (weights {gigabytes(step.weights)}), "
                            f"available are {gigabytes(available)}; see --components, --dtype and --size")


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count < 1e10 else f"{count / 1e9:.1f} GB"


def available_bytes() -> float | None:
    """What new work can use, within the container's limit if there is one; None where the system does not say."""
    amounts = []
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        amounts.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    with contextlib.suppress(OSError, StopIteration, ValueError):  # "max" is no number: no limit
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        lines = (group / "memory.stat").read_text().splitlines()
        cached = int(next(line for line in lines if line.startswith("inactive_file ")).split()[1])
        amounts.append(limit - used + cached)
    if not amounts:
        with contextlib.suppress(OSError, ValueError):
            amounts.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(amounts, default=None)


# --- Estimates. The factors are upper bounds of what was measured, see docs/verify.md ---------------------------------


def _text_workspace(settings: Settings) -> int:
    config = settings.folder.text_encoder
    rows = 512 * 4 * (16 * config.d_model + 4 * config.d_ff)
    attention = 6 * config.num_heads * 512 * 512 * 4
    return _widened(settings, "text_encoder", "shared") + rows + attention


def _vae_workspace(settings: Settings) -> int:
    config = settings.folder.vae
    width = max(config.base_dim, config.decoder_base_dim or 0)
    return 12 * CHUNK_FRAMES * settings.size.height * settings.size.width * width * 4


def _transformer_workspace(settings: Settings) -> int:
    config = settings.folder.transformer
    rows, columns = (n // 2 for n in settings.latent_size)
    short, mid, long = TIERS
    tokens = (CHUNK_LATENTS + short) * rows * columns + sum(
        -(-frames // k) * -(-rows // k) * -(-columns // k) for frames, k in ((mid, 2), (long, 4)))
    prompt = 4 * config.num_layers * 512 * config.dim * 4  # keys and values of two prompts, at most
    return _widened(settings, "transformer") + 4 * tokens * (32 * config.dim + 4 * config.ffn_dim) + prompt


def _widened(settings: Settings, component: str, *except_for: str) -> int:
    """float64 bytes of one layer and of what lies outside the layers: what is widened at the same time at most."""
    total = 0
    for leaf in leaves(component, settings.folder.config(component)):
        if leaf.path[0] not in except_for:
            total += _bytes(leaf, np.dtype(np.float64)) // (leaf.shape[0] if leaf.stacked else 1)
    return total


def _bytes(leaf: Leaf, dtype: np.dtype) -> int:
    return math.prod(leaf.shape) * dtype.itemsize


def _dtype(name: str) -> np.dtype:
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, name) if name == "bfloat16" else name)


@contextlib.contextmanager
def _source(folder: ModelFolder, component: str, dtype: np.dtype | None = None):
    part, config = folder.root / component, folder.config(component)
    if (part / ORBAX_FOLDER).is_dir():
        from helios_jax.convert.orbax_io import OrbaxSource

        yield OrbaxSource(part / ORBAX_FOLDER, component, config, dtype)
        return
    source: LeafSource
    with SafetensorsSource(part, component, config, dtype) as source:
        yield source
