"""Makes the models in the box from nothing, one command after another.

    python -m helios_jax.tools.train_tiny                                # everything; goes on where it stopped
    python -m helios_jax.tools.train_tiny --first stage2                 # from the Base model in assets/ on
    python -m helios_jax.tools.train_tiny --first ode                    # from the Mid model in assets/ on
    python -m helios_jax.tools.train_tiny --last restricted/stage3_gan   # and the same with restrict_self_attn
    python -m helios_jax.tools.train_tiny --list

Run it in the folder of train.py. Data go to data/, runs to runs/, and nothing in assets/ is touched. A step that is
complete is not repeated (a training resumes from its last checkpoint); its command and seconds stand in
runs/tiny.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from helios_jax.data.pipeline import DATASET_FILE
from helios_jax.data.writing import write_json
from helios_jax.errors import UserError, command_line

BOX, BOX_MID, BOX_DISTILLED = (Path("assets", f"helios-tiny{variant}") for variant in ("", "-mid", "-distilled"))
PARTS, RECORD = Path("runs/parts"), Path("runs/tiny.json")
SHARED = ("vae", "text_encoder", "tokenizer")
LAST = "stage3_dmd"  # what comes after it is for comparison


class Step(NamedTuple):
    """One command. made_from: the steps whose results become the folder of shared components before it starts."""

    name: str
    command: tuple[str, ...]
    made_from: tuple[str, ...] = ()

    @property
    def result(self) -> Path:
        """What is there when the step is complete, and not before."""
        if "--workdir" in self.command:
            return Path(self.command[self.command.index("--workdir") + 1], "export")
        return Path(self.command[self.command.index("--output") + 1], DATASET_FILE)


def train(name: str, config: str, *changes: str) -> Step:
    return Step(name, ("train.py", "--config", f"configs/{config}", "--workdir", f"runs/{name}",
                       *(f"--config.{change}" for change in changes)))


def steps(parts: Path, base: Path, mid: Path, distilled: Path) -> list[Step]:
    """All steps in order.

    Args:
      parts: holds VAE, text encoder and tokenizer.
      base, mid, distilled: finished models of the three stages.
    """
    shared = f"objective.model={parts}"
    build = ("-m", "helios_jax.data.build_latents", "--model", str(parts), "--sections", "4")
    teacher = f"objective.teacher={base}"
    restricted = "objective.transformer.restrict_self_attn=True"

    return [
        train("vae/images", "tiny_autoencoder.py:images"),
        train("vae/clips", "tiny_autoencoder.py:clips"),
        train("text_encoder", "tiny_text_encoder.py"),
        Step("latents-square", (*build, "--output", "data/latents-square", "--clips", "1536", "--width", "64"),
             ("vae/clips", "text_encoder")),
        train("stage1/square", "tiny_stage1.py:square", shared),
        Step("latents", (*build, "--output", "data/latents", "--clips", "1024")),
        train("stage1/wide", "tiny_stage1.py:wide", shared),
        train("stage1/longer", "tiny_stage1.py:wide", shared, "objective.init_from=runs/stage1/wide/export",
              "objective.task_mix.t2v=0.3", "seed=2", "num_steps=900", "optimizer.learning_rate=1.2e-3"),
        train("stage2", "tiny_stage2.py", shared, f"objective.init_from={base}"),
        train("stage2_more", "tiny_stage2.py:history", shared, "objective.level_weights=(1.0,1.0,1.0)",
              "objective.task_mix.v2v=0.4", "seed=5"),
        train("stage2_history", "tiny_stage2.py:history", shared, "objective.init_from=runs/stage2_more/export"),
        Step("ode", ("-m", "helios_jax.tools.ode_pairs", "--model", str(mid), "--prompts", "data/latents", "--output",
                     "data/ode", "--shift-from", "previous", "--batch", "8", "--sections", "3", "--steps", "10",
                     "--limit", "480")),
        train("stage3_ode", "tiny_stage3_ode.py", shared, f"objective.init_from={mid}"),
        train("stage3_dmd", "tiny_stage3_dmd.py", shared, teacher),
        train("stage3_gan", "tiny_stage3_dmd.py:gan", shared, teacher, f"objective.init_from={distilled}"),
        train("restricted/stage3_ode", "tiny_stage3_ode.py", shared, f"objective.init_from={mid}", restricted),
        train("restricted/stage3_dmd", "tiny_stage3_dmd.py", shared, teacher,
              "objective.init_from=runs/restricted/stage3_ode/export", restricted),
        train("restricted/stage3_gan", "tiny_stage3_dmd.py:gan", shared, teacher,
              "objective.init_from=runs/restricted/stage3_dmd/export", restricted),
    ]


def assemble(sources: tuple[str, ...]) -> None:
    """Copies the shared components of finished runs into one folder."""
    for source in sources:
        for name in SHARED:
            made = Path("runs", source, "export", name)
            if made.is_dir():
                shutil.copytree(made, PARTS / name, dirs_exist_ok=True)


@command_line
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m helios_jax.tools.train_tiny", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [step.name for step in steps(BOX, BOX, BOX_MID, BOX_DISTILLED)]
    parser.add_argument("--first", choices=names, default=names[0], metavar="STEP", help="where to begin; what comes "
                        "before it is taken from assets/ and data/")
    parser.add_argument("--last", choices=names, default=LAST, metavar="STEP", help=f"where to end; default: {LAST}, "
                        "which completes the models in assets/")
    parser.add_argument("--list", action="store_true", help="print the commands and end")
    arguments = parser.parse_args(argv)
    first, last = names.index(arguments.first), names.index(arguments.last)
    if first > last:
        raise UserError(f"--last: comes before --first {arguments.first}, got {arguments.last}")
    if not Path("train.py").is_file() or not Path("configs").is_dir():
        raise UserError("train_tiny: run it in the folder of train.py and configs/")
    parts = PARTS if first <= names.index("text_encoder") else BOX
    base = Path("runs/stage1/longer/export") if first <= names.index("stage1/longer") else BOX
    mid = Path("runs/stage2_history/export") if first <= names.index("stage2_history") else BOX_MID
    distilled = Path("runs/stage3_dmd/export") if first <= names.index("stage3_dmd") else BOX_DISTILLED
    chosen = steps(parts, base, mid, distilled)[first : last + 1]
    if arguments.list:
        print("\n".join(f"python {' '.join(step.command)}" for step in chosen))
        return 0
    done = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    for step in chosen:
        if done.get(step.name, {}).get("command") == list(step.command):
            continue
        # What comes after was made from another result of this step.
        done = {name: entry for name, entry in done.items() if names.index(name) < names.index(step.name)}
        print(f"== {step.name}: python {' '.join(step.command)}", flush=True)
        assemble(step.made_from)
        start = time.monotonic()
        code = subprocess.run([sys.executable, *step.command]).returncode
        if code or not step.result.exists():  # a training that was told to stop ends with 0, too
            raise UserError(f"{step.name}: ended with exit code {code} and without {step.result}; the same command of "
                            "train_tiny goes on from here")
        done[step.name] = {"command": step.command, "seconds": round(time.monotonic() - start)}
        RECORD.parent.mkdir(exist_ok=True)
        write_json(RECORD, done)
    return 0


if __name__ == "__main__":
    main()
