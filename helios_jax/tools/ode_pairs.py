"""Samples a Mid model and keeps points of its trajectories: training data of the distilled student's first stage.

    python -m helios_jax.tools.ode_pairs --model MID --prompts prompts.txt --output data/ode

Every prompt becomes a record: of each section and pyramid level the states at the teacher's steps that lie on the
student's few-step grid, and the last state (:mod:`helios_jax.data.ode_records`). The teacher is guided (plain
classifier-free guidance) and takes the student's points as additional steps. Prompt i has seed + i as its own seed;
the original gives all of them the same noise. The work is divided into files of fixed content: workers share one
output folder, a killed run goes on where it stopped, and the result does not depend on either.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from helios_jax import text as text_path
from helios_jax.data.encoders import fingerprint
from helios_jax.data.ode_records import OdeLevel, OdeRecord, encode_ode_record
from helios_jax.data.pipeline import DATASET_FILE, LatentFolder
from helios_jax.data.records import decode_record
from helios_jax.data.writing import guard, parse_worker, record_file, write_json
from helios_jax.diffusion.few_step import trajectory_schedule
from helios_jax.diffusion.history import HistoryLayout, replaces_anchor, update_anchor
from helios_jax.diffusion.noise import SeededNoise
from helios_jax.diffusion.schedules import SHIFT_FROM
from helios_jax.errors import UserError, command_line
from helios_jax.pipeline.pipeline import DTYPES, HeliosPipeline
from helios_jax.pipeline.prompts import rows_needed, with_rows
from helios_jax.pipeline.request import DEFAULT_FPS, Size, checked_count, checked_seeds
from helios_jax.pipeline.sampler import ChunkSampler, ChunkSteps, SamplingPlan


@dataclasses.dataclass(frozen=True)
class PairsConfig:
    """What to sample.

    Attributes:
      sections: of 33 frames, per prompt.
      steps: of the teacher, per level, before the student's points are added.
      few_steps: of the student, per level; twice as many in the first section.
      shift_from: which resolution sets the shift of a level, see :mod:`helios_jax.diffusion.few_step`.
      guidance: scale; 1 or less samples without.
      negative_prompt: what guidance leads away from.
      seed: of the first prompt.
      height, width: pixels; 0 takes the model's own.
      prompts_per_file: records of one ArrayRecord file, which is the unit of work.
      batch: prompts sampled together; divides ``prompts_per_file``.
    """

    sections: int = 5
    steps: int = 20
    few_steps: int = 2
    shift_from: str = "own"
    guidance: float = 5.0
    negative_prompt: str = ""
    seed: int = 0
    height: int = 0
    width: int = 0
    prompts_per_file: int = 16
    batch: int = 1

    def __post_init__(self):
        for field in ("sections", "steps", "few_steps", "prompts_per_file", "batch"):
            checked_count(field, getattr(self, field))
        checked_seeds(self.seed, 1)
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise UserError(f"guidance: a finite number of at least 0, got {self.guidance}")
        if self.shift_from not in SHIFT_FROM:
            raise UserError(f"shift_from: one of {', '.join(SHIFT_FROM)}, got {self.shift_from!r}")
        if self.prompts_per_file % self.batch:
            raise UserError(f"batch: must divide prompts_per_file {self.prompts_per_file}, got {self.batch}")


class TrajectorySampler:
    """Samples prompts with a Mid model and keeps what the student learns from.

    Args:
      pipeline: of the model.
      config: what to sample.

    Raises:
      UserError: another kind of model, or a size that the pyramid cannot halve.
    """

    def __init__(self, pipeline: HeliosPipeline, config: PairsConfig):
        if pipeline.index.variant != "mid":
            raise UserError(f"model: a Mid model expected, got {pipeline.index.variant}")
        native = pipeline.index.native_size
        stages = pipeline.scheduler.stages
        size = Size.checked(config.height or native[0], config.width or native[1], stages)
        self.pipeline, self.config, self.layout = pipeline, config, HistoryLayout()
        # The student's shift, whatever the model's own.
        self.scheduler = dataclasses.replace(pipeline.scheduler, use_dynamic_shifting=True, time_shift_type="linear")
        self.shape = (size.height // 8, size.width // 8, pipeline.folder.vae.z_dim)
        self.steps = tuple(self._chunk_steps(count) for count in (2 * config.few_steps, config.few_steps))
        plan = SamplingPlan((config.steps,) * stages, float(config.guidance), layout=self.layout)
        self._guided = plan.guided
        self._sampler = ChunkSampler(pipeline.transformer, self.scheduler, plan, size.height, size.width,
                                     self.shape[2], own_steps=self.steps)
        self._negative = pipeline.embed((config.negative_prompt,)) if plan.guided else None

    def _chunk_steps(self, few_steps: int) -> ChunkSteps:
        height, width, _ = self.shape
        levels = [trajectory_schedule(self.scheduler, self.config.steps, few_steps, frames=self.layout.chunk,
                                      height=height, width=width, stage=stage, shift_from=self.config.shift_from)
                  for stage in range(self.scheduler.stages)]
        return ChunkSteps(*zip(*levels, strict=True))

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[OdeRecord]:
        """One record per prompt, sampled together.

        Raises:
          UserError: trajectories or embeddings that are not finite as stored.
        """
        embedding = self.pipeline.embed(prompts)
        parts = [embedding] + ([text_path.concatenate([self._negative] * len(prompts))] if self._guided else [])
        rows = rows_needed(parts)
        text = self.pipeline.context(text_path.concatenate([with_rows(part, rows) for part in parts]))
        noise = SeededNoise(seeds)
        history = self.layout.empty(len(prompts), *self.shape)
        anchor = history[:, :1]
        sections: list[list[tuple[np.ndarray, np.ndarray]]] = []  # per section and level: observed inputs and the end
        for section in range(self.config.sections):
            drawn = self._sampler.draw(noise, section, len(prompts))
            results = self._sampler.trajectory(self.pipeline.variables, drawn, section, text, history, anchor)
            new = results[-1].sample
            anchor = update_anchor(anchor, new, replaces_anchor(section, False, False))
            history = self.layout.append(history, new)
            sections.append([(np.asarray(result.observed), np.asarray(result.sample)) for result in results])
        return [self._record(sections, embedding, prompts, seeds, item) for item in range(len(prompts))]

    def _record(self, sections: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]],
                embedding: text_path.PromptEmbedding, prompts: Sequence[str], seeds: Sequence[int], item: int
                ) -> OdeRecord:
        """The record of one prompt of the batch."""

        def level(schedule, kept: np.ndarray, observed: np.ndarray, end: np.ndarray) -> OdeLevel:
            states = np.concatenate([observed[: len(kept), item], end[None, item]])
            return OdeLevel(states, schedule.timesteps[kept], schedule.sigmas[kept])

        levels = [tuple(level(schedule, kept, *states) for schedule, kept, states
                        in zip(*self.steps[min(number, 1)], section, strict=True))
                  for number, section in enumerate(sections)]
        text = np.asarray(embedding.rows[item, : int(embedding.lengths[item])], np.float16)
        if not (np.isfinite(text).all() and all(np.isfinite(part.states).all() for s in levels for part in s)):
            raise UserError(f"prompt {prompts[item]!r:.60}: its trajectory or embedding is not finite; the model is "
                            "broken")
        return OdeRecord(tuple(levels), text, prompts[item], {"seed": int(seeds[item])})


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a text file, one a line, or the first captions of a folder of latent records.

    Raises:
      UserError: neither, or no prompt in it.
    """
    path = Path(path)
    if path.is_dir():
        source = LatentFolder.open(path).source()
        return [decode_record(source[i]).captions[0] for i in range(len(source))]
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"prompts: {path} cannot be read ({error})") from None
    if not any(prompts):
        raise UserError(f"prompts: {path} holds none")
    return [prompt for prompt in prompts if prompt]


