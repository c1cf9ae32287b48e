"""Turns a folder of videos into training data of the transformer: VAE latents and caption embeddings.

    python -m helios_jax.data.extract --model MODEL_FOLDER --metadata clips.json --videos VIDEO_FOLDER --output data/set

The metadata file is the original's (cuts, crops, captions). Each size gets a folder of ArrayRecord files that the input
pipeline reads. The work is divided into files of fixed content: workers share one output folder, a killed run goes on
where it stopped, and the result does not depend on either. Videos that cannot be read are left out, counted, and listed
in ``report.json``.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from helios_jax.data import videos
from helios_jax.data.encoders import EncodeText, EncodeVideo, encode_captions, encode_sections, encoders
from helios_jax.data.pipeline import BUCKETS_FILE, DATASET_FILE, EMPTY_PROMPT_FILE
from helios_jax.data.records import LatentRecord, encode_record
from helios_jax.data.videos import BrokenClip, Buckets, Clip, LeftOut
from helios_jax.data.writing import guard, parse_worker, record_file, write_bytes, write_json
from helios_jax.errors import UserError, command_line

BUILD_FILE = "build.json"
REPORT_FILE = "report.json"
_DEFAULT_FPS = 24  # where no entry of the metadata names one


@dataclasses.dataclass(frozen=True)
class ExtractConfig:
    """What to make of a video corpus.

    Attributes:
      buckets: lengths and sizes.
      captions: how many captions of a clip are kept at most; training draws one of them. The original uses the first.
      seed: of the place of a clip inside its cut.
      clips_per_file: records of one ArrayRecord file, which is the unit of work.
      sections_per_call: sections that the VAE encodes at once.
    """

    buckets: Buckets = Buckets()
    captions: int = 1
    seed: int = 0
    clips_per_file: int = 64
    sections_per_call: int = 1

    def __post_init__(self):
        for field in ("captions", "clips_per_file", "sections_per_call"):
            if getattr(self, field) < 1:
                raise UserError(f"{field}: must be positive, got {getattr(self, field)}")
        if self.seed < 0:
            raise UserError(f"seed: must not be negative, got {self.seed}")


@dataclasses.dataclass(frozen=True)
class Unit:
    """One file to write: its name below the output folder, the (height, width), and entry number, clip and frames."""

    name: str
    size: tuple[int, int]
    clips: tuple[tuple[int, Clip, int], ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What there is to do: a function of metadata and configuration alone.

    Attributes:
      description: tells this data set from others; it is kept in ``build.json``.
      units: the files.
      entries: number of entries of the metadata.
      left_out: entries that a rule leaves out, as they stand in the report.
      broken: entries whose metadata are wrong, likewise.
    """

    description: dict[str, Any]
    units: tuple[Unit, ...]
    entries: int
    left_out: tuple[dict[str, Any], ...]
    broken: tuple[dict[str, Any], ...]


