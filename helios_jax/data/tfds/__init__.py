"""TensorFlow Datasets of latent records, written and read without TensorFlow.

    python -m helios_jax.data.tfds videos --model MODEL_FOLDER --metadata clips.json --videos VIDEO_FOLDER \\
        --data-dir data/tfds
    python -m helios_jax.data.tfds shapes --model MODEL_FOLDER --clips 4096 --held-out-clips 200 --data-dir data/tfds

Both builders let the restartable tools write their records into a work folder (:mod:`helios_jax.data.extract`,
:mod:`helios_jax.data.build_latents`) and hand those on to TFDS as named features, in its ``array_record`` format. TFDS
itself cannot be interrupted; after a kill only its own copying starts again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from helios_jax.data import videos as video_files
from helios_jax.data.buckets import Bucket
from helios_jax.data.build_latents import BuildConfig, build
from helios_jax.data.encoders import EncodeText, EncodeVideo
from helios_jax.data.extract import ExtractConfig, extract
from helios_jax.data.pipeline import LatentFolder
from helios_jax.data.records import LatentRecord, decode_record
from helios_jax.errors import UserError

# Both encoders and what names them, see :func:`helios_jax.data.encoders.encoders`.
Encoders = tuple[EncodeVideo, EncodeText, str]
# Held-out clips are drawn far from the training clips.
_HELD_OUT_SEED_DISTANCE = 2**32
_DESCRIBED = ("sections", "frames", "height", "width", "channels", "fps", "text_rows", "text_dim")


def _features() -> tfds.features.FeaturesDict:
    feature = tfds.features
    return feature.FeaturesDict({
        "mean": feature.Tensor(shape=(None,) * 5, dtype=np.float16, encoding="bytes"),  # [S, T, h, w, C]
        "std": feature.Tensor(shape=(None,) * 5, dtype=np.float16, encoding="bytes"),
        "text": feature.Tensor(shape=(None, None), dtype=np.float16, encoding="bytes"),  # [n, D]
        "text_lengths": feature.Tensor(shape=(None,), dtype=np.int32),  # [K]
        "captions": feature.Sequence(feature.Text()),
        "info": feature.Text(doc="JSON: where the clip comes from"),
    })


def to_example(record: LatentRecord) -> dict[str, Any]:
    """A record as the features of the builders."""
    return {"mean": record.mean, "std": record.std, "text": record.text, "text_lengths": record.text_lengths,
            "captions": list(record.captions), "info": json.dumps(record.info)}


def from_example(example: dict[str, Any]) -> LatentRecord:
    """The inverse of :func:`to_example`, for what a TFDS data source gives."""
    return LatentRecord(*(np.asarray(example[key]) for key in ("mean", "std", "text", "text_lengths")),
                        tuple(caption.decode() for caption in example["captions"]), json.loads(example["info"]))


class _LatentBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """What both builders share: a work folder of records per split, and the features."""

    VERSION = tfds.core.Version("1.0.0")
    _about: str

    def __init__(self, *, data_dir: str | Path, **options):
        super().__init__(data_dir=str(data_dir), file_format="array_record", **options)

    def _records(self) -> dict[str, Path]:
        """Writes what is missing of the records; the folder of each split."""
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, description=self._about, features=_features(),
                                     metadata=tfds.core.MetadataDict())

    def _split_generators(self, dl_manager) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        folders = {split: LatentFolder.open(folder) for split, folder in self._records().items()}
        for split, folder in folders.items():  # what a reader must know before the first record: the static shapes
            self.info.metadata[split] = {field: getattr(folder, field) for field in _DESCRIBED}
        return {split: self._generate_examples(folder) for split, folder in folders.items()}

    def _generate_examples(self, folder: LatentFolder) -> Iterator[tuple[int, dict[str, Any]]]:
        source = folder.source()
        for index in range(len(source)):
            yield index, to_example(decode_record(source[index]))


class VideoLatents(_LatentBuilder):
    """VAE latents and caption embeddings of a folder of videos; one dataset configuration per size."""

    _about = "VAE latents of 33-frame sections and UMT5 embeddings of captioned videos."

    def __init__(self, *, data_dir: str | Path, metadata: str | Path, videos: str | Path, encoders: Encoders,
                 size: str = "384x640", settings: ExtractConfig | None = None, work: str | Path | None = None,
                 report: Callable[[str], None] = print):
        """Names the corpus; nothing is read before ``download_and_prepare``.

        Args:
          data_dir: folder of TFDS data sets.
          metadata: the JSON list of clips.
          videos: the folder to which its paths are relative.
          encoders: of the model.
          size: which size of the corpus; also the name of the configuration.
          settings: what to make of the corpus.
          work: folder of the extraction, where several workers may have run :mod:`helios_jax.data.extract` before;
            'extracted' in ``data_dir`` by default. It holds ``report.json``, the list of broken videos.
          report: receives progress lines.
        """
        self._metadata, self._videos, self._encoders, self._report = metadata, videos, encoders, report
        self._settings = settings or ExtractConfig()
        self._work = Path(work or Path(data_dir) / "extracted")
        super().__init__(data_dir=data_dir, config=tfds.core.BuilderConfig(name=size, version=self.VERSION))

    def _records(self) -> dict[str, Path]:
        encode_video, encode_text, identity = self._encoders
        extract(video_files.read_metadata(self._metadata), self._settings, self._videos, self._work, encode_video,
                encode_text, identity=identity, report=self._report)
        folder = self._work / self.builder_config.name
        if not (folder / "dataset.json").is_file():
            sizes = sorted(path.parent.name for path in self._work.glob("*/dataset.json"))
            raise UserError(f"size: the corpus has {', '.join(sizes)}, got {self.builder_config.name!r}")
        return {"train": folder}


class ProceduralLatents(_LatentBuilder):
    """The same of procedural clips of moving shapes, with the splits 'train' and 'held_out'."""

    _about = "VAE latents of 33-frame sections and UMT5 embeddings of procedural clips of moving shapes."

    def __init__(self, *, data_dir: str | Path, encoders: Encoders, settings: BuildConfig, held_out_clips: int = 0,
                 work: str | Path | None = None, report: Callable[[str], None] = print):
        """Names what to render; nothing is done before ``download_and_prepare``.

        Args:
          data_dir: folder of TFDS data sets.
          encoders: of the model.
          settings: of the training clips.
          held_out_clips: clips of the attribute combinations that training never shows.
          work: folder of the build, 'rendered' in ``data_dir`` by default.
          report: receives progress lines.
        """
        self._encoders, self._settings, self._held_out_clips, self._report = encoders, settings, held_out_clips, report
        self._work = Path(work or Path(data_dir) / "rendered")
        super().__init__(data_dir=data_dir, config=tfds.core.BuilderConfig(
            name=f"{settings.height}x{settings.width}", version=self.VERSION))

    def _records(self) -> dict[str, Path]:
        encode_video, encode_text, identity = self._encoders
        splits = {"train": dataclasses.replace(self._settings, split="train")}
        if self._held_out_clips:
            splits["held_out"] = dataclasses.replace(
                self._settings, split="held_out", clips=self._held_out_clips,
                files=min(self._settings.files, self._held_out_clips),
                first_seed=self._settings.first_seed + _HELD_OUT_SEED_DISTANCE)
        for split, settings in splits.items():
            build(settings, self._work / split, encode_video, encode_text, identity=identity, report=self._report)
        return {split: self._work / split for split in splits}


def tfds_bucket(directory: str | Path, split: str = "train") -> Bucket:
    """A prepared data set as a bucket of :func:`helios_jax.data.buckets.bucketed_dataset`.

    Args:
      directory: of the data set, with ``dataset_info.json`` (the builder's ``data_dir``).
      split: 'train' or another one that it has.

    Raises:
      UserError: no such data set or split.
    """
    try:
        builder = tfds.builder_from_directory(str(directory))
        source = builder.as_data_source(split=split)
        shape = builder.info.metadata[split]
        return Bucket(builder.info.full_name, source, from_example,
                      tuple(shape[field] for field in ("frames", "height", "width", "channels")), shape["text_rows"],
                      shape["text_dim"])
    except Exception as error:  # TFDS has no common class of what it raises for missing or damaged data sets
        raise UserError(f"data: {directory} with the split {split!r} cannot be read as a TFDS data set of this library "
                        f"({type(error).__name__}: {str(error).splitlines()[0]:.120})") from None