def write_pairs(prompts: Sequence[str], config: PairsConfig, output: str | Path, sampler: TrajectorySampler, *,
                identity: str, worker: int = 0, workers: int = 1, report: Callable[[str], None] = print) -> bool:
    """Writes the data set of a list of prompts, or this worker's share; files that are complete already are kept.

    Args:
      prompts: one per record.
      config: of the sampler.
      output: folder of the data set.
      sampler: makes the records.
      identity: names the model (a hash of its weights); a build goes on only with the same one.
      worker, workers: this call writes the files ``worker``, ``worker + workers``, ...; the last one to finish
        describes the whole.
      report: receives progress lines.

    Returns: whether the data set is complete.

    Raises:
      UserError: a folder that holds another data set or cannot be written.
    """
    output, size = Path(output), config.prompts_per_file
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16]
    guard(output / "build.json", {**dataclasses.asdict(config), "prompts": digest, "identity": identity})
    count = -(-len(prompts) // size)
    names = [f"pairs-{i:05d}-of-{count:05d}.array_record" for i in range(count)]
    # A note is written after its file: where both are there the file is complete.
    notes = [(output / name).with_suffix(".json") for name in names]

    def missing(i: int) -> bool:
        return not (notes[i].is_file() and (output / names[i]).is_file())

    mine = [i for i in range(worker, count, workers) if missing(i)]
    start = time.perf_counter()
    for done, i in enumerate(mine, 1):
        indices = range(i * size, min((i + 1) * size, len(prompts)))
        rows = 0
        try:
            with record_file(output / names[i]) as writer:
                for first in range(indices.start, indices.stop, config.batch):
                    for record in _records(sampler, prompts, config, range(first, min(first + config.batch,
                                                                                      indices.stop))):
                        writer.write(encode_ode_record(record))
                        rows = max(rows, len(record.text))
            write_json(notes[i], {"text_rows": rows})
        except OSError as error:
            raise UserError(f"output: {output / names[i]} cannot be written ({error})") from None
        seconds = (time.perf_counter() - start) / done
        report(f"{names[i]}: file {done} of {len(mine)}, {seconds / size:.2f} s/prompt, "
               f"{seconds * (len(mine) - done):.0f} s left")
    if any(missing(i) for i in range(count)):
        report("done here; other workers have files to write")
        return False
    height, width, channels = sampler.shape
    write_json(output / DATASET_FILE, {
        "num_records": len(prompts), "sections": config.sections, "frames": sampler.layout.chunk, "height": height,
        "width": width, "channels": channels, "fps": DEFAULT_FPS,
        "text_rows": max(json.loads(note.read_text(encoding="utf-8"))["text_rows"] for note in notes),
        "text_dim": sampler.pipeline.folder.transformer.text_dim, "files": names,
        "stage_range": list(sampler.scheduler.stage_range), "gamma": sampler.scheduler.gamma,
        "shift_from": config.shift_from})
    report(f"complete: {output}")
    return True


def _records(sampler: TrajectorySampler, prompts: Sequence[str], config: PairsConfig, indices: range
             ) -> list[OdeRecord]:
    """The records of some prompts; a short group is filled up, so that one program serves all."""
    filled = [min(i, indices.stop - 1) for i in range(indices.start, indices.start + config.batch)]
    return sampler([prompts[i] for i in filled], [config.seed + i for i in filled])[: len(indices)]


@command_line
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m helios_jax.tools.ode_pairs",
                                     description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help="a Mid model: folder or hub id")
    parser.add_argument("--prompts", required=True, help="text file with a prompt a line, or folder of latent records")
    parser.add_argument("--output", required=True, help="folder of the data set")
    for field in dataclasses.fields(PairsConfig):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="of the computation")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N prompts")
    parser.add_argument("--worker", default="0/1", help="i/n: this process is number i of n that work together")
    arguments = parser.parse_args(argv)
    worker, workers = parse_worker(arguments.worker)
    config = PairsConfig(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(PairsConfig)})
    prompts = read_prompts(arguments.prompts)
    if arguments.limit is not None:
        prompts = prompts[: checked_count("limit", arguments.limit)]
    pipeline = HeliosPipeline.from_pretrained(arguments.model, dtype=arguments.dtype)
    sampler = TrajectorySampler(pipeline, config)
    parts = {name: pipeline.params[name] for name in ("transformer", "text_encoder")}
    write_pairs(prompts, config, arguments.output, sampler, identity=f"{fingerprint(parts)} {arguments.dtype}",
                worker=worker, workers=workers, report=lambda line: print(line, flush=True))


if __name__ == "__main__":
    main(sys.argv[1:])
