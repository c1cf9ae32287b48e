"""The record of one clip: latents of its sections, captions, and the captions' embeddings.

A record is a safetensors file in memory (a JSON header, then raw arrays): readable by anybody, no code runs when it is
read. Latents are stored as mean and standard deviation of the VAE's posterior, not as one sample, so every epoch
trains on fresh samples of it: a small data set would otherwise teach its particular noise, at no saving but disk.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import safetensors.numpy

from helios_jax.errors import UserError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class LatentRecord:
    """One clip.

    Attributes:
      mean, std: [S, T, h, w, C] float16, normalised by the VAE's per-channel statistics (the standard deviation by
        their scale). Every section is encoded by itself, so its first frame is a latent of a single image.
      text: [n, D] float16, the embeddings of all captions one after another, without padding.
      text_lengths: [K] int32, rows of each caption.
      captions: K phrasings of what the clip shows.
      info: anything worth keeping about the clip, JSON values.
    """

    mean: np.ndarray
    std: np.ndarray
    text: np.ndarray
    text_lengths: np.ndarray
    captions: tuple[str, ...]
    info: dict[str, Any]

    @property
    def num_captions(self) -> int:
        return len(self.text_lengths)

    def sample(self, rng: np.random.Generator, sections: Sequence[int]) -> np.ndarray:
        """A sample of the posterior of some sections, float32 [U, T, h, w, C]."""
        mean, std = (array[np.asarray(sections)].astype(np.float32) for array in (self.mean, self.std))
        return mean + std * rng.standard_normal(mean.shape, dtype=np.float32)

    def caption_rows(self, index: int, rows: int) -> tuple[np.ndarray, int]:
        """Embedding of caption ``index``, float32 [rows, D] with zeros behind it, and its own number of rows."""
        start, length = int(self.text_lengths[:index].sum()), int(self.text_lengths[index])
        return padded_rows(self.text[start : start + length], rows), length


def padded_rows(text: np.ndarray, rows: int) -> np.ndarray:
    """An embedding [n, D] as float32 [rows, D] with zeros behind it."""
    return np.pad(text.astype(np.float32), ((0, rows - len(text)), (0, 0)))


def pack(arrays: Mapping[str, np.ndarray], described: Mapping[str, Any]) -> bytes:
    """Arrays and JSON values as one safetensors file in memory."""
    text = json.dumps(described, ensure_ascii=False).encode()
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return safetensors.numpy.save({**arrays, "json": np.frombuffer(text, np.uint8)})


def unpack(serialised: bytes, make: Callable[[dict[str, np.ndarray], dict[str, Any]], T]) -> T:
    """``make(arrays, described)`` of what :func:`pack` made.

    Raises:
      UserError: the bytes are no such record, or ``make`` does not find in them what it needs.
    """
    try:
        arrays = safetensors.numpy.load(serialised)
        return make(arrays, json.loads(arrays.pop("json").tobytes()))
    except Exception as error:  # the reader is a Rust extension with exceptions of its own
        raise UserError(f"data: a record is damaged or of another kind ({type(error).__name__}: {error})") from None


def encode_record(record: LatentRecord) -> bytes:
    """The serialised record."""
    halves = {name: np.asarray(getattr(record, name), np.float16) for name in ("mean", "std", "text")}
    return pack({**halves, "text_lengths": np.asarray(record.text_lengths, np.int32)},
                {"captions": record.captions, "info": record.info})


def decode_record(serialised: bytes) -> LatentRecord:
    """The record of its serialised form.

    Raises:
      UserError: the bytes are no such record.
    """
    return unpack(serialised, lambda arrays, described: LatentRecord(
        **arrays, captions=tuple(described["captions"]), info=described["info"]))
