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
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy
from array_record.python import array_record_module

from helios_jax.data import phrases, shapes
from helios_jax.data.pipeline import DATASET_FILE, EMPTY_PROMPT_FILE
from helios_jax.data.records import LatentRecord, encode_record
from helios_jax.errors import UserError, command_line

SECTION_FRAMES = 33  # RGB frames of a section: 9 latent frames
# Far from the seeds that the autoencoder's training, statistics and evaluation draw.
FIRST_CLIP_SEED = 2**63 + 2**40

# [b, 33, H, W, 3] uint8 -> mean and std of the normalised posterior, each [b, 9, h, w, C] float.
EncodeVideo = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
# Captions -> one [n, D] float array each, n being its own number of rows.
EncodeText = Callable[[Sequence[str]], list[np.ndarray]]


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
    description = {**dataclasses.asdict(config), "identity": identity}
    try:
        output.mkdir(parents=True, exist_ok=True)
        _guard(output / "build.json", description)
    except OSError as error:
        raise UserError(f"output: {output} cannot be written ({error})") from None
    captions = [clip_captions(config, record) for record in range(config.clips)]
    distinct = sorted({text for phrasings in captions for text in phrasings})
    report(f"{config.clips} clips of {config.sections} sections, {len(distinct)} distinct captions")
    rows = dict(zip(distinct, (np.asarray(r, np.float16) for r in encode_text(distinct)), strict=True))
    empty = np.asarray(encode_text([""])[0], np.float16)

    names = [f"latents-{i:05d}-of-{config.files:05d}.array_record" for i in range(config.files)]
    bounds = np.linspace(0, config.clips, config.files + 1).astype(int)
    mine = [i for i in range(worker, config.files, workers) if not (output / names[i]).is_file()]
    total, done, start = sum(bounds[i + 1] - bounds[i] for i in mine), 0, time.perf_counter()
    for i in mine:
        temporary = output / f".{names[i]}.{os.getpid()}"
        writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
        for record in range(bounds[i], bounds[i + 1]):
            writer.write(_record(config, record, captions[record], rows, encode_video, sections_per_call))
            done += 1
        writer.close()
        temporary.replace(output / names[i])
        seconds = time.perf_counter() - start
        report(f"{names[i]}: {done} of {total} clips, {done * config.sections * SECTION_FRAMES / seconds:.0f} frames/s,"
               f" {seconds / done * (total - done):.0f} s left")

    if all((output / name).is_file() for name in names):
        mean, _ = encode_video(np.zeros((sections_per_call, SECTION_FRAMES, config.height, config.width, 3), np.uint8))
        (output / EMPTY_PROMPT_FILE).write_bytes(safetensors.numpy.save({"text": empty}))
        _write_json(output / DATASET_FILE, {
            "num_records": config.clips, "sections": config.sections, "frames": mean.shape[1],
            "height": mean.shape[2], "width": mean.shape[3], "channels": mean.shape[4], "fps": shapes.FPS,
            "text_rows": max(len(r) for r in [*rows.values(), empty]), "text_dim": empty.shape[1], "files": names})
        report(f"complete: {output}")


