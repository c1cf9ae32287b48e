"""The training loop, the same for every objective.

A step is one compiled function whose state is donated. Its random key is derived from (seed, step), and the position
in the data is saved with the state, so a killed and resumed run repeats the uninterrupted one bit for bit.

One device, many devices and many processes run the same code: the state is made, restored and saved in the parts in
which the mesh holds it (:mod:`helios_jax.sharding`). The first process logs, samples and exports.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from helios_jax import distributed, sharding
from helios_jax.errors import UserError
from helios_jax.training.checkpoint import Checkpointer, check_config, guard_config
from helios_jax.training.config import RunConfig
from helios_jax.training.metrics import Writers, duration
from helios_jax.training.program import Program, TrainState, metric_name
from helios_jax.training.progress import Progress

PyTree = Any

# So many steps in a row without a finite gradient mean that the run is lost, not that one batch was bad.
MAX_SKIPPED_STEPS = 50


class StopRequest:
    """Turns SIGTERM and the first Ctrl-C into a wish that the loop fulfils after the current step."""

    def __init__(self):
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def _receive(self, number: int, frame: Any) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C stops at once
        self.signal = number

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._previous[number] = signal.signal(number, self._receive)
            except ValueError:  # not the main thread (a notebook, a test): the caller deals with signals
                break
        return self

    def __exit__(self, *unused) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _bytes(tree: PyTree) -> int:
    """On one device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _summary(program: Program, state: TrainState) -> str:
    run, partition = program.run, program.partition
    trained = total = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    if program.trainable is not None:
        sizes = jax.tree.map(lambda p, train: p.size if train else 0, state.params, program.trainable)
        trained = sum(jax.tree.leaves(sizes))
    mesh, device = partition.mesh, partition.mesh.devices.flat[0]
    where = f"on {device.platform} ({device.device_kind})"
    if mesh.size > 1:
        sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        where = f"per device on {mesh.size} of {jax.device_count()} {where} in {jax.process_count()} processes: {sizes}"
    batch = f"batch {run.batch_size}" + (f" in {run.accumulate} parts" if run.accumulate > 1 else "")
    return (f"{run.objective_name}: {trained / 1e6:.3f} M of {total / 1e6:.3f} M parameters trained with "
            f"{run.optimizer.name}, {batch}, {run.num_steps} steps; parameters "
            f"{_bytes(state.params) / 2**20:.0f} MiB, average {_bytes(state.ema) / 2**20:.0f} MiB, optimizer "
            f"{_bytes(state.optimizer) / 2**20:.0f} MiB {where}")


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a call of :func:`train` ended: the step reached, and the signal that stopped it (None: it is complete)."""

    step: int
    stopped_by: int | None = None


def train(run: RunConfig, workdir: str | Path, *, print_line: Callable[[str], None] = print) -> TrainResult:
    """Trains until ``run.num_steps``, resuming from the newest checkpoint in ``workdir`` if there is one.

    SIGTERM and Ctrl-C save a checkpoint and return; with several processes, a signal to any of them stops all.

    Args:
      run: the configuration.
      workdir: receives config.json, checkpoints/, metrics.jsonl, tensorboard/, samples/ and, at the end, export/. With
        several processes it is a folder that all of them see.
      print_line: receives the progress lines, in the first process.

    Raises:
      UserError: the folder cannot be used, holds another run or a damaged checkpoint; the mesh does not fit; the
        training diverged. ProcessLost: another process ended; there is nothing to do but to exit.
    """
    with distributed.peers_watched():
        return _train(run, workdir, print_line)


def _train(run: RunConfig, workdir: str | Path, print_line: Callable[[str], None]) -> TrainResult:
    workdir = Path(workdir)
    is_first = jax.process_index() == 0
    if not is_first:
        print_line = _silent
    check_config(workdir, run)
    program = Program.build(run)
    objective = program.objective
    try:  # only now: a start that fails must not tie the folder to its settings
        workdir.mkdir(parents=True, exist_ok=True)
        guard_config(workdir, run)
    except OSError as error:
        raise UserError(f"workdir: {workdir} cannot be written ({error})") from None

    checkpointer = Checkpointer(workdir / "checkpoints", run.keep_last, run.keep_every)
    iterator = iter(objective.dataset)
    start = checkpointer.latest_step()
    if start is None:
        state, start = program.initial_state(), 0
    else:  # never makes the random start values
        state = TrainState.from_items(checkpointer.restore(start, program.abstract_state.items(), iterator))
        print_line(f"resumed from step {start} of {workdir}")
    frozen = program.load_frozen()
    print_line(_summary(program, state))

    writers = Writers(workdir, start, run.tensorboard) if is_first else None
    lost = False
    try:
        with StopRequest() as stop, distributed.losses_reported():
            state, step = _loop(program, state, frozen, start, iterator, checkpointer, writers, stop, print_line)
            checkpointer.save(step, state.items(), iterator)
            checkpointer.wait()
        if step < run.num_steps:
            number = stop.signal or signal.SIGTERM  # another process may be the one that was told
            print_line(f"stopped by {signal.Signals(number).name} at step {step}: saved; the same command resumes")
            return TrainResult(step, number)
        if objective.export is not None:
            params = _looked_at(program, state.best_params())
            if is_first or objective.on_mesh:
                objective.export(params, str(workdir / "export"))
                print_line(f"exported to {workdir / 'export'}")
            distributed.wait_for_all("exported")
        print_line(f"complete at step {step}: {workdir}")
        return TrainResult(step)
    except distributed.ProcessLost:
        lost = True
        raise
    finally:
        if writers is not None:
            writers.close()
        if not lost:  # it would wait for the lost process
            checkpointer.close()


def _silent(line: str) -> None:
    del line


def _looked_at(program: Program, params: PyTree) -> PyTree:
    """Parameters as the objective wants to see them: where they lie, or gathered from the mesh by all processes."""
    return params if program.objective.on_mesh or program.partition.mesh.size == 1 else sharding.gather(params)


def _loop(program: Program, state: TrainState, frozen: PyTree, start: int, iterator: Any, checkpointer: Checkpointer,
          writers: Writers | None, stop: StopRequest, print_line: Callable[[str], None]) -> tuple[TrainState, int]:
    run, objective, mesh = program.run, program.objective, program.partition.mesh
    compiled: dict[Any, jax.stages.Compiled] = {}  # by the shapes of the batch: data of several sizes take turns
    pending: list[dict[str, jax.Array]] = []  # metrics of the steps since the last log line, still on the device
    vote = distributed.StopVote(mesh)
    progress, step = Progress(run.batch_size, run.num_steps, mesh.devices.flat[0].device_kind, mesh.size), start
    while step < run.num_steps and not vote(stop.signal is not None):
        with progress.waiting():
            batch = sharding.place_batch(program.partition, next(iterator), run.batch_size)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(batch))
        if shapes not in compiled:
            begun = time.perf_counter()
            with progress.paused(pending):
                compiled[shapes] = program.lower(batch).compile()
            print_line(f"compiled the step in {duration(time.perf_counter() - begun)}"
                       + " (for data of another size)" * (step > start))
            if step == start:  # without the start of the input pipeline
                progress.restart()
        state, metrics = compiled[shapes](state, frozen, batch)
        pending.append(program.made_metrics(step, metrics))
        step += 1
        progress.step(None if objective.work is None else objective.work(batch))
        if len(pending) > 1:  # at most two steps in flight: a signal or a save never waits for a long queue
            jax.block_until_ready(pending[-2])

        if step % run.log_every == 0 or step == run.num_steps:
            values = jax.device_get(pending)
            means = {name: float(np.mean([v[name] for v in values if name in v]))
                     for name in dict.fromkeys(name for v in values for name in v)}
            speed = progress.numbers()
            if writers is not None:
                writers.scalars(step, {**means, **speed})
            print_line(progress.line(step, _losses(program, means), speed))
            if int(state.skipped) >= MAX_SKIPPED_STEPS:
                raise UserError(f"training diverged: the gradient was not finite for {int(state.skipped)} steps up to "
                                f"step {step}; the checkpoint of step {checkpointer.latest_step()} is the last good one"
                                " (try a smaller optimizer.learning_rate or a longer optimizer.warmup_steps)")
            pending.clear()
            progress.restart()

        if step % run.checkpoint_every == 0:
            checkpointer.save(step, state.items(), iterator)
        if run.sample_every and (step % run.sample_every == 0 or step == run.num_steps):
            with progress.paused(pending):
                _evaluate(program, state.best_params(), step, writers)
    return state, step


def _losses(program: Program, means: dict[str, float]) -> list[str]:
    """Loss and gradient of every player that had a turn, for the progress line."""
    parts = []
    for player in program.optimizer.players:
        loss, grad = metric_name(player, "loss"), metric_name(player, "grad_norm")
        if loss in means:
            parts += [f"{player.name} loss {means[loss]:.5f}".lstrip(), f"grad {means[grad]:.3f}"]
    return parts


def _evaluate(program: Program, params: PyTree, step: int, writers: Writers | None) -> None:
    objective = program.objective
    if objective.evaluate is None and objective.sample is None:
        return
    params = _looked_at(program, params)
    if writers is None and not objective.on_mesh:
        return
    if program.partition.mesh.size > 1 and not objective.on_mesh:
        params = jax.device_put(params, jax.local_devices()[0])
    numbers = {} if objective.evaluate is None else objective.evaluate(params, step)
    videos = {} if objective.sample is None else objective.sample(params, step)
    if writers is None:  # only the first process writes
        return
    if numbers:
        writers.scalars(step, {f"eval/{name}": value for name, value in numbers.items()})
    for name, frames in videos.items():
        writers.video(step, name, frames, objective.fps)
