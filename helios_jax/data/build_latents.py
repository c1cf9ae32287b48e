"""Pre-computes the training data of the transformer: VAE latents and caption embeddings of procedural clips.

    python -m helios_jax.data.build_latents --model MODEL_FOLDER --output data/latents --clips 4096 --sections 5

Renders every clip, encodes each 33-frame section by itself (so each begins with a latent of a single image, as in
sampling, where sections are decoded independently), and writes ArrayRecord files with mean and standard deviation of
the normalised posterior and several phrasings of the caption with their text embeddings. An interrupted build goes on
where it stopped; several workers can share one output folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.numpy

from helios_jax.data import phrases, shapes
from helios_jax.data.encoders import EncodeText, EncodeVideo, encode_captions, encode_sections, encoders
from helios_jax.data.pipeline import DATASET_FILE, EMPTY_PROMPT_FILE
from helios_jax.data.records import LatentRecord, encode_record
from helios_jax.data.videos import SECTION_FRAMES
from helios_jax.data.writing import guard, parse_worker, record_file, write_bytes, write_json
from helios_jax.errors import UserError, command_line

# Far from the seeds that the autoencoder's training, statistics and evaluation draw.
FIRST_CLIP_SEED = 2**63 + 2**40


@dataclasses.dataclass(frozen=True)
class BuildConfig:
    """What to build.

    Attributes:
      clips: records in all.
      sections: S, sections of every clip.
      phrasings: K, captions of every clip.
      height, width: pixels.
      split: 'train' or 'held_out'.
      first_seed: clip seed of record 0; record i has first_seed + i.
      files: ArrayRecord files that the records are spread over.
    """

    clips: int
    sections: int = 5
    phrasings: int = 4
    height: int = shapes.HEIGHT
    width: int = shapes.WIDTH
    split: str = "train"
    first_seed: int = FIRST_CLIP_SEED
    files: int = 16

    def __post_init__(self):
        for field in ("clips", "sections", "phrasings", "height", "width", "files"):
            if getattr(self, field) < 1:
                raise UserError(f"{field}: must be positive, got {getattr(self, field)}")
        for field in ("height", "width"):
            if getattr(self, field) % 16:
                raise UserError(f"{field}: a multiple of 16, got {getattr(self, field)}")
        if self.split not in shapes.SPLITS:
            raise UserError(f"split: one of {', '.join(shapes.SPLITS)}, got {self.split!r}")
        if self.first_seed < 0:
            raise UserError(f"first_seed: 0 or more, got {self.first_seed}")
        if self.files > self.clips:
            raise UserError(f"files: at most one per clip ({self.clips}), got {self.files}")


def clip_captions(config: BuildConfig, record: int) -> tuple[str, ...]:
    """The K phrasings of one record's caption, functions of its seed alone.

    The first is the clip's own; every second one is freer English (:mod:`helios_jax.data.phrases`).
    """
    seed = config.first_seed + record
    clip = shapes.sample_clip(seed, config.split, 1, config.height, config.width)
    rng = np.random.RandomState([2, seed & 0xFFFFFFFF, seed >> 32])  # 0 and 1 are the streams of the clips themselves
    writers = (shapes.caption, phrases.free_caption)
    others = [writers[i % 2](clip.attributes, rng) for i in range(1, config.phrasings)]
    return (clip.caption, *others)


def build(config: BuildConfig, output: str | Path, encode_video: EncodeVideo, encode_text: EncodeText, *,
          identity: str, sections_per_call: int = 4, worker: int = 0, workers: int = 1,
          report: Callable[[str], None] = print) -> None:
    """Writes the data set; files that are complete already are kept.

    Args:
      config: what to build.
      output: the folder.
      encode_video, encode_text: the models.
      identity: names the models (a hash of their weights); a build goes on only with the same one.
      sections_per_call: b of ``encode_video``; always exactly so many, for one compiled program.
      worker, workers: this call writes the files ``worker``, ``worker + workers``, ...; the last one to finish
        writes ``dataset.json``.
      report: receives progress lines.

    Raises:
      UserError: the folder holds another data set or cannot be written.
    """
    output = Path(output)
    guard(output / "build.json", {**dataclasses.asdict(config), "identity": identity})
    captions = [clip_captions(config, record) for record in range(config.clips)]
    rows = encode_captions([text for phrasings in captions for text in phrasings], encode_text)
    report(f"{config.clips} clips of {config.sections} sections, {len(rows)} distinct captions")
    empty = encode_captions([""], encode_text)[""]

    names = [f"latents-{i:05d}-of-{config.files:05d}.array_record" for i in range(config.files)]
    bounds = np.linspace(0, config.clips, config.files + 1).astype(int)
    mine = [i for i in range(worker, config.files, workers) if not (output / names[i]).is_file()]
    total, done, start = sum(bounds[i + 1] - bounds[i] for i in mine), 0, time.perf_counter()
    for i in mine:
        try:
            with record_file(output / names[i]) as writer:
                for record in range(bounds[i], bounds[i + 1]):
                    writer.write(_record(config, record, captions[record], rows, encode_video, sections_per_call))
                    done += 1
        except OSError as error:
            raise UserError(f"output: {output / names[i]} cannot be written ({error})") from None
        seconds = time.perf_counter() - start
        report(f"{names[i]}: {done} of {total} clips, {done * config.sections * SECTION_FRAMES / seconds:.0f} frames/s,"
               f" {seconds / done * (total - done):.0f} s left")

    if all((output / name).is_file() for name in names):
        mean, _ = encode_video(np.zeros((sections_per_call, SECTION_FRAMES, config.height, config.width, 3), np.uint8))
        write_bytes(output / EMPTY_PROMPT_FILE, safetensors.numpy.save({"text": empty}))
        write_json(output / DATASET_FILE, {
            "num_records": config.clips, "sections": config.sections, "frames": mean.shape[1],
            "height": mean.shape[2], "width": mean.shape[3], "channels": mean.shape[4], "fps": shapes.FPS,
            "text_rows": max(len(r) for r in [*rows.values(), empty]), "text_dim": empty.shape[1], "files": names})
        report(f"complete: {output}")


def _record(config: BuildConfig, record: int, captions: tuple[str, ...], rows: dict[str, np.ndarray],
            encode_video: EncodeVideo, sections_per_call: int) -> bytes:
    seed = config.first_seed + record
    clip = shapes.sample_clip(seed, config.split, config.sections * SECTION_FRAMES, config.height, config.width)
    sections = clip.frames.reshape(config.sections, SECTION_FRAMES, *clip.frames.shape[1:])  # [S, 33, H, W, 3]
    mean, std = encode_sections(sections, encode_video, sections_per_call, f"clip {record}")
    return encode_record(LatentRecord(
        mean, std, np.concatenate([rows[text] for text in captions]),
        np.array([len(rows[text]) for text in captions], np.int32), captions,
        {"seed": seed, "split": config.split, "attributes": dataclasses.asdict(clip.attributes)}))


@command_line
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m helios_jax.data.build_latents",
                                     description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help="model folder with vae/, text_encoder/ and tokenizer/")
    parser.add_argument("--output", required=True, help="folder of the data set")
    parser.add_argument("--clips", type=int, required=True)
    for field in dataclasses.fields(BuildConfig)[1:]:
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    parser.add_argument("--worker", default="0/1", help="i/n: this process is number i of n that build together")
    arguments = parser.parse_args(argv)
    worker, workers = parse_worker(arguments.worker)
    config = BuildConfig(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(BuildConfig)})
    encode_video, encode_text, identity = encoders(arguments.model)
    build(config, arguments.output, encode_video, encode_text, identity=identity,
          worker=worker, workers=workers, report=lambda line: print(line, flush=True))


if __name__ == "__main__":
    main(sys.argv[1:])