def make_plan(entries: Sequence[Any], config: ExtractConfig) -> Plan:
    """Divides the entries of a metadata file into files of clips of one size.

    Raises:
      UserError: no entry can be used.
    """
    chosen: dict[tuple[int, int], list[tuple[int, Clip, int]]] = collections.defaultdict(list)
    left_out, broken, seen = [], [], {}
    for number, entry in enumerate(entries):
        listed = {"entry": number, "path": entry.get("path") if isinstance(entry, dict) else None,
                  "cut": entry.get("cut") if isinstance(entry, dict) else None}
        try:
            clip = videos.parse_entry(entry)
            frames, size = config.buckets.assign(clip)
            first = seen.setdefault(clip.key, number)
            if first != number:
                raise LeftOut("the same clip as an earlier entry")
            chosen[size].append((number, clip, frames))
        except LeftOut as reason:
            left_out.append({**listed, "reason": str(reason)})
        except BrokenClip as reason:
            broken.append({**listed, "reason": str(reason)})
    if not chosen:
        reasons = collections.Counter(item["reason"] for item in [*left_out, *broken]).most_common(3)
        raise UserError(f"metadata: none of {len(entries)} clips can be used: "
                        f"{'; '.join(f'{count} x {reason}' for reason, count in reasons)}")
    units = []
    for size in sorted(chosen):
        clips, step = chosen[size], config.clips_per_file
        files = -(-len(clips) // step)
        units += [Unit(f"{size[0]}x{size[1]}/latents-{i:05d}-of-{files:05d}.array_record", size,
                       tuple(clips[i * step:(i + 1) * step])) for i in range(files)]
    settings = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists, as they are read again
    del settings["sections_per_call"]
    digest = hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()[:16]
    return Plan({**settings.pop("buckets"), **settings, "metadata": digest}, tuple(units), len(entries),
                tuple(left_out), tuple(broken))


def _note_path(output: Path, unit: Unit) -> Path:
    """The note beside a file, written after it: where it exists the file is complete."""
    return (output / unit.name).with_suffix(".json")


def is_complete(output: str | Path, unit: Unit) -> bool:
    """Whether a file is written. (One whose clips are all broken is complete and does not exist.)"""
    try:
        note = json.loads(_note_path(Path(output), unit).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return not note["records"] or (Path(output) / unit.name).is_file()


def write_unit(unit: Unit, config: ExtractConfig, root: str | Path, output: str | Path, encode_video: EncodeVideo,
               encode_text: EncodeText) -> dict[str, Any]:
    """Reads and encodes the clips of one file and writes it, with its note.

    Args:
      unit: the file.
      config: of the plan.
      root: folder of videos.
      output: folder of the data set.
      encode_video, encode_text: the models.

    Returns: the note: "records", "broken" (entries that cannot be read), and what ``dataset.json`` needs.

    Raises:
      UserError: the models give latents or embeddings that are not finite.
    """
    path = Path(output) / unit.name
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = encode_captions(["", *(c for _, clip, _ in unit.clips for c in clip.captions[: config.captions])],
                           encode_text)
    note: dict[str, Any] = {"records": 0, "broken": [], "sections": 0, "text_rows": len(rows[""]), "latents": None,
                            "text_dim": rows[""].shape[1], "fps": {}}
    with record_file(path) as writer:
        for number, clip, frames in unit.clips:
            try:
                mean, std = encode_sections(
                    videos.read_sections(root, clip, frames, unit.size, config.seed), encode_video,
                    config.sections_per_call, f"clip {clip.path} {list(clip.cut)}")
            except BrokenClip as reason:
                note["broken"].append({"entry": number, "path": clip.path, "cut": list(clip.cut),
                                       "reason": str(reason)})
                continue
            captions = clip.captions[: config.captions]
            writer.write(encode_record(LatentRecord(
                mean, std, np.concatenate([rows[text] for text in captions]),
                np.array([len(rows[text]) for text in captions], np.int32), captions,
                {"name": clip.name, "path": clip.path, "cut": list(clip.cut), "crop": list(clip.crop),
                 "fps": clip.fps, "frames": frames, "size": list(unit.size),
                 "first_frame": videos.first_frame(clip, frames, config.seed)})))
            note["records"] += 1
            note["sections"] = max(note["sections"], len(mean))
            note["text_rows"] = max(note["text_rows"], *(len(rows[text]) for text in captions))
            note["latents"] = list(mean.shape[1:])
            rate = str(round(clip.fps))
            note["fps"][rate] = note["fps"].get(rate, 0) + 1
    if not note["records"]:
        path.unlink()
    write_bytes(path.parent / EMPTY_PROMPT_FILE, safetensors.numpy.save({"text": rows[""]}))
    write_json(_note_path(Path(output), unit), note)
    return note


def finish(plan: Plan, output: str | Path) -> dict[str, Any] | None:
    """Describes a data set whose files are all written: ``dataset.json`` per size, ``buckets.json``, ``report.json``.

    Returns: the report; None, and nothing is written, as long as a file is missing.

    Raises:
      UserError: not one clip could be read.
    """
    output = Path(output)
    if not all(is_complete(output, unit) for unit in plan.units):
        return None
    notes = {unit: json.loads(_note_path(output, unit).read_text(encoding="utf-8")) for unit in plan.units}
    broken = sorted([*plan.broken, *(item for note in notes.values() for item in note["broken"])],
                    key=lambda item: item["entry"])
    report = {"entries": plan.entries, "records": sum(note["records"] for note in notes.values()),
              "left_out": len(plan.left_out), "broken": len(broken),
              "reasons": dict(collections.Counter(item["reason"] for item in [*plan.left_out, *broken]).most_common()),
              "left_out_clips": list(plan.left_out), "broken_clips": broken}
    write_json(output / REPORT_FILE, report)
    if not report["records"]:
        raise UserError(f"videos: none of {plan.entries} clips could be read, see {output / REPORT_FILE}; the first: "
                        f"{broken[0]['path']}: {broken[0]['reason']}")
    text_rows = max(note["text_rows"] for note in notes.values())  # the same for all sizes: one shape
    sizes = {}
    for size in dict.fromkeys(unit.size for unit in plan.units):
        parts = [(unit, note) for unit, note in notes.items() if unit.size == size and note["records"]]
        if not parts:
            continue
        rates = collections.Counter()
        for _, note in parts:
            rates.update({int(rate): count for rate, count in note["fps"].items() if int(rate)})
        frames, height, width, channels = parts[0][1]["latents"]
        name = f"{size[0]}x{size[1]}"
        sizes[name] = sum(note["records"] for _, note in parts)
        write_json(output / name / DATASET_FILE, {
            "num_records": sizes[name], "sections": max(note["sections"] for _, note in parts), "frames": frames,
            "height": height, "width": width, "channels": channels,
            "fps": rates.most_common(1)[0][0] if rates else _DEFAULT_FPS, "text_rows": text_rows,
            "text_dim": parts[0][1]["text_dim"], "files": [Path(unit.name).name for unit, _ in parts]})
    write_json(output / BUCKETS_FILE, {"buckets": sizes})
    return report


def summary(report: dict[str, Any], output: str | Path) -> str:
    """The report in one line."""
    return (f"complete: {report['records']} of {report['entries']} clips written, {report['left_out']} left out by the "
            f"rules, {report['broken']} broken (listed in {Path(output) / REPORT_FILE})")


def check_videos(root: str | Path) -> None:
    """Raises:
      UserError: there is no such folder. (A wrong folder would else make every clip a broken one.)
    """
    if not Path(root).is_dir():
        raise UserError(f"videos: {root} is no folder")


def extract(entries: Sequence[Any], config: ExtractConfig, root: str | Path, output: str | Path,
            encode_video: EncodeVideo, encode_text: EncodeText, *, identity: str, worker: int = 0, workers: int = 1,
            report: Callable[[str], None] = print) -> dict[str, Any] | None:
    """Writes the data set of a video corpus, or this worker's share; files that are complete already are kept.

    Args:
      entries: of the metadata file, see :func:`helios_jax.data.videos.read_metadata`.
      config: what to make of it.
      root: folder of videos.
      output: folder of the data set.
      encode_video, encode_text: the models.
      identity: names the models (a hash of their weights); a build goes on only with the same one.
      worker, workers: this call writes the files ``worker``, ``worker + workers``, ...; the last one to finish
        describes the whole.
      report: receives progress lines.

    Returns: what :func:`finish` returns.

    Raises:
      UserError: no usable clip, no folder of videos, or a folder that holds another data set or cannot be written.
    """
    output = Path(output)
    check_videos(root)
    plan = make_plan(entries, config)
    guard(output / BUILD_FILE, {**plan.description, "identity": identity})
    mine = [unit for unit in plan.units[worker::workers] if not is_complete(output, unit)]
    total = sum(len(unit.clips) for unit in mine)
    report(f"{plan.entries} entries, {len(plan.left_out)} left out by the rules, {len(plan.broken)} broken; "
           f"{len(plan.units)} files, of which {len(mine)} with {total} clips are to be written here")
    done, start = 0, time.perf_counter()
    for unit in mine:
        try:
            note = write_unit(unit, config, root, output, encode_video, encode_text)
        except OSError as error:
            raise UserError(f"output: {output / unit.name} cannot be written ({error})") from None
        done += len(unit.clips)
        seconds = time.perf_counter() - start
        report(f"{unit.name}: {note['records']} clips, {len(note['broken'])} broken; {done} of {total} done, "
               f"{seconds / done * (total - done):.0f} s left")
    result = finish(plan, output)
    report(summary(result, output) if result else "done here; other workers have files to write")
    return result


# --- Command line ----------------------------------------------------------------------------------------------


def _sizes(field: str, text: str) -> tuple[tuple[int, int], ...]:
    try:
        sizes = tuple(tuple(int(n) for n in part.split("x")) for part in text.split(",") if part)
        if all(len(size) == 2 for size in sizes):
            return sizes
    except ValueError:
        pass
    raise UserError(f"{field}: sizes as 384x640,320x768 (height x width) expected, got {text!r}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say what to make of a corpus; :func:`config_from` reads them."""
    defaults = ExtractConfig()
    parser.add_argument("--model", required=True, help="model folder with vae/, text_encoder/ and tokenizer/")
    parser.add_argument("--metadata", required=True, help="JSON list of clips: path, cut, crop, cap")
    parser.add_argument("--videos", required=True, help="folder to which the paths are relative")
    parser.add_argument("--output", required=True, help="folder of the data set")
    parser.add_argument("--min-frames", type=int, default=defaults.buckets.min_frames,
                        help="shorter clips are left out")
    parser.add_argument("--lengths", default=",".join(map(str, videos.LENGTHS)), help="to which clips are shortened")
    parser.add_argument("--sizes", default=",".join(f"{h}x{w}" for h, w in videos.SIZES), help="height x width")
    parser.add_argument("--keep", default="384x640", help="sizes that are used, or 'all'")
    for field in ("captions", "seed", "clips_per_file", "sections_per_call"):
        parser.add_argument(f"--{field.replace('_', '-')}", type=int, default=getattr(defaults, field))


def config_from(arguments: argparse.Namespace) -> ExtractConfig:
    """The configuration of parsed arguments.

    Raises:
      UserError: values outside the allowed.
    """
    try:
        lengths = tuple(int(n) for n in arguments.lengths.split(","))
    except ValueError:
        raise UserError(f"lengths: numbers with commas expected, got {arguments.lengths!r}") from None
    keep = () if arguments.keep == "all" else _sizes("keep", arguments.keep)
    return ExtractConfig(Buckets(arguments.min_frames, lengths, _sizes("sizes", arguments.sizes), keep),
                         arguments.captions, arguments.seed, arguments.clips_per_file, arguments.sections_per_call)


@command_line
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m helios_jax.data.extract", description=__doc__.split("\n\n")[0])
    add_arguments(parser)
    parser.add_argument("--worker", default="0/1", help="i/n: this process is number i of n that work together")
    arguments = parser.parse_args(argv)
    worker, workers = parse_worker(arguments.worker)
    config = config_from(arguments)
    entries = videos.read_metadata(arguments.metadata)
    check_videos(arguments.videos)
    make_plan(entries, config)  # what is wrong with the metadata is known before the models are loaded
    encode_video, encode_text, identity = encoders(arguments.model)
    extract(entries, config, arguments.videos, arguments.output, encode_video, encode_text, identity=identity,
            worker=worker, workers=workers, report=lambda line: print(line, flush=True))


if __name__ == "__main__":
    main(sys.argv[1:])
