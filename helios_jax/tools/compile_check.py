"""Compiles a training step for machines that are not there, and says whether and how it would run.

    python -m helios_jax.tools.compile_check --config configs/tiny_stage1.py --topology v5e:2x2 --set mesh.fsdp=-1

It needs libtpu (``pip install "jax[tpu]"``), no TPU. The step is the trainer's own, with the run's mesh, batch and
optimizer; only the data may be missing, and then random records of the asked size stand in. Printed are the memory of a
chip by kind, the arithmetic, the collectives, and a modelled step time with what it assumes. Exit code 0: it fits;
1: it does not, and the last line names a change that makes it fit (compiled, too); 2: a mistake in the arguments.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from helios_jax.data.pipeline import DATASET_FILE
from helios_jax.data.random_latents import write_random_latents, write_random_ode_pairs
from helios_jax.errors import UserError, command_line
from helios_jax.tools.roofline import CHIPS, Chip, Collective, collectives, count_flops
from helios_jax.training.config import RunConfig, run_config
from helios_jax.training.objective import objective_module
from helios_jax.training.program import Program, make_step

PyTree = Any
GIB = 2**30


class Report(NamedTuple):
    """What a compilation says. Sizes in bytes of one chip.

    fits: whether it compiles within the chip's memory.
    used: memory in use at its peak (as the compiler's error states it where it does not fit).
    kinds: what the memory holds: parameters, average, optimizer, frozen, batch, temporary, code.
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


def load_values(config: str, changes: list[str]) -> dict[str, Any]:
    """The values of a file of ``configs/`` with changes.

    Args:
      config: ``FILE`` or ``FILE:ARGUMENT``, as for train.py.
      changes: ``field=value``; a value is a Python literal or else a string.

    Raises:
      UserError: no such file; a change without "=" or into something that is no group.
    """
    path, _, argument = config.partition(":")
    if not Path(path).is_file():
        raise UserError(f"--config: no such file: {path}")
    spec = importlib.util.spec_from_file_location("checked_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    values = (module.get_config(argument) if argument else module.get_config()).to_dict()
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
    records of ``size`` (height and width in pixels) with captions of 512 rows.
    """
    values = {**values, "sample_every": 0, "objective": dict(values["objective"])}
    objective, notes = values["objective"], []
    for field in ("model", "sample", "validation", "negative_prompt"):
        objective.pop(field, None)
    with tempfile.TemporaryDirectory() as folder:
        if "data" in objective and not (Path(objective["data"]) / DATASET_FILE).is_file():
            transformer = objective.get("transformer", {})
            write = write_random_ode_pairs if objective["name"] == "stage3_ode" else write_random_latents
            write(folder, clips=1, sections=objective.get("sections", 2), height=size[0] // 8, width=size[1] // 8,
                  channels=transformer.get("in_channels", 16), text_rows=512,
                  text_dim=transformer.get("text_dim", 4096))
            notes.append(f"{objective['data'] or 'no data folder'}: not there; random records of {size[0]}x{size[1]} "
                         "with 512 caption rows stand in")
            objective["data"] = folder
        yield values, "; ".join(notes)


def abstract_batch(run: RunConfig, program: Program) -> PyTree:
    """Shapes and places of the run's batch, from one real sample."""
    sample = next(iter(objective_module(run.objective_name).build(dataclasses.replace(run, batch_size=1)).dataset))

    def leaf(array: Any) -> jax.ShapeDtypeStruct:
        shape = (run.batch_size, *array.shape[1:])
        return jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(array.dtype),
                                    sharding=program.partition.batch(shape))

    return jax.tree.map(leaf, sample)


def _bytes(tree: PyTree) -> float:
    return float(sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
                     for leaf in jax.tree.leaves(tree)))


