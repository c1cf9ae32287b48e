"""Converts a model between the published layout and Orbax; see ``--help``."""

from __future__ import annotations

import argparse
import sys
import time

from helios_jax.convert.export import FORMATS, MAX_SHARD_BYTES, convert_model
from helios_jax.convert.folder import resolve_model
from helios_jax.errors import UserError, command_line
from helios_jax.models.quantize import PRECISIONS

DESCRIPTION = """\
Converts a Helios model between the published layout (safetensors, read by diffusers) and Orbax.

Parameters stream: to Orbax a few layers are in memory at a time, from Orbax one stacked parameter (6 GB for the 14B
model in bfloat16). Dtypes are kept unless --dtype is given, and a round trip is exact. The output appears under its
name only when it is complete.
"""

EXAMPLES = """\
examples:
  python -m helios_jax.convert --from BestWishYsh/Helios-Distilled --to models/distilled --format orbax
  python -m helios_jax.convert --from runs/stage1/export --to models/for-diffusers --format diffusers --dtype bfloat16
  python -m helios_jax.convert --from BestWishYsh/Helios-Distilled --to models/distilled-fp8 --precision fp8
  python -m helios_jax.convert --from Wan-AI/Wan2.1-T2V-14B-Diffusers --from-wan --to models/stage1-init
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message}; see --help")


def parser() -> argparse.ArgumentParser:
    result = _Parser(prog="python -m helios_jax.convert", description=DESCRIPTION, epilog=EXAMPLES,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--from", dest="model", required=True, metavar="FOLDER_OR_ID",
                        help="model folder (published layout or Orbax), or the id of a model on the Hugging Face hub")
    result.add_argument("--to", dest="out", required=True, metavar="FOLDER", help="folder to create")
    result.add_argument("--format", choices=FORMATS, default="orbax", help="what to write (default: %(default)s)")
    result.add_argument("--dtype", choices=("bfloat16", "float16", "float32"),
                        help="convert to what a model that computes in this dtype keeps in memory: everything in it "
                             "except the parameters that the original keeps in float32 (default: as stored)")
    result.add_argument("--precision", choices=tuple(PRECISIONS), default="none",
                        help="quantise the linear layers of transformer and text encoder; only to Orbax. Sampling from "
                             "the result needs no flag (default: %(default)s)")
    result.add_argument("--revision", help="branch, tag or commit on the hub")
    result.add_argument("--from-wan", action="store_true",
                        help="the input is a Wan 2.1 text-to-video model; write a Helios-Base model whose history "
                             "patches are made from Wan's patch embedding, to start training from")
    result.add_argument("--max-shard-gb", type=float, default=MAX_SHARD_BYTES / 1e9, metavar="GB",
                        help="split safetensors files at this size (default: %(default)g)")
    result.add_argument("--overwrite", action="store_true", help="replace an existing model folder")
    return result


@command_line
def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    if not options.max_shard_gb > 0:
        raise UserError(f"--max-shard-gb: must be positive, got {options.max_shard_gb}")
    start = time.monotonic()
    convert_model(resolve_model(options.model, options.revision), options.out, options.format, options.dtype,
                  max(1, int(options.max_shard_gb * 1e9)), options.overwrite, options.from_wan,
                  report=lambda line: print(line, file=sys.stderr, flush=True), precision=options.precision)
    print(f"wrote {options.out} in {time.monotonic() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
