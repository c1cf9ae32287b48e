"""Training batches from records of several sizes: every batch of one size, all sizes mixed by their number of records.

A process reads only its own rows of each batch, and every random choice belongs to an item and an epoch, not to the
process that reads it: the stream does not depend on the number of processes or threads. All processes see the same size
at the same step, as a program of static shapes needs.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import grain
import numpy as np

from helios_jax.data.pipeline import (
    BUCKETS_FILE,
    DATASET_FILE,
    LatentFolder,
    read_ahead,
    row_batches,
    shuffled_items,
    training_item,
)
from helios_jax.data.records import LatentRecord, decode_record
from helios_jax.diffusion.history import HistoryLayout
from helios_jax.errors import UserError


class Source(Protocol):
    """Random access to stored records."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Records of one size.

    Attributes:
      name: of messages and random numbers; renaming a bucket changes the stream.
      source: the stored records.
      decode: makes a :class:`LatentRecord` of what ``source`` gives.
      latents: frames, height, width and channels of a section.
      text_rows, text_dim: of the longest caption embedding.
    """

    name: str
    source: Source
    decode: Callable[[Any], LatentRecord]
    latents: tuple[int, int, int, int]
    text_rows: int
    text_dim: int


def latent_folders(root: str | Path, kind: type[LatentFolder] = LatentFolder) -> dict[str, LatentFolder]:
    """The sizes of a data set of :mod:`helios_jax.data.extract` by name; a folder of one size is the only one, ''.

    Args:
      root: of the data set.
      kind: of records.

    Raises:
      UserError: no such data set, or a damaged one.
    """
    root = Path(root)
    if (root / DATASET_FILE).is_file():
        return {"": kind.open(root)}
    try:
        names = sorted(json.loads((root / BUCKETS_FILE).read_text(encoding="utf-8"))["buckets"])
    except FileNotFoundError:
        raise UserError(f"data: {root} holds neither {BUCKETS_FILE} nor {DATASET_FILE}; build it with python -m "
                        "helios_jax.data.build_latents or extract, with all workers finished") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"data: {root / BUCKETS_FILE} is damaged ({type(error).__name__}: {error})") from None
    if not names:
        raise UserError(f"data: {root / BUCKETS_FILE} lists no size")
    return {name: kind.open(root / name) for name in names}


def most_frequent(folders: Mapping[str, LatentFolder]) -> LatentFolder:
    """The size with most records (of several, the first by name): what a model of these data is sampled at."""
    return max(folders.values(), key=lambda folder: folder.num_records)


def folder_buckets(root: str | Path) -> tuple[Bucket, ...]:
    """The buckets of a data set or a folder of one size. Raises UserError, see :func:`latent_folders`."""
    return tuple(Bucket(name, folder.source(), decode_record, folder.latents, folder.text_rows, folder.text_dim)
                 for name, folder in latent_folders(root).items())


def bucketed_dataset(buckets: Sequence[Bucket], batch_size: int, seed: int, layout: HistoryLayout | None = None, *,
                     threads: int = 1, rows: Sequence[int] | None = None) -> grain.IterDataset:
    """Shuffled training batches without end.

    The size of a step follows from its number alone: in every stretch of steps each bucket has the share of its
    records, so that all records are seen equally often. Every epoch of a bucket is in another order, with other
    sections, posterior samples and captions.

    Args:
      buckets: for example of :func:`folder_buckets`; those of several data sets may be put together.
      batch_size: items of the global batch.
      seed: of order, sections, posterior samples and captions; not negative.
      layout: sizes of history and chunk; the default is (16, 2, 1) and 9.
      threads: that read and decode ahead.
      rows: of the global batch, which this process reads; default: those of its devices on the mesh in use, or all.

    Yields: the arrays of :func:`helios_jax.data.pipeline.training_item`, stacked. "text" has the rows of the longest
      caption of all buckets; only latent height and width differ from batch to batch.

    Raises:
      UserError: no bucket, or buckets that do not fit together or to the layout.
    """
    layout = layout or HistoryLayout()
    if not buckets:
        raise UserError("data: at least one bucket expected, got none")
    if batch_size < 1 or seed < 0:
        raise UserError(f"batch_size: positive and seed: not negative expected, got {batch_size} and {seed}")
    if rows is not None and (not rows or len(set(rows)) != len(rows) or not set(rows) <= set(range(batch_size))):
        raise UserError(f"rows: different numbers from 0 to {batch_size - 1} expected, got {tuple(rows)}")
    text_rows = max(bucket.text_rows for bucket in buckets)
    for bucket in buckets:
        if bucket.latents[0] != layout.chunk:
            raise UserError(f"data: sections of {bucket.name or 'the data'} have {bucket.latents[0]} latent frames, "
                            f"the model's chunk {layout.chunk}")
        for field, ours, theirs in (("channels", bucket.latents[3], buckets[0].latents[3]),
                                    ("text_dim", bucket.text_dim, buckets[0].text_dim)):
            if ours != theirs:
                raise UserError(f"data: {field} of {bucket.name} is {ours}, of {buckets[0].name} {theirs}; they are of "
                                "different models")

    def batches(number: int, bucket: Bucket) -> grain.MapDataset:
        def item(stored: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
            return training_item(bucket.decode(stored), rng, layout, text_rows)

        own_seed = zlib.crc32(f"{seed}|{number}|{bucket.name}".encode())  # no two buckets are shuffled alike
        return row_batches(shuffled_items(bucket.source, own_seed, item), batch_size, rows)

    mixed = grain.MapDataset.mix([batches(n, bucket) for n, bucket in enumerate(buckets)],
                                 weights=[len(bucket.source) for bucket in buckets])
    return read_ahead(mixed, threads)