def check(program: Program, batch: PyTree) -> Report:
    """Compiles the step."""
    state = program.abstract_state
    kinds = {"parameters": _bytes(state.params), "average": _bytes(state.ema), "optimizer": _bytes(state.optimizer),
             "frozen": _bytes(program.abstract_frozen), "batch": _bytes(batch)}
    start = time.perf_counter()
    with jax.sharding.use_abstract_mesh(program.partition.mesh.abstract_mesh):  # kernels ask it for the chip
        lowered = program.lower(batch)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"Used ([\d.]+)([KMGT]) of", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) and used is None:
            raise
        size = float(used[1]) * {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}[used[2]] if used else math.nan
        return Report(False, size, kinds, math.nan, {}, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    kinds |= {"temporary": float(memory.temp_size_in_bytes), "code": float(memory.generated_code_size_in_bytes)}
    used = (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes)
    cost = compiled.cost_analysis() or {}
    cost = cost[0] if isinstance(cost, list) else cost
    return Report(True, float(used), kinds, float(cost.get("flops", math.nan)), collectives(compiled.as_text()),
                  seconds)


def step_flops(program: Program, batch: PyTree) -> tuple[float, float]:
    """Operations of one step on all chips: as it is computed, and without what rematerialisation computes again.

    Attention is counted as its CPU variant computes it: like the kernels, it computes its weights again for the
    gradient, and that counts in both numbers.
    """

    def count(run: RunConfig, objective: Any) -> float:
        step = make_step(run, objective, program.optimizer, program.trainable)
        return count_flops(jax.make_jaxpr(step)(program.abstract_state, program.abstract_frozen, batch))

    run = program.run
    computed = count(run, program.objective)
    if getattr(run.objective, "remat", None) is None:
        return computed, computed
    plain = dataclasses.replace(run, objective=dataclasses.replace(run.objective, remat=None))
    return computed, count(plain, objective_module(run.objective_name).build(plain))


def describe(program: Program, chip: Chip, report: Report, flops: tuple[float, float], efficiency: float) -> list[str]:
    """The report as lines."""
    mesh = program.partition.mesh
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    lines = [f"{program.run.objective_name}, batch {program.run.batch_size} in {program.run.accumulate} part(s), "
             f"{mesh.size} chips {chip.name}: {sizes}",
             f"compiled in {report.seconds:.0f} s" if report.fits else "does not compile within the chip's memory",
             f"memory per chip: {report.used / GIB:.2f} of {chip.memory / GIB:.2f} GiB"]
    lines += [f"  {name:<10} {size / GIB:8.3f} GiB" for name, size in report.kinds.items()]
    computed, useful = flops
    lines.append(f"matrix products per step and chip: {computed / mesh.size / 1e12:.2f} TFLOP, of them "
                 f"{(computed - useful) / mesh.size / 1e12:.2f} by rematerialisation (counted in the traced step)")
    if not report.fits:
        return lines
    lines.append(f"the compiler's count: {report.compiler_flops / 1e12:.2f} TFLOP, with every loop counted once")
    traffic = 0.0
    for kind, (count, size) in report.collectives.items():
        lines.append(f"  {kind:<20} {count:6d} times {size / GIB:9.3f} GiB of results per chip")
        traffic += 2 * size if kind == "all-reduce" else size
    compute = computed / mesh.size / (chip.flops * efficiency)
    communicate = traffic / chip.link_bandwidth
    best, worst = max(compute, communicate), compute + communicate
    rate = useful / mesh.size / chip.flops
    lines += [
        f"modelled step: {best:.3f} s if communication hides behind arithmetic, {worst:.3f} s if it does not; "
        f"MFU {100 * rate / best:.0f} % to {100 * rate / worst:.0f} %",
        f"  arithmetic {compute:.3f} s: {chip.flops / 1e12:.0f} TFLOP/s peak x {efficiency} (assumed, --efficiency)",
        f"  communication {communicate:.3f} s: {chip.link_bandwidth / 1e9:.0f} GB/s, one torus axis both ways; an "
        "all-reduce moves its result twice, others once",
        "  not in the model: work that is bound by memory, latencies, waiting for data, traffic between slices",
    ]
    return lines


def remedies(run: RunConfig, chips: int) -> Iterator[tuple[str, ...]]:
    """Changes that save memory, in the order in which they cost speed."""
    base: tuple[str, ...] = ()
    sizes = run.mesh.resolve(chips)
    if sizes["data"] > 1:
        base = (f"mesh.fsdp={sizes['data'] * sizes['fsdp']}", "mesh.data=1")
        yield base
    if getattr(run.objective, "remat", "") is None:
        base = (*base, "objective.remat=nothing_saveable")
        yield base
    batch_parts = sizes["data"] * sizes["fsdp"]
    parts = run.accumulate * 2
    while run.batch_size % (parts * batch_parts) == 0:
        yield (*base, f"accumulate={parts}")
        parts *= 2
    heads = getattr(getattr(run.objective, "transformer", None), "num_attention_heads", 0)
    for factor in (2, 4, 8):
        if heads and heads % (sizes["context"] * sizes["tensor"] * factor) == 0 and batch_parts % factor == 0:
            yield (*[change for change in base if not change.startswith("mesh.")], "mesh.data=1",
                   f"mesh.fsdp={batch_parts // factor}", f"mesh.tensor={sizes['tensor'] * factor}")


def _devices(topology: str) -> tuple[Chip, list[Any]]:
    from jax.experimental import topologies

    name, _, shape = topology.partition(":")
    if name not in CHIPS or not re.fullmatch(r"\d+x\d+(x\d+)?", shape):
        raise UserError(f"--topology: one of {', '.join(CHIPS)}, a colon and a shape such as 4x4x4, got {topology!r}")
    try:
        return CHIPS[name], list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:  # the plugin raises many kinds, also where it is not installed
        raise UserError(f"--topology: {topology} cannot be described ({' '.join(str(error).split())[:200]}); "
                        'libtpu is needed: pip install "jax[tpu]"') from error


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m helios_jax.tools.compile_check", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a file of configs/, with :argument where it takes one")
    parser.add_argument("--topology", required=True, help="chip:shape, for example v5p:4x4x4 or v6e:16x16")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="changes",
                        help="changes a value of the configuration, for example mesh.fsdp=64; may be repeated")
    parser.add_argument("--size", default="384x640", help="pixels of a video where the data is not there")
    parser.add_argument("--efficiency", type=float, default=0.6, help="of the peak, in the modelled time")
    parser.add_argument("--no-remedy", action="store_true", help="do not look for a change that makes it fit")
    parser.add_argument("--json", help="also writes the numbers to this file")
    return parser.parse_args(argv)


