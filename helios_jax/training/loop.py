"""The training loop, the same for every objective.

A step is one compiled function whose state is donated. Its random key is derived from (seed, step), and the position
in the data is saved with the state, so a killed and resumed run repeats the uninterrupted one bit for bit.
"""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from helios_jax.errors import UserError
from helios_jax.training import ema as ema_lib
from helios_jax.training.checkpoint import Checkpointer, guard_config
from helios_jax.training.config import RunConfig
from helios_jax.training.metrics import Writers, duration
from helios_jax.training.objective import Objective, objective_module
from helios_jax.training.optim import make_optimizer, schedule

PyTree = Any

# So many steps in a row without a finite gradient mean that the run is lost, not that one batch was bad.
MAX_SKIPPED_STEPS = 50


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Everything that a step changes.

    Attributes:
      step: int32 scalar, number of steps done.
      params: trained parameters (and fixed ones, where the objective's ``trainable`` says so).
      ema: their moving average, or None.
      optimizer: the optax state.
      skipped: int32 scalar, consecutive steps without an update because the gradient was not finite.
    """

    step: jax.Array
    params: PyTree
    ema: PyTree
    optimizer: PyTree
    skipped: jax.Array

    def items(self) -> dict[str, PyTree]:
        """The parts as the checkpoint stores them."""
        items = {"params": self.params,
                 "optimizer": {"state": self.optimizer, "step": self.step, "skipped": self.skipped}}
        return items if self.ema is None else {**items, "ema": self.ema}

    @classmethod
    def from_items(cls, items: dict[str, PyTree]) -> TrainState:
        rest = items["optimizer"]
        return cls(rest["step"], items["params"], items.get("ema"), rest["state"], rest["skipped"])

    def best_params(self) -> PyTree:
        """The averaged parameters if there are any: what sampling and exporting use."""
        return self.params if self.ema is None else self.ema


def initial_state(params: PyTree, optimizer: optax.GradientTransformation, use_ema: bool) -> TrainState:
    """Step 0; traceable. The average starts as a copy (donated buffers must not be shared)."""
    average = jax.tree.map(lambda p: jnp.array(p, copy=True), params) if use_ema else None
    return TrainState(jnp.int32(0), params, average, optimizer.init(params), jnp.int32(0))


def make_step(run: RunConfig, objective: Objective, optimizer: optax.GradientTransformation,
              trainable: PyTree | None = None) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The pure function of one step: ``step(state, frozen, batch) -> (state, metrics)``.

    A step whose loss or gradient is not finite changes nothing but the counters.
    """
    rate = schedule(run.optimizer, run.num_steps)

    def step(state: TrainState, frozen: PyTree, batch: dict[str, jax.Array]):
        key = jax.random.fold_in(jax.random.key(run.seed), state.step)
        (loss, metrics), grads = jax.value_and_grad(objective.loss, has_aux=True)(state.params, frozen, batch, key)
        if trainable is not None:  # a fixed parameter's gradient must not count in the norm
            grads = jax.tree.map(lambda g, train: g if train else jnp.zeros_like(g), grads, trainable)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        average = None if state.ema is None else ema_lib.update(state.ema, params, state.step, run.ema_decay)

        def keep(new: PyTree, old: PyTree) -> PyTree:
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        metrics = {"loss": loss, **metrics, "grad_norm": grad_norm, "learning_rate": jnp.float32(rate(state.step)),
                   "skipped": 1.0 - finite.astype(jnp.float32)}
        state = TrainState(state.step + 1, keep(params, state.params), keep(average, state.ema),
                           keep(optimizer_state, state.optimizer), jnp.where(finite, 0, state.skipped + 1))
        return state, metrics

    return step


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
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _summary(run: RunConfig, state: TrainState, trainable: PyTree | None) -> str:
    total = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    trained = total
    if trainable is not None:
        trained = sum(jax.tree.leaves(jax.tree.map(lambda p, train: p.size if train else 0, state.params, trainable)))
    device = jax.devices()[0]
    return (f"{run.objective_name}: {trained / 1e6:.3f} M of {total / 1e6:.3f} M parameters trained with "
            f"{run.optimizer.name}, batch {run.batch_size}, {run.num_steps} steps; parameters "
            f"{_bytes(state.params) / 2**20:.0f} MiB, average {_bytes(state.ema) / 2**20:.0f} MiB, optimizer "
            f"{_bytes(state.optimizer) / 2**20:.0f} MiB on {device.platform} ({device.device_kind})")


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a call of :func:`train` ended: the step reached, and the signal that stopped it (None: it is complete)."""

    step: int
    stopped_by: int | None = None


def train(run: RunConfig, workdir: str | Path, *, print_line: Callable[[str], None] = print) -> TrainResult:
    """Trains until ``run.num_steps``, resuming from the newest checkpoint in ``workdir`` if there is one.

    SIGTERM and Ctrl-C save a checkpoint and return.

    Args:
      run: the configuration.
      workdir: receives config.json, checkpoints/, metrics.jsonl, tensorboard/, samples/ and, at the end, export/.
      print_line: receives the progress lines.

    Raises:
      UserError: the folder cannot be used, holds another run or a damaged checkpoint; the training diverged.
    """
    workdir = Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        guard_config(workdir, run)
    except OSError as error:
        raise UserError(f"workdir: {workdir} cannot be written ({error})") from None
    objective = objective_module(run.objective_name).build(run)

    # --- state: abstract first, so that a resumed run never makes the random start values -----------------------------
    abstract_params = jax.eval_shape(objective.init_params, jax.random.key(0))
    trainable = None if objective.trainable is None else objective.trainable(abstract_params)
    optimizer = make_optimizer(run.optimizer, run.num_steps, trainable)

    def make_state(params: PyTree) -> TrainState:
        return initial_state(params, optimizer, run.ema_decay > 0)

    checkpointer = Checkpointer(workdir / "checkpoints", run.keep_last, run.keep_every)
    iterator = iter(objective.dataset)
    start = checkpointer.latest_step()
    if start is None:
        # A key that no step uses: steps fold in 0, 1, 2, ...
        key = jax.random.fold_in(jax.random.key(run.seed), np.uint32(2**32 - 1))
        params = (jax.jit(objective.init_params)(key) if objective.load_params is None
                  else objective.load_params(abstract_params))
        state, start = jax.jit(make_state)(params), 0
        del params
    else:
        abstract = jax.eval_shape(make_state, abstract_params)
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract)
        state = TrainState.from_items(checkpointer.restore(start, abstract.items(), iterator))
        print_line(f"resumed from step {start} of {workdir}")
    frozen = objective.load_frozen()
    print_line(_summary(run, state, trainable))

    writers = Writers(workdir, start, run.tensorboard)
    try:
        with StopRequest() as stop:
            state, step = _loop(run, objective, jax.jit(make_step(run, objective, optimizer, trainable),
                                                        donate_argnums=0),
                                state, frozen, start, iterator, checkpointer, writers, stop, print_line)
        checkpointer.save(step, state.items(), iterator)
        checkpointer.wait()
        if step < run.num_steps:
            print_line(f"stopped by {signal.Signals(stop.signal).name} at step {step}: saved; the same command resumes")
            return TrainResult(step, stop.signal)
        if objective.export is not None:
            objective.export(state.best_params(), str(workdir / "export"))
            print_line(f"exported to {workdir / 'export'}")
        print_line(f"complete at step {step}: {workdir}")
        return TrainResult(step)
    finally:
        writers.close()
        checkpointer.close()


def _loop(run: RunConfig, objective: Objective, jitted_step: Any, state: TrainState, frozen: PyTree, start: int,
          iterator: Any, checkpointer: Checkpointer, writers: Writers, stop: StopRequest,
          print_line: Callable[[str], None]) -> tuple[TrainState, int]:
    compiled = None
    pending: list[dict[str, jax.Array]] = []  # metrics of the steps since the last log line, still on the device
    waited, interval_start, step = 0.0, time.perf_counter(), start
    while step < run.num_steps and stop.signal is None:
        before = time.perf_counter()
        batch = next(iterator)
        waited += time.perf_counter() - before
        if compiled is None:
            compiled = jitted_step.lower(state, frozen, batch).compile()
            print_line(f"compiled the step in {duration(time.perf_counter() - before)}")
            waited, interval_start = 0.0, time.perf_counter()
        state, metrics = compiled(state, frozen, batch)
        step += 1
        pending.append(metrics)
        if len(pending) > 1:  # at most two steps in flight: a signal or a save never waits for a long queue
            jax.block_until_ready(pending[-2])

        if step % run.log_every == 0 or step == run.num_steps:
            values = jax.device_get(pending)
            seconds = (time.perf_counter() - interval_start) / len(values)
            means = {name: float(np.mean([v[name] for v in values])) for name in values[0]}
            rate = run.batch_size / seconds
            writers.scalars(step, {**means, "step_seconds": seconds, "samples_per_second": rate,
                                   "data_wait_fraction": waited / (seconds * len(values))})
            left = duration((run.num_steps - step) * seconds)
            print_line(f"step {step}/{run.num_steps}  loss {means['loss']:.5f}  grad {means['grad_norm']:.3f}  "
                       f"{seconds:.3f} s/step  {rate:.1f} samples/s  {left} left")
            if int(state.skipped) >= MAX_SKIPPED_STEPS:
                raise UserError(f"training diverged: the gradient was not finite for {int(state.skipped)} steps up to "
                                f"step {step}; the checkpoint of step {checkpointer.latest_step()} is the last good one"
                                " (try a smaller optimizer.learning_rate or a longer optimizer.warmup_steps)")
            pending.clear()
            waited, interval_start = 0.0, time.perf_counter()

        if step % run.checkpoint_every == 0:
            checkpointer.save(step, state.items(), iterator)
        if run.sample_every and (step % run.sample_every == 0 or step == run.num_steps):
            _evaluate(objective, state.best_params(), step, writers)
            interval_start = time.perf_counter()  # neither sampling nor the steps before it belong to the step time
    return state, step


def _evaluate(objective: Objective, params: PyTree, step: int, writers: Writers) -> None:
    if objective.evaluate is not None:
        writers.scalars(step, {f"eval/{name}": value for name, value in objective.evaluate(params, step).items()})
    if objective.sample is not None:
        for name, frames in objective.sample(params, step).items():
            writers.video(step, name, frames, objective.fps)
