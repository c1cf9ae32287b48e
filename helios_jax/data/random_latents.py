"""A folder of random latent records: the shapes of a real one, for tests and for compiling without the data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import safetensors.numpy
from array_record.python import array_record_module

from helios_jax.data.pipeline import DATASET_FILE, EMPTY_PROMPT_FILE
from helios_jax.data.records import LatentRecord, encode_record


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
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    name = "random.array_record"
    writer = array_record_module.ArrayRecordWriter(str(folder / name), "group_size:1")
    shape = (sections, frames, height, width, channels)
    for clip in range(clips):
        writer.write(encode_record(LatentRecord(
            mean=rng.standard_normal(shape, np.float32), std=np.full(shape, 0.1, np.float16),
            text=rng.standard_normal((text_rows, text_dim), np.float32), text_lengths=np.array([text_rows]),
            captions=(f"clip {clip}",), info={})))
    writer.close()
    (folder / EMPTY_PROMPT_FILE).write_bytes(safetensors.numpy.save({"text": np.zeros((1, text_dim), np.float32)}))
    (folder / DATASET_FILE).write_text(json.dumps({
        "num_records": clips, "sections": sections, "frames": frames, "height": height, "width": width,
        "channels": channels, "fps": 24, "text_rows": text_rows, "text_dim": text_dim, "files": [name]}) + "\n",
        encoding="utf-8")