@command_line
def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    match = re.fullmatch(r"(\d+)x(\d+)", arguments.size)
    if not match or any(int(n) % 16 or not int(n) for n in match.groups()):
        raise UserError(f"--size: HEIGHTxWIDTH in multiples of 16, got {arguments.size!r}")
    if not 0 < arguments.efficiency <= 1:
        raise UserError(f"--efficiency: above 0 and at most 1, got {arguments.efficiency}")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server is asked
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no lock file: several checks may run at once
    jax.config.update("jax_platforms", "cpu")  # constants of the trace lie there, whatever this machine has
    values = load_values(arguments.config, arguments.changes)
    if "objective" not in values:
        raise UserError("config.objective.name: required key is missing")
    chip, devices = _devices(arguments.topology)
    with stand_in_data(values, (int(match[1]), int(match[2]))) as (values, note):
        if note:
            print(note)

        def build(changes: tuple[str, ...]) -> tuple[Program, PyTree]:
            changed = json.loads(json.dumps(values))
            for change in changes:
                apply_change(changed, change)
            program = Program.build(run_config(changed), devices)
            return program, abstract_batch(program.run, program)

        program, batch = build(())
        flops = step_flops(program, batch)
        report = check(program, batch)
        print("\n".join(describe(program, chip, report, flops, arguments.efficiency)))
        if arguments.json:
            Path(arguments.json).write_text(json.dumps({
                "config": arguments.config, "changes": arguments.changes, "topology": arguments.topology,
                "chips": len(devices), "flops": flops[0], "flops_without_rematerialisation": flops[1],
                **report._asdict()}, indent=2) + "\n", encoding="utf-8")
        if report.fits:
            print("it fits")
            return 0
        if not arguments.no_remedy:
            for changes in remedies(program.run, len(devices)):
                changed = check(*build(changes))
                if changed.fits:
                    print(f"it does not fit; it would with {' '.join(f'--set {change}' for change in changes)} "
                          f"({changed.used / GIB:.2f} of {chip.memory / GIB:.2f} GiB)")
                    return 1
    print("it does not fit" + ("" if arguments.no_remedy else ", nor with any change that was tried: more chips, fewer "
                               "parameters or smaller videos are needed"))
    return 1


if __name__ == "__main__":
    main(sys.argv[1:])
