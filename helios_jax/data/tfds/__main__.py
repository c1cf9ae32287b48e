"""Prepares a TFDS data set of latents: ``python -m helios_jax.data.tfds videos|shapes ...``."""

from __future__ import annotations

import argparse
import sys

from helios_jax.data import videos
from helios_jax.data.build_latents import BuildConfig
from helios_jax.data.encoders import encoders
from helios_jax.data.extract import add_arguments, check_videos, config_from, make_plan
from helios_jax.data.tfds import ProceduralLatents, VideoLatents
from helios_jax.errors import command_line


@command_line
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m helios_jax.data.tfds", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    corpus = kinds.add_parser("videos", help="a folder of videos with a metadata file")
    add_arguments(corpus)
    procedural = kinds.add_parser("shapes", help="procedural clips of moving shapes")
    procedural.add_argument("--model", required=True, help="model folder with vae/, text_encoder/ and tokenizer/")
    procedural.add_argument("--output", help="folder of the records, 'rendered' in the data folder by default")
    procedural.add_argument("--clips", type=int, required=True)
    procedural.add_argument("--held-out-clips", type=int, default=0)
    for field in ("sections", "phrasings", "height", "width", "files"):
        procedural.add_argument(f"--{field}", type=int, default=BuildConfig.__dataclass_fields__[field].default)
    for sub in (corpus, procedural):
        sub.add_argument("--data-dir", required=True, help="folder of TFDS data sets")
    arguments = parser.parse_args(argv)

    def report(line: str) -> None:
        print(line, flush=True)

    if arguments.kind == "shapes":
        settings = BuildConfig(**{field: getattr(arguments, field)
                                  for field in ("clips", "sections", "phrasings", "height", "width", "files")})
        builders = [ProceduralLatents(data_dir=arguments.data_dir, encoders=encoders(arguments.model),
                                      settings=settings, held_out_clips=arguments.held_out_clips,
                                      work=arguments.output, report=report)]
    else:
        settings, entries = config_from(arguments), videos.read_metadata(arguments.metadata)
        check_videos(arguments.videos)
        plan = make_plan(entries, settings)
        models = encoders(arguments.model)
        builders = [VideoLatents(data_dir=arguments.data_dir, metadata=arguments.metadata, videos=arguments.videos,
                                 encoders=models, size=f"{size[0]}x{size[1]}", settings=settings,
                                 work=arguments.output, report=report)
                    for size in dict.fromkeys(unit.size for unit in plan.units)]
    for builder in builders:
        builder.download_and_prepare()
        report(f"prepared: {builder.data_dir}")


if __name__ == "__main__":
    main(sys.argv[1:])
