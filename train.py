"""Trains a model: ``python train.py --config configs/tiny_stage1.py --workdir runs/stage1``.

Every value of the configuration can be changed on the command line: ``--config.optimizer.learning_rate=3e-4``.
The same command resumes a run that was interrupted; SIGTERM and Ctrl-C save first.
"""

from __future__ import annotations

import os
import signal
import sys

from helios_jax.errors import UserError, command_line

USAGE = """usage: python train.py --config configs/FILE.py --workdir DIR [--config.KEY=VALUE ...]

  --config FILE         a file of configs/; its first lines say what it trains, for how long and on what
  --config.KEY=VALUE    changes one value, for example --config.optimizer.learning_rate=3e-4
  --workdir DIR         receives checkpoints, metrics.jsonl, TensorBoard files, sample videos and the exported model

The same command resumes an interrupted run. SIGTERM and Ctrl-C save a checkpoint and stop; a second Ctrl-C stops
at once."""


def parse_arguments(argv: list[str]):
    """The configuration and the work folder from the command line.

    Returns: (RunConfig, str).
    Raises:
      UserError: an unknown flag or key, a missing or broken config file, a wrong value.
    """
    from absl import flags
    from ml_collections import config_flags

    from helios_jax.training.config import run_config

    known = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", None, "Configuration file.", lock_config=True,
                                             flag_values=known)
    workdir = flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=known)
    for argument in argv[1:]:  # a missing file would otherwise be reported from deep inside the import machinery
        if argument.startswith(("--config=", "-config=")):
            path = argument.split("=", 1)[1]
            if not os.path.isfile(path.split(":")[0]):
                raise UserError(f"--config: no such file: {path}")
    try:
        rest = known(argv)
    except SystemExit:
        raise
    except Exception as error:  # absl, ml_collections and the config file itself raise a variety of kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{reason} ({type(error).__name__} while reading the command line)") from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument: {rest[1]!r}; see --help")
    if config.value is None:
        raise UserError("--config: required; a file of configs/, for example --config configs/tiny_stage1.py")
    if not workdir.value:
        raise UserError("--workdir: required; the folder that receives the run")
    return run_config(config.value), workdir.value


@command_line
def main(argv: list[str]) -> int:
    if len(argv) > 1 and argv[1] in ("--help", "-h", "-help", "--helpfull"):
        print(USAGE)
        return 0
    run, workdir = parse_arguments(argv)

    from helios_jax.training.loop import train

    result = train(run, workdir, print_line=lambda line: print(line, flush=True))
    return 130 if result.stopped_by == signal.SIGINT else 0


if __name__ == "__main__":
    main(sys.argv)
