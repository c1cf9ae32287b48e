"""Grain input pipelines: procedural clips, one item of pre-computed latents, and what batches are made of.

The pipelines (:func:`clip_dataset` here, :func:`helios_jax.data.buckets.bucketed_dataset` for latents) yield dicts of
numpy arrays with the batch as leading axis, without end, and their iterators can save and restore their position
(``get_state``, ``set_state``). Every random choice belongs to one item and one epoch: the same seed gives the same
stream, whatever the number of reader threads and of processes, and no two epochs show an item in the same way. (The
original's loader never told its workers the epoch, so a clip kept one section for the whole run.)
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import grain
import numpy as np
import safetensors.numpy

from helios_jax.data import shapes
from helios_jax.data.records import LatentRecord, decode_record, padded_rows
from helios_jax.diffusion.history import HistoryLayout
from helios_jax.errors import UserError
from helios_jax.sharding import local_rows

# Clips of different seeds must not overlap: a run with seed s draws the clips s * 2^32 + 0, 1, 2, ...
_CLIPS_PER_SEED = 2**32
DATASET_FILE = "dataset.json"  # of the records of one size
BUCKETS_FILE = "buckets.json"  # of a data set of several sizes, each in a folder
EMPTY_PROMPT_FILE = "empty_prompt.safetensors"


class _RowsOfBatches(grain.transforms.DatasetSelectionMap):
    """Item n of a process: its row n mod R of the global batch n div R, where R rows are its own."""

    def __init__(self, rows: Sequence[int], batch_size: int, num_items: int):
        self._rows, self._batch_size = rows, batch_size
        self._length = num_items // batch_size * len(rows)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[int, int]:
        batch, row = divmod(index, len(self._rows))
        return 0, batch * self._batch_size + int(self._rows[row])


def row_batches(items: grain.MapDataset, batch_size: int, rows: Sequence[int] | None = None) -> grain.MapDataset:
    """Batches of an endless stream of items; with several processes, this process' rows of each.

    Row r of batch b is item b * batch_size + r, whichever process reads it, and the position in the stream is the
    number of batches: it does not depend on the processes either.

    Args:
      items: without end.
      batch_size: of the global batch.
      rows: of the global batch, which this process reads; default: those of its devices on the mesh in use, or all.
    """
    rows = local_rows(batch_size) if rows is None else rows
    if rows is not None:
        items = grain.MapDataset.select_from_datasets([items], _RowsOfBatches(rows, batch_size, len(items)))
    return items.batch(batch_size if rows is None else len(rows), drop_remainder=True)


def read_ahead(batches: grain.MapDataset, threads: int) -> grain.IterDataset:
    """The batches one after another; ``threads`` of them read and decode ahead."""
    return batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads))


def batches(items: grain.MapDataset, batch_size: int, threads: int) -> grain.IterDataset:
    """:func:`row_batches`, read ahead: what an objective has as its data set."""
    return read_ahead(row_batches(items, batch_size), threads)


def clip_dataset(batch_size: int, seed: int, *, frames: int = 33, height: int = shapes.HEIGHT,
                 width: int = shapes.WIDTH, split: str = "train", threads: int = 1) -> grain.IterDataset:
    """Procedural clips, rendered on the fly; no clip comes twice.

    Args:
      batch_size: clips per batch.
      seed: 0 to 2**31 - 1; different seeds show different clips.
      frames, height, width: of every clip.
      split: 'train' or 'held_out', see :mod:`helios_jax.data.shapes`.
      threads: that render ahead.

    Yields: ``{"video": uint8 [B, F, H, W, 3], "attributes": int32 [B, 4]}``; attributes are indices of the names in
      ``shapes.ATTRIBUTE_VALUES``, in its order.

    Raises:
      UserError: a seed or split outside the allowed, sizes that cannot be rendered.
    """
    if not 0 <= seed < 2**31:
        raise UserError(f"seed: 0 to {2**31 - 1} allowed, got {seed}")
    shapes.sample_clip(0, split, frames, height, width)  # a wrong size or split is reported here, not by a thread

    def render(index: int) -> dict[str, np.ndarray]:
        clip = shapes.sample_clip(seed * _CLIPS_PER_SEED + index, split, frames, height, width)
        values = dataclasses.asdict(clip.attributes)
        attributes = [names.index(values[field]) for field, names in shapes.ATTRIBUTE_VALUES.items()]
        return {"video": clip.frames, "attributes": np.array(attributes, np.int32)}

    return batches(grain.MapDataset.range(_CLIPS_PER_SEED).map(render), batch_size, threads)


class RecordSource:
    """Random access to serialised records; one that cannot be read is named in one line (UserError)."""

    def __init__(self, source: grain.sources.ArrayRecordDataSource, root: Path):
        self._source, self._root = source, root

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> bytes:
        try:
            return self._source[index]
        except Exception as error:  # as in LatentFolder.source
            raise UserError(f"data: record {index} of {self._root} cannot be read ({type(error).__name__}: "
                            f"{' '.join(str(error).split())[:300]})") from None


@dataclasses.dataclass(frozen=True)
class LatentFolder:
    """What ``dataset.json`` of a folder of latent records says.

    Attributes:
      root: the folder.
      num_records: clips.
      sections: S, sections of every clip.
      frames, height, width, channels: shape of one section's latents (latent rows and columns).
      fps: frames per second of the clips.
      text_rows: rows of the longest caption embedding; shorter ones are padded to it.
      text_dim: D of the caption embeddings.
      files: record files, in order.
    """

    BUILDER: ClassVar[str] = "helios_jax.data.build_latents"

    root: Path
    num_records: int
    sections: int
    frames: int
    height: int
    width: int
    channels: int
    fps: int
    text_rows: int
    text_dim: int
    files: tuple[str, ...]

    @classmethod
    def open(cls, root: str | Path) -> LatentFolder:
        """Reads the description and checks that every file is there.

        Raises:
          UserError: no such folder, no or a broken ``dataset.json``, missing record files.
        """
        root = Path(root)
        path = root / DATASET_FILE
        if not path.is_file():
            raise UserError(f"data: {root} holds no dataset.json; build it with python -m {cls.BUILDER}")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            named = {f.name: values[f.name] for f in dataclasses.fields(cls) if f.name != "root"}
            folder = cls(root=root, **{k: tuple(v) if isinstance(v, list) else v for k, v in named.items()})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"data: {path} is damaged or describes other data ({type(error).__name__}: "
                            f"{error})") from None
        missing = [name for name in folder.files if not (root / name).is_file()]
        if missing:
            raise UserError(f"data: {root} lacks {len(missing)} of {len(folder.files)} record files, first "
                            f"{missing[0]}")
        return folder

    @property
    def latents(self) -> tuple[int, int, int, int]:
        """Frames, height, width and channels of a section."""
        return self.frames, self.height, self.width, self.channels

    def source(self) -> RecordSource:
        """Random access to the serialised records.

        Raises:
          UserError: the files hold another number of records than the description says, or are no ArrayRecords.
        """
        try:
            source = grain.sources.ArrayRecordDataSource([str(self.root / name) for name in self.files])
            count = len(source)
        except Exception as error:  # array_record raises bare RuntimeErrors for damaged files
            raise UserError(f"data: {self.root} cannot be read ({type(error).__name__}: {error})") from None
        if count != self.num_records:
            raise UserError(f"data: {self.root} holds {count} records, its dataset.json says {self.num_records}")
        return RecordSource(source, self.root)

    def empty_prompt(self, text_rows: int | None = None) -> tuple[np.ndarray, int]:
        """Embedding of the empty prompt, float32 [text_rows, D] with zeros behind it, and its number of rows.

        Args:
          text_rows: at least those of the folder, which are the default.

        Raises:
          UserError: its file is missing or damaged.
        """
        path = self.root / EMPTY_PROMPT_FILE
        try:
            text = safetensors.numpy.load(path.read_bytes())["text"]
        except Exception as error:  # the reader is a Rust extension with exceptions of its own
            raise UserError(f"data: {path} cannot be read ({type(error).__name__}: {error})") from None
        return padded_rows(text, text_rows or self.text_rows), len(text)


def training_item(record: LatentRecord, rng: np.random.Generator, layout: HistoryLayout, text_rows: int
                  ) -> dict[str, np.ndarray]:
    """One training item of a record: a random section with its past, fresh posterior samples, a random phrasing.

    Args:
      record: of S sections.
      rng: of this item and epoch.
      layout: sizes of history and chunk.
      text_rows: rows to which the caption's embedding is padded.

    Returns: "anchor" [1, h, w, C], "history" [19, h, w, C], "target" [9, h, w, C] float32 normalised latents;
      "section" int32 []; "text" [text_rows, D] float32; "text_length" int32 [].
    """
    section = int(rng.integers(record.mean.shape[0]))
    phrasing = int(rng.integers(record.num_captions))
    # The section, those that its history reaches into, and the first one, where the anchor is.
    used = sorted({0, *range(max(section - -(-layout.frames // layout.chunk), 0), section + 1)})
    latents = record.sample(rng, used)  # [U, 9, h, w, C]
    window = layout.training_window(latents.reshape(-1, *latents.shape[2:]), used.index(section))  # of [U*9, h, w, C]
    rows, length = record.caption_rows(phrasing, text_rows)
    return {"anchor": window.anchor, "history": window.history, "target": window.target,
            "section": np.int32(section), "text": rows, "text_length": np.int32(length)}


# Makes a training item of one serialised record.
MakeItem = Callable[[bytes, np.random.Generator], dict[str, np.ndarray]]


def latent_items(layout: HistoryLayout, text_rows: int) -> MakeItem:
    """:func:`training_item` of serialised records."""
    return lambda serialised, rng: training_item(decode_record(serialised), rng, layout, text_rows)


def shuffled_items(source: Any, seed: int, item: Callable[[Any, np.random.Generator], dict[str, np.ndarray]]
                   ) -> grain.MapDataset:
    """Items of stored records without end, every epoch in another order; ``item`` gets numbers of its own each time."""
    return grain.MapDataset.source(source).seed(seed).shuffle().repeat().random_map(item)


def record_dataset(folder: LatentFolder, item: MakeItem, batch_size: int, seed: int, threads: int
                   ) -> grain.IterDataset:
    """Shuffled items from a folder of records; every epoch is in another order.

    Args:
      folder: opened.
      item: called once per record and epoch, with random numbers of their own.
      batch_size: items per batch; a batch may span two epochs.
      seed: of the order and of the items' numbers.
      threads: that read and decode ahead.
    """
    return batches(shuffled_items(folder.source(), seed, item), batch_size, threads)