def _record(config: BuildConfig, record: int, captions: tuple[str, ...], rows: dict[str, np.ndarray],
            encode_video: EncodeVideo, sections_per_call: int) -> bytes:
    seed = config.first_seed + record
    clip = shapes.sample_clip(seed, config.split, config.sections * SECTION_FRAMES, config.height, config.width)
    sections = clip.frames.reshape(config.sections, SECTION_FRAMES, *clip.frames.shape[1:])  # [S, 33, H, W, 3]
    # Full batches only: the program is compiled for one size.
    padded = np.resize(sections, (-(-config.sections // sections_per_call) * sections_per_call, *sections.shape[1:]))
    parts = [encode_video(padded[i:i + sections_per_call]) for i in range(0, len(padded), sections_per_call)]
    mean, std = (np.concatenate(p)[: config.sections].astype(np.float16) for p in zip(*parts, strict=True))
    if not np.isfinite(mean).all():
        raise UserError(f"clip {record}: its latents are not finite in float16; the VAE is broken or its statistics "
                        "latents_mean and latents_std do not belong to it")
    return encode_record(LatentRecord(
        mean, std, np.concatenate([rows[text] for text in captions]),
        np.array([len(rows[text]) for text in captions], np.int32), captions,
        {"seed": seed, "split": config.split, "attributes": dataclasses.asdict(clip.attributes)}))


def _write_json(path: Path, values: dict) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def _guard(path: Path, description: dict) -> None:
    if not path.exists():
        _write_json(path, description)
        return
    saved = json.loads(path.read_text(encoding="utf-8"))
    changed = [f"{key} (was {saved.get(key)!r}, now {value!r})" for key, value in description.items()
               if saved.get(key) != value]
    if changed:
        raise UserError(f"output: {path.parent} holds a data set of another kind: {'; '.join(changed)}")


def _fingerprint(params) -> str:
    """A short hash of the weights, so that a build never mixes latents of two models."""
    import jax

    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def video_encoder(folder: str | Path) -> tuple[EncodeVideo, str]:
    """``encode_video`` and the fingerprint of the VAE in a model folder, computing in float32."""
    import jax
    import jax.numpy as jnp

    from helios_jax.convert.folder import read_component_config
    from helios_jax.convert.load import load_component
    from helios_jax.models.vae import WanVAE, normalize_latents

    config = read_component_config(Path(folder) / "vae", "vae")
    params = load_component(Path(folder) / "vae", "vae", config, dtype=jnp.float32)
    vae = WanVAE(config)

    @jax.jit
    def posterior(params, video):
        mean, logvar = vae.apply({"params": params}, video.astype(jnp.float32) / 127.5 - 1, method=WanVAE.encode)
        std = jnp.exp(0.5 * jnp.clip(logvar, -30.0, 20.0)) / jnp.asarray(config.latents_std)
        return normalize_latents(mean, config), std

    def encode(video: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean, std = posterior(params, video)
        return np.asarray(mean), np.asarray(std)

    return encode, _fingerprint(params)


def text_encoder(folder: str | Path) -> tuple[EncodeText, str]:
    """``encode_text`` and the fingerprint of the text encoder in a model folder, computing in float32."""
    import jax.numpy as jnp

    from helios_jax.convert.folder import read_component_config
    from helios_jax.convert.load import load_component
    from helios_jax.models.umt5 import UMT5Encoder
    from helios_jax.text import PromptEncoder, Tokenizer

    folder = Path(folder)
    config = read_component_config(folder / "text_encoder", "text_encoder")
    params = load_component(folder / "text_encoder", "text_encoder", config, dtype=jnp.float32)
    encoder = PromptEncoder(UMT5Encoder(config), params, Tokenizer.from_folder(folder / "tokenizer"), batch_size=64,
                            cache_size=0)

    def encode(captions: Sequence[str]) -> list[np.ndarray]:
        embedding = encoder(captions)
        rows = np.asarray(embedding.rows)
        return [row[:length] for row, length in zip(rows, np.asarray(embedding.lengths), strict=True)]

    return encode, _fingerprint(params)


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
    try:
        worker, workers = (int(part) for part in arguments.worker.split("/"))
    except ValueError:
        worker, workers = -1, 0
    if not 0 <= worker < workers:
        raise UserError(f"worker: i/n with 0 <= i < n expected, got {arguments.worker!r}")
    config = BuildConfig(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(BuildConfig)})
    encode_video, vae_identity = video_encoder(arguments.model)
    encode_text, text_identity = text_encoder(arguments.model)
    build(config, arguments.output, encode_video, encode_text, identity=f"vae {vae_identity} text {text_identity}",
          worker=worker, workers=workers, report=lambda line: print(line, flush=True))


if __name__ == "__main__":
    main(sys.argv[1:])
