"""The extraction of :mod:`helios_jax.data.extract` as an Apache Beam pipeline, for corpora that outgrow a machine.

    python -m helios_jax.data.beam_extract --model MODEL_FOLDER --metadata clips.json --videos VIDEO_FOLDER \\
        --output data/set --runner DirectRunner --direct_num_workers 8 --direct_running_mode multi_processing

Flags that are not its own go to Beam, so any runner is chosen by Beam's own flags. The files, their content and the
restart after a kill are those of the plain tool, and either can finish what the other began. Model, videos and output
must be folders that every worker sees under the same path.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from helios_jax.data import encoders as encoder_module
from helios_jax.data import videos
from helios_jax.data.encoders import EncodeText, EncodeVideo
from helios_jax.data.extract import (
    BUILD_FILE,
    ExtractConfig,
    Unit,
    add_arguments,
    check_videos,
    config_from,
    finish,
    is_complete,
    make_plan,
    summary,
    write_unit,
)
from helios_jax.data.writing import guard
from helios_jax.errors import UserError, command_line

Encoders = tuple[EncodeVideo, EncodeText, str]
_lock = threading.Lock()


def import_beam() -> Any:
    """The package ``apache_beam``, which only this pipeline needs.

    Raises:
      UserError: it is not installed.
    """
    try:
        import apache_beam
    except ImportError as error:
        raise UserError(f"beam: apache-beam is not installed ({error}); pip install apache-beam, or use "
                        "python -m helios_jax.data.extract with --worker i/n") from None
    return apache_beam


@functools.lru_cache(maxsize=1)
def _loaded(load: Callable[[], Encoders]) -> Encoders:
    return load()


@dataclasses.dataclass(frozen=True)
class WriteUnit:
    """The step that Beam runs for every file: a callable that travels to the workers.

    Attributes:
      config, root, output: see :func:`helios_jax.data.extract.write_unit`.
      load: gives the encoders; called once per process.
      identity: what ``load`` must name, so that no worker writes the latents of another model.
    """

    config: ExtractConfig
    root: str
    output: str
    load: Callable[[], Encoders]
    identity: str

    def __call__(self, unit: Unit) -> str:
        """Writes the file, unless an earlier attempt has; returns its name.

        Raises:
          UserError: the worker's model is another one.
        """
        if not is_complete(self.output, unit):
            with _lock:  # threads of a process share one model
                encode_video, encode_text, identity = _loaded(self.load)
            if identity != self.identity:
                raise UserError(f"model: a worker has {identity}, the run began with {self.identity}")
            write_unit(unit, self.config, self.root, self.output, encode_video, encode_text)
        return unit.name


def extract_with_beam(entries: Sequence[Any], config: ExtractConfig, root: str | Path, output: str | Path,
                      load: Callable[[], Encoders], beam_flags: Sequence[str] = (),
                      report: Callable[[str], None] = print) -> dict[str, Any]:
    """Writes the data set of a video corpus with Beam; files that are complete already are kept.

    Args:
      entries, config, root, output: see :func:`helios_jax.data.extract.extract`.
      load: gives the encoders; it must be picklable and hashable, and is called in this process and in the workers.
      beam_flags: Beam's own, for example runner and number of workers.
      report: receives progress lines.

    Returns: the report.

    Raises:
      UserError: as :func:`helios_jax.data.extract.extract`; Beam is missing.
    """
    beam = import_beam()
    output = Path(output).absolute()
    root = Path(root).absolute()
    check_videos(root)
    plan = make_plan(entries, config)
    with _lock:
        _, _, identity = _loaded(load)
    guard(output / BUILD_FILE, {**plan.description, "identity": identity})
    waiting = [unit for unit in plan.units if not is_complete(output, unit)]
    report(f"{plan.entries} entries, {len(plan.left_out)} left out by the rules, {len(plan.broken)} broken; "
           f"{len(plan.units)} files, of which {len(waiting)} are to be written")
    if waiting:
        with beam.Pipeline(argv=list(beam_flags)) as pipeline:
            # The reshuffle keeps Beam from fusing everything into the one worker that creates the list.
            _ = (pipeline | "Files" >> beam.Create(waiting) | "Spread" >> beam.Reshuffle()
                 | "Write" >> beam.Map(WriteUnit(config, str(root), str(output), load, identity)))
    result = finish(plan, output)
    if result is None:
        raise UserError(f"output: after the pipeline {output} lacks files; the workers must write to the same folder")
    report(summary(result, output))
    return result


@command_line
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m helios_jax.data.beam_extract",
                                     description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add_arguments(parser)
    arguments, beam_flags = parser.parse_known_args(argv)
    import_beam()
    config = config_from(arguments)
    entries = videos.read_metadata(arguments.metadata)
    check_videos(arguments.videos)
    make_plan(entries, config)  # what is wrong with the metadata is known before the models are loaded
    extract_with_beam(entries, config, arguments.videos, arguments.output,
                      functools.partial(encoder_module.encoders, str(Path(arguments.model).absolute())), beam_flags,
                      report=lambda line: print(line, flush=True))


if __name__ == "__main__":
    # Workers find this module under its own name, not as __main__.
    from helios_jax.data.beam_extract import main as main_of_module

    main_of_module(sys.argv[1:])
