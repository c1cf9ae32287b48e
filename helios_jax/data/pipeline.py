"""Grain input pipelines: procedural clips for the autoencoder, pre-computed latents for the transformer.

Both yield dicts of numpy arrays with the batch as leading axis, without end, and their iterators can save and restore
their position (``get_state``, ``set_state``). Every random choice belongs to one item and one epoch: the same seed
gives the same stream, whatever the number of reader threads and of processes, and no two epochs show an item in the
same way. (The original's loader never told its workers the epoch, so a clip kept one section for the whole run.)
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

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
DATASET_FILE = "dataset.json"
EMPTY_PROMPT_FILE = "empty_prompt.safetensors"


class _RowsOfBatches(grain.transforms.DatasetSelectionMap):
    """Item n of a process: its row n mod R of the global batch n div R, where R rows are its own."""

    def __init__(self, rows: np.ndarray, batch_size: int, num_items: int):
        self._rows, self._batch_size = rows, batch_size
        self._length = num_items // batch_size * len(rows)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[int, int]:
        batch, row = divmod(index, len(self._rows))
        return 0, batch * self._batch_size + int(self._rows[row])


def batches(items: grain.MapDataset, batch_size: int, threads: int) -> grain.IterDataset:
    """Batches of an endless stream of items; with several processes, this process' rows of each.

    Row r of batch b is item b * batch_size + r, whichever process reads it, and the position in the stream is the
    number of batches: it does not depend on the processes either.

    Args:
      items: without end.
      batch_size: of the global batch.
      threads: that read ahead.
    """
    rows = local_rows(batch_size)
    if rows is not None:
        items = grain.MapDataset.select_from_datasets([items], _RowsOfBatches(rows, batch_size, len(items)))
    size = batch_size if rows is None else len(rows)
    return (items.batch(size, drop_remainder=True)
            .to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)))


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
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"data: {path} is damaged or describes other data ({type(error).__name__}: "
                            f"{error})") from None
        missing = [name for name in folder.files if not (root / name).is_file()]
        if missing:
            raise UserError(f"data: {root} lacks {len(missing)} of {len(folder.files)} record files, first "
                            f"{missing[0]}")
        return folder

    def source(self) -> grain.sources.ArrayRecordDataSource:
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
        return source

    def empty_prompt(self) -> tuple[np.ndarray, int]:
        """Embedding of the empty prompt, float32 [text_rows, D] with zeros behind it, and its number of rows.

        Raises:
          UserError: its file is missing or damaged.
        """
        path = self.root / EMPTY_PROMPT_FILE
        try:
            text = safetensors.numpy.load(path.read_bytes())["text"]
        except Exception as error:  # the reader is a Rust extension with exceptions of its own
            raise UserError(f"data: {path} cannot be read ({type(error).__name__}: {error})") from None
        return padded_rows(text, self.text_rows), len(text)


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
    sections = record.mean.shape[0]
    section = int(rng.integers(sections))
    phrasing = int(rng.integers(record.num_captions))
    latents = record.sample(rng)  # [S, 9, h, w, C]
    window = layout.training_window(latents.reshape(-1, *latents.shape[2:]), section)  # [S*9, h, w, C]
    rows, length = record.caption_rows(phrasing, text_rows)
    return {"anchor": window.anchor, "history": window.history, "target": window.target,
            "section": np.int32(section), "text": rows, "text_length": np.int32(length)}


# Makes a training item of one serialised record.
MakeItem = Callable[[bytes, np.random.Generator], dict[str, np.ndarray]]


def latent_items(folder: LatentFolder, layout: HistoryLayout) -> MakeItem:
    """:func:`training_item` of the folder's records.

    Raises:
      UserError: the chunk of ``layout`` differs from the stored sections.
    """
    if folder.frames != layout.chunk:
        raise UserError(f"data: sections of {folder.root} have {folder.frames} latent frames, the model's chunk "
                        f"{layout.chunk}")
    return lambda serialised, rng: training_item(decode_record(serialised), rng, layout, folder.text_rows)


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
    items = grain.MapDataset.source(folder.source()).seed(seed).shuffle().repeat().random_map(item)
    return batches(items, batch_size, threads)


def latent_dataset(root: str | Path, batch_size: int, seed: int, layout: HistoryLayout | None = None,
                   threads: int = 1) -> grain.IterDataset:
    """:func:`record_dataset` of a folder of latent records.

    Args:
      root: written by :mod:`helios_jax.data.build_latents`.
      layout: sizes of history and chunk; the default is (16, 2, 1) and 9.

    Yields: the arrays of :func:`training_item`, stacked.

    Raises:
      UserError: see :class:`LatentFolder`; also if the chunk of ``layout`` differs from the stored sections.
    """
    folder = LatentFolder.open(root)
    return record_dataset(folder, latent_items(folder, layout or HistoryLayout()), batch_size, seed, threads)
