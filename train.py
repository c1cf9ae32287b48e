"""Trains a model: ``python train.py --config configs/tiny_stage1.py --workdir runs/stage1``.

Every value of the configuration can be changed on the command line: ``--config.optimizer.learning_rate=3e-4``.
The same command resumes a run that was interrupted; SIGTERM and Ctrl-C save first.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from typing import NamedTuple

from helios_jax.errors import UserError, command_line

USAGE = """usage: python train.py --config configs/FILE.py --workdir DIR [--config.KEY=VALUE ...]

  --config FILE         a file of configs/; its first lines say what it trains, for how long and on what; some take
                        the model's size behind a colon: configs/stage1_init.py:1.3b
  --config.KEY=VALUE    changes one value, for example --config.optimizer.learning_rate=3e-4
  --workdir DIR         receives checkpoints, metrics.jsonl, TensorBoard files, sample videos and the exported model
  --config.mesh.fsdp=-1 divides the run over all devices; also data, context, tensor (where the file lists them)

Many processes: Cloud TPU, GKE and Slurm need no flags (docs/pods.md); elsewhere every process is told
  --coordinator H:P     address of the first process
  --num_processes N     how many there are
  --process_id I        which one this is, from 0

The same command resumes an interrupted run. SIGTERM and Ctrl-C save a checkpoint and stop; a second Ctrl-C stops
at once."""


class Processes(NamedTuple):
    """The flags about other processes, see :func:`helios_jax.distributed.initialise`; None where absent."""

    coordinator: str | None
    num_processes: int | None
    process_id: int | None


def parse_arguments(argv: list[str]):
    """The configuration, the work folder and the other processes from the command line.

    Returns: (RunConfig, str, Processes).
    Raises:
      UserError: an unknown flag or key, a missing or broken config file, a wrong value.
    """
    from absl import flags
    from ml_collections import config_flags

    from helios_jax.training.config import run_config

    known = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", None, "Configuration file.", lock_config=True,
                                             flag_values=known, sys_argv=argv)
    workdir = flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=known)
    coordinator = flags.DEFINE_string("coordinator", None, "host:port of the first process.", flag_values=known)
    num_processes = flags.DEFINE_integer("num_processes", None, "Processes of the run.", flag_values=known)
    process_id = flags.DEFINE_integer("process_id", None, "Number of this process.", flag_values=known)
    try:
        rest = known(argv)
        values = None if config.value is None else config.value.to_dict()
    except Exception as error:  # absl, ml_collections and the config file itself raise many kinds
        raise UserError(_reason(error, argv)) from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument: {rest[1]!r}; see --help")
    if values is None:
        raise UserError("--config: required; a file of configs/, for example --config configs/tiny_stage1.py")
    if not workdir.value:
        raise UserError("--workdir: required; the folder that receives the run")
    return run_config(values), workdir.value, Processes(coordinator.value, num_processes.value, process_id.value)


def _reason(error: Exception, argv: list[str]) -> str:
    """One line for whatever went wrong while flags and config file were read."""
    paths = [a.split("=", 1)[1] for a in argv if a.startswith(("--config=", "-config="))]
    paths += [after for a, after in zip(argv, argv[1:], strict=False) if a in ("--config", "-config")]
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    mistakes = [cause for cause in causes if isinstance(cause, UserError)]
    if mistakes:
        return str(mistakes[-1])  # ml_collections raises it anew with the traceback as its message
    path = (paths or ["?"])[-1].partition(":")[0]
    if not os.path.isfile(path):
        return f"--config: no such file: {path}"
    near = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', str(error))
    if near:
        return f"--config: unknown key {near[2]!r}; did you mean {near[1]!r}?"
    if "Error whilst parsing config file" in str(error):
        error = causes[-1]
        return f"{path}: cannot be read as a configuration ({type(error).__name__}: {' '.join(str(error).split())})"
    text = " ".join(str(error).split()) or type(error).__name__
    named = [a for a in argv if a.startswith("--config.") and text.strip("\"'") in a.split("=")[0].split(".")]
    if isinstance(error, (KeyError, AttributeError)) and named:
        return f"--config: unknown key {text.strip(chr(34) + chr(39))!r}; {path} does not list it"
    if isinstance(error, ValueError) or type(error).__module__.startswith("absl"):  # absl's messages name the flag
        return text
    return f"{path}: cannot be read as a configuration ({type(error).__name__}: {text})"


@command_line
def main(argv: list[str]) -> int:
    if len(argv) > 1 and argv[1] in ("--help", "-h", "-help", "--helpfull"):
        print(USAGE)
        return 0
    run, workdir, processes = parse_arguments(argv)

    from helios_jax import distributed
    from helios_jax.training.loop import train

    distributed.initialise(*processes)
    try:
        result = train(run, workdir, print_line=lambda line: print(line, flush=True))
    except distributed.ProcessLost as error:
        distributed.leave(str(error))
    return 130 if result.stopped_by == signal.SIGINT else 0


if __name__ == "__main__":
    main(sys.argv)
