"""Compares a checkpoint with PyTorch, component by component; see ``--help`` and ``docs/verify.md``."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

from helios_jax.errors import UserError, command_line
from helios_jax.pipeline.request import DEFAULT_SEED, Size, checked_count, checked_steps

DESCRIPTION = """\
Compares a Helios model as this library runs it with the same model in PyTorch (diffusers and transformers): token ids,
text encoder, VAE, transformer and a short sample. Both sides run on the CPU with equal inputs and equal noise. At any
time one component of one framework is in memory (transformer and VAE for the sample).
"""

EPILOG = """\
examples:
  python -m helios_jax.verify --model BestWishYsh/Helios-Base
  python -m helios_jax.verify --model models/helios-distilled --dtype bfloat16 --json report.json
  python -m helios_jax.verify --model models/converted-to-orbax --against BestWishYsh/Helios-Mid
  python -m helios_jax.verify --model assets/helios-tiny --components tokenizer,vae

exit code: 0 all checks passed, 1 a check failed, 2 the comparison could not be made.
"""

# Weights are widened to float32 layer by layer inside the loop over the layers. This pass would move the conversion
# out of the loop, that is, keep a float32 copy of the whole model (49 GB for the 14B transformer).
XLA_FLAGS = "--xla_disable_hlo_passes=while-loop-invariant-code-motion"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message}; see --help")


def parser() -> argparse.ArgumentParser:
    p = _Parser(prog="python -m helios_jax.verify", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False,
                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, metavar="ID_OR_FOLDER", help="hub id or folder")
    p.add_argument("--against", metavar="ID_OR_FOLDER",
                   help="what PyTorch reads, in the published layout (default: the same as --model)")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                   help="of transformer and text encoder (default: %(default)s); the VAE always runs in float32")
    p.add_argument("--size", metavar="HxW", help="pixels (default: 64x128, or the smallest allowed above)")
    p.add_argument("--components", metavar="NAMES", help="comma-separated, of tokenizer, text_encoder, vae, "
                   "transformer, sample (default: all); without text_encoder the prompt rows are random numbers")
    p.add_argument("--prompt", metavar="TEXT", help="of text encoder and sample")
    p.add_argument("--frames", type=int, default=66, metavar="N", help="of the sample (default: %(default)s)")
    p.add_argument("--steps", metavar="N[,N,N]", help="of the sample, per pyramid stage (default: 3)")
    p.add_argument("--seed", type=int, default=DEFAULT_SEED, metavar="N", help="of the sample (default: %(default)s)")
    p.add_argument("--memory", type=float, metavar="GB", help="use at most this much (default: what is available)")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the results to a file")
    return p


def parse_size(text: str | None, stages: int) -> Size:
    """'64x128' as a size; None as the smallest allowed one of at least 64x128.

    Raises:
      UserError: another form, or a size that the pyramid cannot halve.
    """
    if text is None:
        step = 16 * 2 ** (stages - 1)
        return Size(-(-64 // step) * step, -(-128 // step) * step)
    match = re.fullmatch(r"(\d+)[xX](\d+)", text)
    if not match:
        raise UserError(f"--size: HEIGHTxWIDTH expected, e.g. 64x128, got {text!r}")
    return Size.checked(int(match[1]), int(match[2]), stages)


def parse_components(text: str | None) -> tuple[str, ...]:
    """Raises:
      UserError: an unknown name, or none.
    """
    from helios_jax.verify.inputs import COMPONENTS

    if text is None:
        return COMPONENTS
    names = {name.strip() for name in text.split(",")}
    unknown = sorted(names - set(COMPONENTS))
    if unknown:
        raise UserError(f"--components: some of {', '.join(COMPONENTS)}, got {unknown[0]!r}")
    return tuple(name for name in COMPONENTS if name in names)


def make_settings(options: argparse.Namespace):
    """Options as :class:`helios_jax.verify.inputs.Settings`.

    Raises:
      UserError: a value out of range, or a folder that is not a model.
    """
    from helios_jax.convert.folder import read_model_folder, resolve_model
    from helios_jax.verify.inputs import PROMPT, STEPS_PER_STAGE, Settings

    components = parse_components(options.components)
    checked_count("--frames", options.frames)
    if not 0 <= options.seed < 2**64:
        raise UserError(f"--seed: 0...2^64-1 expected, got {options.seed}")
    steps: Any = STEPS_PER_STAGE
    if options.steps is not None:
        try:
            steps = [int(n) for n in options.steps.split(",")]
        except ValueError:
            raise UserError(f"--steps: whole numbers, e.g. 3 or 3,3,3, got {options.steps!r}") from None
    folder = read_model_folder(resolve_model(options.model))
    against = folder if options.against is None else read_model_folder(resolve_model(options.against))
    if against.format != "diffusers":
        option = "--model" if options.against is None else "--against"
        raise UserError(f"{option}: PyTorch cannot read the Orbax folder {against.root}; name the published model with "
                        "--against")
    if (folder.index.variant, folder.scheduler.stages) != (against.index.variant, against.scheduler.stages):
        raise UserError(f"--against: a {folder.index.variant} model of {folder.scheduler.stages} stages expected as in "
                        f"--model, got {against.index.variant} of {against.scheduler.stages}")
    if "sample" in components and not folder.transformer.has_multi_term_memory_patch:
        raise UserError("--components: a transformer without history patches makes no sample; leave sample out")
    steps = checked_steps(steps, folder.index, folder.scheduler)
    return Settings(folder, against, options.dtype, parse_size(options.size, len(steps)), options.frames, steps,
                    PROMPT if options.prompt is None else options.prompt, options.seed, components)


@command_line
def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.memory is not None and not (options.memory > 0 and math.isfinite(options.memory)):
        raise UserError(f"--memory: a positive number of gigabytes expected, got {options.memory}")
    if options.json is not None and (options.json.is_dir() or not os.access(options.json.absolute().parent, os.W_OK)):
        raise UserError(f"--json: {options.json} cannot be written")
    if XLA_FLAGS not in os.environ.get("XLA_FLAGS", ""):  # read when JAX starts its backend
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS}".strip()
    import jax

    jax.config.update("jax_platforms", "cpu")
    from helios_jax.verify import compare, memory, theirs
    from helios_jax.verify.run import verify

    settings = make_settings(options)
    steps = memory.plan(settings)
    available = memory.available_bytes() if options.memory is None else options.memory * 1e9

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    limit = "unknown" if available is None else memory.gigabytes(available)
    needs = ", ".join(f"{step.name} {memory.gigabytes(step.total)}" for step in steps)
    say(f"memory needed: {needs or 'little'}; available: {limit}")
    memory.check(steps, available)
    versions = theirs.import_all() | {"jax": jax.__version__}

    checks = verify(settings, say)
    print(f"{settings.folder.root} ({settings.folder.index.variant}), {settings.dtype}, "
          f"{settings.size.height}x{settings.size.width}; {', '.join(f'{k} {v}' for k, v in versions.items())}\n")
    print(compare.table(checks))
    print()
    print(compare.summary(checks))
    passed = all(check.passed for check in checks)
    if options.json is not None:
        write_report(options.json, {
            "model": str(options.model), "against": str(options.against or options.model), "dtype": settings.dtype,
            "variant": settings.folder.index.variant, "size": [settings.size.height, settings.size.width],
            "frames": settings.frames, "steps": list(settings.steps), "seed": settings.seed, "versions": versions,
            "memory_bytes": {step.name: int(step.total) for step in steps}, "passed": passed,
            "tolerances": compare.ORIGINS, "checks": [check.to_dict() for check in checks]})
    return 0 if passed else 1


def write_report(path: Path, values: dict[str, Any]) -> None:
    """Writes a JSON file that is complete as soon as it has its name.

    Raises:
      UserError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.incomplete")
    try:
        partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


if __name__ == "__main__":
    main()
