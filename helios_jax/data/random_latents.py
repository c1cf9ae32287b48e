"""Folders of random records: the shapes of real ones, for tests and for compiling without the data."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from helios_jax.data.ode_records import OdeLevel, OdeRecord, encode_ode_record
from helios_jax.data.pipeline import DATASET_FILE, EMPTY_PROMPT_FILE
from helios_jax.data.records import LatentRecord, encode_record
from helios_jax.data.writing import record_file, write_json


def write_random_latents(folder: str | Path, *, clips: int, sections: int, height: int, width: int, channels: int = 16,
                         text_rows: int = 512, text_dim: int = 4096, frames: int = 9, seed: int = 0) -> None:
    """Writes records of standard-normal latents and embeddings.

    Args:
      folder: created if missing.
      clips: number of records.
      sections: of every clip.
      height, width, channels, frames: latent sizes of a section.
      text_rows, text_dim: of the one caption of each clip.
      seed: of the numbers.
    """
    rng = np.random.default_rng(seed)
    shape = (sections, frames, height, width, channels)
    records = (encode_record(LatentRecord(
        mean=rng.standard_normal(shape, np.float32), std=np.full(shape, 0.1, np.float16),
        text=rng.standard_normal((text_rows, text_dim), np.float32), text_lengths=np.array([text_rows]),
        captions=(f"clip {clip}",), info={})) for clip in range(clips))
    _write(folder, records, num_records=clips, sections=sections, frames=frames, height=height, width=width,
           channels=channels, text_rows=text_rows, text_dim=text_dim)
    (Path(folder) / EMPTY_PROMPT_FILE).write_bytes(
        safetensors.numpy.save({"text": np.zeros((1, text_dim), np.float32)}))


def write_random_ode_pairs(folder: str | Path, *, clips: int, sections: int, height: int, width: int,
                           channels: int = 16, text_rows: int = 512, text_dim: int = 4096, frames: int = 9,
                           seed: int = 0) -> None:
    """The same for ODE pairs of three levels; arguments as :func:`write_random_latents`."""
    rng = np.random.default_rng(seed)

    def level(steps: int, halvings: int) -> OdeLevel:
        shape = (steps + 1, frames, height >> halvings, width >> halvings, channels)
        states = rng.standard_normal(shape, np.float32)
        return OdeLevel(states, np.linspace(900, 100, steps), np.linspace(1, 0.1, steps))

    def record(clip: int) -> bytes:
        made = tuple(tuple(level(2 if section else 4, halvings) for halvings in (2, 1, 0))
                     for section in range(sections))
        text = rng.standard_normal((text_rows, text_dim), np.float32)
        return encode_ode_record(OdeRecord(made, text, f"clip {clip}", {}))

    _write(folder, map(record, range(clips)), num_records=clips, sections=sections, frames=frames, height=height,
           width=width, channels=channels, text_rows=text_rows, text_dim=text_dim,
           stage_range=[0.0, 1 / 3, 2 / 3, 1.0], gamma=1 / 3, shift_from="own")


def _write(folder: str | Path, records: Iterable[bytes], **description: Any) -> None:
    folder, name = Path(folder), "random.array_record"
    folder.mkdir(parents=True, exist_ok=True)
    with record_file(folder / name) as writer:
        for record in records:
            writer.write(record)
    write_json(folder / DATASET_FILE, {**description, "fps": 24, "files": [name]})
