"""Compiles a training step, or a sampler, for machines that are not there, and says whether and how it would run.

    python -m helios_jax.tools.compile_check --config configs/stage1_init.py:14b --topology v5p:4x4x4
    python -m helios_jax.tools.compile_check --config configs/stage2_init.py:14b --topology v6e:2x4 --sample 1 \\
        --set mesh.fsdp=1 --set mesh.context=8

It needs libtpu (``pip install libtpu``), no TPU; for an H100 (``--topology h100``) the CUDA plugin of the installed jax
(see benchmarks/compile_gpu.py), no GPU. The step is the trainer's own, with the run's mesh, batch and optimizer; only
the data may be missing, and then random records of the asked size stand in. ``--sample N`` compiles the sampler's own
programs for one chunk of N videos instead, one per pyramid level, and the VAE's decoder. Printed are the memory of a
chip by kind, the arithmetic, the collectives, and a modelled time with what it assumes. Exit code 0: it fits; 1: it
does not, and the last line names a change that makes it fit (compiled, too); 2: a mistake in the arguments.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import json
import math
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from helios_jax.data.buckets import latent_folders
from helios_jax.data.pipeline import BUCKETS_FILE, DATASET_FILE
from helios_jax.data.random_latents import write_random_latents, write_random_ode_pairs
from helios_jax.errors import UserError, command_line
from helios_jax.models.quantize import check_precision
from helios_jax.pipeline.request import CHUNK_FRAMES
from helios_jax.sharding import Partition
from helios_jax.tools.roofline import CHIPS, Chip, Collective, collectives, model_time
from helios_jax.tools.workloads import Workload, sampling_workloads, training_workload
from helios_jax.training.config import RunConfig, run_config

GIB = 2**30


class Report(NamedTuple):
    """What a compilation says. Sizes in bytes of one chip.

    fits: whether it compiles within the chip's memory, and together with what lies beside it.
    used: memory in use at its peak (as the compiler's error states it where it does not compile).
    kinds: what the memory holds: parameters, average, optimizer, frozen, batch, temporary, code, other models.
    compiler_flops: the compiler's own count for one chip, with every loop counted once.
    collectives: by kind.
    seconds: that compiling took.
    """

    fits: bool
    used: float
    kinds: dict[str, float]
    compiler_flops: float
    collectives: dict[str, Collective]
    seconds: float


class Built(NamedTuple):
    """A configuration made ready to compile."""

    run: RunConfig
    partition: Partition
    workloads: list[Workload]


def load_values(config: str, changes: list[str]) -> dict[str, Any]:
    """The values of a file of ``configs/`` with changes.

    Args:
      config: ``FILE`` or ``FILE:ARGUMENT``, as for train.py.
      changes: ``field=value``; a value is a Python literal or else a string.

    Raises:
      UserError: no such file, or no configuration; a change without "=" or into something that is no group.
    """
    path, _, argument = config.partition(":")
    if not Path(path).is_file():
        raise UserError(f"--config: no such file: {path}")
    if not path.endswith(".py"):
        raise UserError(f"--config: a Python file expected, got {path}")
    spec = importlib.util.spec_from_file_location("checked_config", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        values = (module.get_config(argument) if argument else module.get_config()).to_dict()
    except UserError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise UserError(f"--config: {path}: cannot be read as a configuration ({type(error).__name__}: {text})"
                        ) from error
    for change in changes:
        apply_change(values, change)
    return values


def apply_change(values: dict[str, Any], change: str) -> None:
    """Sets one ``field=value``, for example ``mesh.fsdp=64``."""
    field, equals, text = change.partition("=")
    if not equals:
        raise UserError(f"--set: field=value expected, got {change!r}")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    *groups, name = field.split(".")
    node = values
    for group in groups:
        node = node.setdefault(group, {})
        if not isinstance(node, dict):
            raise UserError(f"--set: {group!r} in {field!r} is no group of fields")
    node[name] = value


@contextlib.contextmanager
def stand_in_data(values: Mapping[str, Any], size: tuple[int, int]) -> Iterator[tuple[dict[str, Any], str]]:
    """The run without what its step does not need: values and a note on what was replaced.

    Samples, validation and the model folder for them are dropped; a data folder that is not there is replaced by random
    records of ``size`` (height and width in pixels) with captions of 512 rows. Of data of several sizes the largest is
    taken, whose step needs most memory.
    """
    values = {**values, "sample_every": 0, "objective": dict(values["objective"])}
    objective, notes = values["objective"], []
    for field in ("model", "sample", "validation", "negative_prompt"):
        objective.pop(field, None)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(objective.get("data", ""))
        if (data / BUCKETS_FILE).is_file():
            sizes = latent_folders(data)
            largest = max(sizes, key=lambda name: sizes[name].height * sizes[name].width)
            objective["data"] = str(data / largest)
            notes.append(f"{data}: data of several sizes, the step is that of {largest}")
        elif "data" in objective and not (data / DATASET_FILE).is_file():
            transformer = objective.get("transformer", {})
            write = write_random_ode_pairs if objective["name"] == "stage3_ode" else write_random_latents
            write(folder, clips=1, sections=objective.get("sections", 2), height=size[0] // 8, width=size[1] // 8,
                  channels=transformer.get("in_channels", 16), text_rows=512,
                  text_dim=transformer.get("text_dim", 4096))
            notes.append(f"{objective['data'] or 'no data folder'}: not there; random records of {size[0]}x{size[1]} "
                         "with 512 caption rows stand in")
            objective["data"] = folder
        yield values, "; ".join(notes)


def needed_memory(error: str) -> float:
    """Bytes that the compiler says it needs, or of the one array that is too large by itself; else not a number."""
    if used := re.search(r"Used ([\d.]+)([KMGT]) of", error):
        return float(used[1]) * {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}[used[2]]
    single = re.search(r"Allocation \(size=(\d+)\) would exceed memory", error)
    return float(single[1]) if single else math.nan


def check(workload: Workload, partition: Partition, memory: float, texts: Path | None = None) -> Report:
    """Compiles one function for chips of so many bytes; ``texts`` is a folder for the compiled programs as text."""
    start = time.perf_counter()
    with jax.sharding.use_abstract_mesh(partition.mesh.abstract_mesh):  # kernels ask it for the chip
        lowered = workload.lower()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Report(False, needed_memory(str(error)), workload.arguments, math.nan, {}, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    text, found = compiled.as_text(), compiled.memory_analysis()
    if texts is not None:
        (texts / f"{re.sub(r'[^a-z0-9]+', '_', workload.name)}.hlo").write_text(text, encoding="utf-8")
    kinds = workload.arguments | {"temporary": float(found.temp_size_in_bytes), "other models": workload.beside,
                                  "code": float(found.generated_code_size_in_bytes)}
    # What a program does not use is not handed to it, but lies there all the same.
    arguments = max(found.argument_size_in_bytes, sum(workload.arguments.values()))
    used = (arguments + found.output_size_in_bytes - found.alias_size_in_bytes + found.temp_size_in_bytes
            + found.generated_code_size_in_bytes + workload.beside)
    cost = compiled.cost_analysis() or {}
    cost = cost[0] if isinstance(cost, list) else cost
    return Report(used <= memory, float(used), kinds, float(cost.get("flops", math.nan)),
                  collectives(text), seconds)


def heading(built: Built, chip: Chip, videos: int | None) -> str:
    """What is compiled, for which mesh."""
    run, mesh = built.run, built.partition.mesh
    what = f"batch {run.batch_size} in {run.accumulate} part(s)" if videos is None else f"sampling {videos} video(s)"
    return (f"{run.objective_name}, {what}, {mesh.size} chips {chip.name}: "
            + " x ".join(f"{axis} {length}" for axis, length in mesh.shape.items()))


def describe(workload: Workload, report: Report, chip: Chip, chips: int, flops: tuple[float, float],
             efficiency: float) -> list[str]:
    """The report on one compiled function as lines."""
    lines = [workload.name,
             f"  compiled in {report.seconds:.0f} s" if report.fits else "  does not fit the chip's memory",
             f"  memory per chip: {report.used / GIB:.2f} of {chip.memory / GIB:.2f} GiB"]
    lines += [f"    {name:<12} {size / GIB:8.3f} GiB" for name, size in report.kinds.items() if size]
    if workload.host:
        lines.append(f"  in the host's memory: {workload.host / GIB:.2f} GiB of parameters, copied in every step")
    computed, useful = (number / chips for number in flops)
    lines.append(f"  matrix products per chip: {computed / 1e12:.2f} TFLOP, of them "
                 f"{(computed - useful) / 1e12:.2f} by rematerialisation (counted in the traced function)")
    if not report.fits:
        return lines
    if not math.isnan(report.compiler_flops):
        lines.append(f"  the compiler's count: {report.compiler_flops / 1e12:.2f} TFLOP, with every loop counted once")
    for kind, found in report.collectives.items():
        lines.append(f"    {kind:<20} {found.count:6d} times {found.bytes / GIB:9.3f} GiB of results, "
                     f"{found.sent / GIB:9.3f} GiB sent by a chip")
    modelled = model_time(chip, computed, sum(found.sent for found in report.collectives.values()), efficiency)
    repeated = f" of {workload.times}" if workload.times > 1 else ""
    lines.append(f"  modelled step{repeated}: {modelled.best:.3f} s if communication hides behind arithmetic, "
                 f"{modelled.worst:.3f} s if it does not; MFU {100 * useful / chip.flops / modelled.best:.0f} % to "
                 f"{100 * useful / chip.flops / modelled.worst:.0f} %")
    lines.append(f"    arithmetic {modelled.arithmetic:.3f} s, communication {modelled.communication:.3f} s")
    return lines


def assumptions(chip: Chip, efficiency: float) -> str:
    """What the modelled times assume."""
    return (f"modelled, not measured: products at {efficiency} (--efficiency) of {chip.flops / 1e12:.0f} TFLOP/s; "
            f"rings at {chip.link_bandwidth / 1e9:.0f} GB/s (TPU: one torus axis in both directions); left out: work "
            "bound by memory, latencies, waiting for data, traffic between slices or machines")


def modelled_rate(results: list[tuple[Workload, Report, float]], chip: Chip, chips: int, videos: int,
                  efficiency: float) -> str:
    """Seconds of a chunk and frames per second, from the operations of every program."""
    best = worst = 0.0
    for workload, report, flops in results:
        sent = sum(found.sent for found in report.collectives.values())
        modelled = model_time(chip, flops / chips, sent, efficiency)
        best, worst = best + workload.times * modelled.best, worst + workload.times * modelled.worst
    frames = videos * CHUNK_FRAMES
    return (f"modelled chunk of {CHUNK_FRAMES} frames: {best:.3f} to {worst:.3f} s, {frames / worst:.1f} to "
            f"{frames / best:.1f} frames per second, text and transfers left out")


def remedies(run: RunConfig, chips: int, sampling: bool) -> Iterator[tuple[str, ...]]:
    """Changes that save memory, in the order in which they cost speed; the later ones contain the earlier ones."""
    base: tuple[str, ...] = ()
    sizes = run.mesh.resolve(chips)
    if sizes["data"] > 1 and not sampling:
        sizes |= {"data": 1, "fsdp": sizes["fsdp"] * sizes["data"]}
        base = (f"mesh.fsdp={sizes['fsdp']}", "mesh.data=1")
        yield base

    def parameters_over(axes: list[str]) -> str:
        others = [[name, list(over)] for name, over in run.mesh.rules if name != "embed"]
        return f"mesh.rules={[*others, ['embed', axes]]}"

    spread = [axis for axis in ("data", "fsdp", "context") if sizes[axis] > 1]
    if spread not in ([], ["fsdp"]) and "embed" not in dict(run.mesh.rules):
        base = (*base, parameters_over(spread))
        yield base
    if sampling:
        return
    if getattr(run.objective, "remat", "nothing_saveable") != "nothing_saveable":
        base = (*base, "objective.remat=nothing_saveable")
        yield base
    parts = run.accumulate * 2
    while run.batch_size % (parts * sizes["fsdp"]) == 0:
        yield (*base, f"accumulate={parts}")
        parts *= 2
    # One sample at a time per group of chips that share its tokens.
    heads = getattr(getattr(run.objective, "transformer", None), "num_attention_heads", 0)
    base = tuple(change for change in base if not change.startswith("mesh."))
    for factor in (2, 4, 8):
        context, fsdp = sizes["context"] * factor, sizes["fsdp"] // factor
        if (heads and heads % (context * sizes["tensor"]) == 0 and sizes["fsdp"] % factor == 0
                and run.batch_size % fsdp == 0):
            yield (*base, "mesh.data=1", f"mesh.fsdp={fsdp}", f"mesh.context={context}",
                   parameters_over(["fsdp", "context"]), f"accumulate={run.batch_size // fsdp}")


def remedy(build: Callable[..., Built], tried: Iterable[tuple[str, ...]], chip: Chip) -> str:
    """The end of the last line: the first of some changes that was compiled and fits, or that none does.

    Args:
      build: makes what is compiled from changes.
      tried: of :func:`remedies`.
      chip: where it shall fit.
    """
    for changes in tried:
        changed = build(changes)
        if max(sum(workload.arguments.values()) for workload in changed.workloads) > chip.memory:
            continue
        reports = [check(workload, changed.partition, chip.memory) for workload in changed.workloads]
        if all(report.fits for report in reports):
            return (f"; it would with {' '.join(f'--set {shlex.quote(change)}' for change in changes)} "
                    f"({max(report.used for report in reports) / GIB:.2f} of {chip.memory / GIB:.2f} GiB)")
    return ", nor with any change that was tried: more chips, fewer parameters or smaller videos are needed"


def _devices(topology: str) -> tuple[Chip, list[Any]]:
    from jax.experimental import topologies

    name, _, shape = topology.partition(":")
    is_gpu = name == "h100"
    if name not in CHIPS or not re.fullmatch(r"[1-8]?" if is_gpu else r"\d+x\d+(x\d+)?", shape):
        raise UserError(f"--topology: one of {', '.join(CHIPS)}, a colon and a shape such as 4x4x4 (of GPUs their "
                        f"number, at most 8), got {topology!r}")
    try:
        if is_gpu:
            # The plugin looks for a card when it is loaded.
            os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
            jax.config.update("jax_platforms", "cpu,cuda")
            count = f"1x{shape or 1}x1"
            return CHIPS[name], list(topologies.get_topology_desc(
                platform="cuda", topology_name=count, topology=count,
                target_config=Path(__file__).with_name("h100.textproto").read_text()).devices)
        return CHIPS[name], list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:  # the plugin raises many kinds, also where it is not installed
        needed = "jax's CUDA plugin" if is_gpu else 'libtpu, pip install "jax[tpu]",'
        raise UserError(f"--topology: {topology} cannot be described ({' '.join(str(error).split())[:200]}); {needed} "
                        "is needed") from error


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m helios_jax.tools.compile_check", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a file of configs/, with :argument where it takes one")
    parser.add_argument("--topology", required=True, help="chip:shape, for example v5p:4x4x4 or v6e:16x16; h100, or "
                        "h100:8 for eight GPUs of one machine")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="changes",
                        help="changes a value of the configuration, for example mesh.fsdp=64; may be repeated")
    parser.add_argument("--sample", type=int, metavar="VIDEOS",
                        help="compiles the sampling of so many videos at once in place of the training step")
    parser.add_argument("--player", metavar="NAME",
                        help="compiles the turn of one player alone, for example critic; all turns are one program")
    parser.add_argument("--stream_weights", action="store_true",
                        help="with --sample: the weights stay in the host's memory; one chip (mesh of 1)")
    parser.add_argument("--precision", default="none", metavar="MODE", help="with --sample: of the linear layers, see "
                        "docs/low_precision.md")
    parser.add_argument("--size", default="384x640", help="pixels of a video, in training where the data is not there")
    parser.add_argument("--efficiency", type=float, default=0.6, help="of the peak, in the modelled time")
    parser.add_argument("--no-remedy", action="store_true", help="do not look for a change that makes it fit")
    parser.add_argument("--json", help="also writes the numbers to this file")
    parser.add_argument("--hlo", type=Path, metavar="FOLDER", help="also writes the compiled programs there, as text")
    return parser.parse_args(argv)


@command_line
def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    match = re.fullmatch(r"(\d+)x(\d+)", arguments.size)
    if not match or any(int(n) % 16 or not int(n) for n in match.groups()):
        raise UserError(f"--size: HEIGHTxWIDTH in multiples of 16, got {arguments.size!r}")
    if not 0 < arguments.efficiency <= 1:
        raise UserError(f"--efficiency: above 0 and at most 1, got {arguments.efficiency}")
    if arguments.sample is not None and arguments.sample < 1:
        raise UserError(f"--sample: a positive number of videos, got {arguments.sample}")
    if arguments.stream_weights and arguments.sample is None:
        raise UserError("--stream_weights: goes with --sample")
    if arguments.precision != "none" and arguments.sample is None:
        raise UserError("--precision: goes with --sample")
    if arguments.player is not None and arguments.sample is not None:
        raise UserError("--player: goes with a training step, not with --sample")
    if arguments.hlo is not None:
        arguments.hlo.mkdir(parents=True, exist_ok=True)
    size = (int(match[1]), int(match[2]))
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server is asked
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no lock file: several checks may run at once
    jax.config.update("jax_platforms", "cpu")  # constants of the trace lie there, whatever this machine has
    values = load_values(arguments.config, arguments.changes)
    if "objective" not in values:
        raise UserError("config.objective.name: required key is missing")
    chip, devices = _devices(arguments.topology)
    if said := check_precision(arguments.precision, devices[0].device_kind):
        print(said)
    sampling = arguments.sample is not None
    with contextlib.nullcontext((values, "")) if sampling else stand_in_data(values, size) as (values, note):
        if note:
            print(note)

        def build(changes: tuple[str, ...]) -> Built:
            changed = json.loads(json.dumps(values))
            for change in changes:
                apply_change(changed, change)
            run = run_config(changed)
            if sampling:
                return Built(run, *sampling_workloads(run, devices, size, arguments.sample,
                                                      arguments.stream_weights, arguments.precision))
            partition, workload = training_workload(run, devices, arguments.player)
            return Built(run, partition, [workload])

        built = build(())
        chips = built.partition.mesh.size
        print(heading(built, chip, arguments.sample))
        results, made = [], []
        for workload in built.workloads:
            flops, report = workload.flops(), check(workload, built.partition, chip.memory, arguments.hlo)
            print("\n".join(describe(workload, report, chip, chips, flops, arguments.efficiency)))
            made.append((workload, report, flops[0]))
            results.append({"name": workload.name, "times": workload.times, "flops": flops[0],
                            "flops_without_rematerialisation": flops[1], "host_bytes": workload.host,
                            **report._asdict(),
                            "collectives": {kind: found._asdict() for kind, found in report.collectives.items()}})
        if sampling and all(report.fits for _, report, _ in made):
            print(modelled_rate(made, chip, chips, arguments.sample, arguments.efficiency))
        print(assumptions(chip, arguments.efficiency))
        if arguments.json:
            Path(arguments.json).write_text(json.dumps({
                "config": arguments.config, "changes": arguments.changes, "topology": arguments.topology,
                "chips": chips, "mesh": dict(built.partition.mesh.shape), "batch_size": built.run.batch_size,
                "accumulate": built.run.accumulate, "remat": getattr(built.run.objective, "remat", None),
                "programs": results}, indent=2) + "\n", encoding="utf-8")
        if all(result["fits"] for result in results):
            print("it fits")
            return 0
        tried = remedies(built.run, len(devices), sampling)
        print(f"it does not fit{'' if arguments.no_remedy else remedy(build, tried, chip)}")
        return 1


if __name__ == "__main__":
    main(sys.argv[1:])
